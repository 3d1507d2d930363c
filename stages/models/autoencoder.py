"""The autoencoder of a latent diffusion model: images <-> latents."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from numpy.typing import NDArray

from stages.models.checks import check_finite, check_layers, check_sizes, is_number
from stages.models.families import AUTOENCODER_CLASSES, Denoiser, config_defaults, sample_shape
from stages.models.layout import WEIGHTS
from stages.models.pipeline import autoencoder_folder, check_names, last_line, rename_attention, with_latent_scale
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.storage.tensors import read_tensors


class Autoencoder:
    """A frozen autoencoder in eval mode.

    The model's latents are z = (x − mean) · scale / std of the network's x, as in the pipelines of diffusers: mean is
    `shift_factor` (Stable Diffusion 3) or, with std, given for each channel (`latents_mean` and `latents_std`, SDXL).

    Args:
        network: The diffusers model; its config gives scale, mean and std of the latents.
    """

    def __init__(self, network: AutoencoderKL | VQModel) -> None:
        self.network: Any = network
        self.network.eval().requires_grad_(requires_grad=False)
        config = self.network.config
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.mean = self._by_channel(config.get("latents_mean") or [config.get("shift_factor") or 0.0])
        self.std = self._by_channel(config.get("latents_std") or [1.0])
        self.downsampling: int = 2 ** (len(self.network.config["block_out_channels"]) - 1)

    def _by_channel(self, values: Sequence[float]) -> torch.Tensor:
        """Numbers, one for all channels or one each -> [1, 1 or C, 1, 1] on the network's device."""
        return torch.tensor(values, dtype=torch.float32, device=self.network.device).view(1, -1, 1, 1)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
        """[N, C, H, W] uint8 -> scaled latents [N, c, h, w]; for AutoencoderKL the mode of the latent distribution.

        Raises:
            InputError: A latent is beyond the range of float16, or not a number.
        """
        images = torch.from_numpy(pixels.astype(np.float32)).to(self.network.device) / 127.5 - 1
        encoded = self.network.encode(images)
        latents = encoded.latent_dist.mode() if isinstance(self.network, AutoencoderKL) else encoded.latents
        scaled: torch.Tensor = (latents - self.mean) * self.scale / self.std
        half = scaled.half()
        if not half.isfinite().all():
            found = f"a latent of the images is {float(scaled[~half.isfinite()][0]):.3g}, beyond the range of float16"
            raise InputError(f"{found}; correct the autoencoder or its scaling_factor")
        return half.cpu().numpy()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, c, h, w] -> images [N, C, H, W], approximately in [-1, 1]."""
        latents = latents.to(self.network.device).float()  # those of an ONNX graph are on the CPU
        images: torch.Tensor = self.network.decode(latents * self.std / self.scale + self.mean).sample
        return images


def read_autoencoder(folder: Path, device: torch.device) -> Autoencoder | None:
    """Load the autoencoder of a pipeline folder; None for a model in pixel space.

    Raises:
        InputError: The class is not supported, the files are damaged, or a weight is not finite.
    """
    component_folder = autoencoder_folder(folder)
    if component_folder is None:
        return None
    config = with_latent_scale(read_json(component_folder / "config.json"))
    name = str(config.get("_class_name"))
    if name not in AUTOENCODER_CLASSES:
        raise InputError(f"{component_folder} holds a {name}; supported: {', '.join(AUTOENCODER_CLASSES)}")
    defaults = config_defaults(AUTOENCODER_CLASSES[name])
    check_sizes(config, defaults, component_folder / "config.json")
    check_latent_scale({**defaults, **config}, component_folder / "config.json")
    tensors = {rename_attention(key): tensor for key, tensor in read_tensors(component_folder / WEIGHTS).items()}
    check_layers(config, ("layers_per_block",), len(tensors), str(component_folder))
    try:
        with torch.device("meta"):
            network = AUTOENCODER_CLASSES[name].from_config(config)
        check_names(tensors, network, component_folder)
        network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{component_folder}: the weights do not fit the config ({last_line(error)})") from None
    check_finite(network, component_folder)
    return Autoencoder(network.to(device))


def check_latent_scale(config: Mapping[str, Any], origin: Path) -> None:
    """Check that scale, mean and std of the latents can be honoured, and that decoded images look like encoded ones.

    Raises:
        InputError: A value is not allowed, or two contradict each other; the key is named.
    """
    if config["in_channels"] != config["out_channels"]:
        sides = f"in_channels {config['in_channels']} and out_channels {config['out_channels']}"
        raise InputError(f"{origin} has {sides}; supported: equal numbers")
    scale, shift = config["scaling_factor"], config.get("shift_factor")
    if not is_number(scale) or scale <= 0:
        raise InputError(f"{origin} has scaling_factor {scale!r}; supported: a positive number")
    if shift is not None and not is_number(shift):
        raise InputError(f"{origin} has shift_factor {shift!r}; supported: a number")
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if (means is None) != (stds is None):
        one, other = ("latents_std", "latents_mean") if means is None else ("latents_mean", "latents_std")
        raise InputError(f"{origin} has {one} and no {other}; supported: both or neither")
    if shift and means is not None:
        raise InputError(f"{origin} has shift_factor and latents_mean; supported: one of them")
    for key, values, low in (("latents_mean", means, -math.inf), ("latents_std", stds, 0.0)):
        count = config["latent_channels"]
        is_list = values is None or (isinstance(values, list | tuple) and len(values) == count)
        if not is_list or not all(is_number(value) and value > low for value in values or ()):
            allowed = f"a list of {count} {'positive ' if low == 0 else ''}numbers, one for each of latent_channels"
            raise InputError(f"{origin} has {key} {values!r}; supported: {allowed}")
    if config["_class_name"] == "VQModel" and (shift or means is not None):
        key = "shift_factor" if shift else "latents_mean"
        raise InputError(f"{origin} has {key}, which VQModel does not have; supported: scaling_factor alone")


def image_shape(unet: Denoiser, autoencoder: Autoencoder | None) -> tuple[int, int, int]:
    """Channels, height and width of the generated images, after decoding."""
    return decoded_shape(sample_shape(unet), autoencoder)


def decoded_shape(samples: tuple[int, int, int], autoencoder: Autoencoder | None) -> tuple[int, int, int]:
    """Return channels, height and width of the images that samples are decoded to, from those of the samples."""
    channels, height, width = samples
    if autoencoder is None:
        return channels, height, width
    factor = autoencoder.downsampling
    return autoencoder.network.config["in_channels"], height * factor, width * factor
