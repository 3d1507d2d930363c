"""The autoencoder of a latent diffusion model: images <-> latents."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from numpy.typing import NDArray

from stages.models.checks import check_finite
from stages.models.families import Denoiser, sample_shape
from stages.models.layout import AUTOENCODERS, WEIGHTS
from stages.models.pipeline import rename_attention
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_json
from stages.storage.tensors import read_tensors

CLASSES: dict[str, type[Any]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class Autoencoder:
    """A frozen autoencoder in eval mode.

    Args:
        network: The diffusers model; its config gives the scaling factor of the latents.
    """

    def __init__(self, network: AutoencoderKL | VQModel) -> None:
        self.network: Any = network
        self.network.eval().requires_grad_(requires_grad=False)
        self.scale = float(self.network.config.get("scaling_factor") or 1.0)
        self.downsampling: int = 2 ** (len(self.network.config["block_out_channels"]) - 1)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
        """[N, C, H, W] uint8 -> scaled latents [N, c, h, w]; for AutoencoderKL the mode of the latent distribution."""
        images = torch.from_numpy(pixels.astype(np.float32)).to(self.network.device) / 127.5 - 1
        encoded = self.network.encode(images)
        latents = encoded.latent_dist.mode() if isinstance(self.network, AutoencoderKL) else encoded.latents
        return (latents * self.scale).half().cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, c, h, w] -> images [N, C, H, W], approximately in [-1, 1]."""
        images: torch.Tensor = self.network.decode(latents.float() / self.scale).sample
        return images


def read_autoencoder(folder: Path, device: torch.device) -> Autoencoder | None:
    """Load the autoencoder of a pipeline folder; None for a model in pixel space.

    Raises:
        InputError: The class is not supported, the files are damaged, or a weight is not finite.
    """
    component_folder = next((folder / name for name in AUTOENCODERS if (folder / name).is_dir()), None)
    if component_folder is None:
        return None
    config = read_json(component_folder / "config.json")
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        raise InputError(f"{component_folder} holds a {name}; supported: {', '.join(CLASSES)}")
    if name == "VQModel":  # these latents are not scaled, and configs of 2022 lack the key
        config = {"scaling_factor": 1.0, **config}
    tensors = read_tensors(component_folder / WEIGHTS)
    try:
        with torch.device("meta"):
            network = CLASSES[name].from_config(config)
        network.load_state_dict({rename_attention(key): tensor.float() for key, tensor in tensors.items()}, assign=True)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{component_folder}: the weights do not fit the config ({first_line(error)})") from None
    check_finite(network, component_folder)
    return Autoencoder(network.to(device))


def image_shape(unet: Denoiser, autoencoder: Autoencoder | None) -> tuple[int, int, int]:
    """Channels, height and width of the generated images, after decoding."""
    channels, height, width = sample_shape(unet)
    if autoencoder is None:
        return channels, height, width
    factor = autoencoder.downsampling
    return autoencoder.network.config["in_channels"], height * factor, width * factor
