"""The autoencoder of a latent diffusion model: pixels <-> the latents that its UNet draws."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from numpy.typing import NDArray

from stages.models.families import Denoiser, sample_shape
from stages.models.layout import CODECS, WEIGHTS
from stages.models.pipeline import rename_attention
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_json
from stages.storage.tensors import read_tensors

CLASSES: dict[str, type[Any]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class Codec:
    """An autoencoder in eval mode, whose weights never change here.

    Args:
        network: Of diffusers; its config tells by what its latents are scaled.
    """

    def __init__(self, network: AutoencoderKL | VQModel) -> None:
        self.network: Any = network
        self.network.eval().requires_grad_(requires_grad=False)
        self.scale = float(self.network.config.get("scaling_factor") or 1.0)
        self.factor: int = 2 ** (len(self.network.config["block_out_channels"]) - 1)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
        """[N, C, H, W] uint8 -> the latents [N, c, h, w] that the UNet was trained on; of a distribution its mode."""
        images = torch.from_numpy(pixels.astype(np.float32)).to(self.network.device) / 127.5 - 1
        found = self.network.encode(images)
        latents = found.latent_dist.mode() if isinstance(self.network, AutoencoderKL) else found.latents
        return (latents * self.scale).half().cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, c, h, w] -> images [N, C, H, W], about in [-1, 1]."""
        images: torch.Tensor = self.network.decode(latents.float() / self.scale).sample
        return images


def read_codec(folder: Path, device: torch.device) -> Codec | None:
    """Load the autoencoder of a pipeline; None where a model draws pixels.

    Raises:
        InputError: It is of a class that is not known here, damaged, or holds values that are not finite.
    """
    homes = [folder / name for name in CODECS if (folder / name).is_dir()]
    if not homes:
        return None
    config = read_json(homes[0] / "config.json")
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        raise InputError(f"{homes[0]} holds a {name}; supported: {', '.join(CLASSES)}")
    if name == "VQModel":  # those of latent diffusion are not scaled, and configs of 2022 do not say so
        config = {"scaling_factor": 1.0, **config}
    tensors = read_tensors(homes[0] / WEIGHTS)
    try:
        with torch.device("meta"):
            network = CLASSES[name].from_config(config)
        network.load_state_dict({rename_attention(key): tensor.float() for key, tensor in tensors.items()}, assign=True)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{homes[0]}: the weights do not fit the config ({first_line(error)})") from None
    if broken := [key for key, tensor in network.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"{homes[0]}: {broken[0]} holds values that are not finite; use another autoencoder")
    return Codec(network.to(device))


def picture_shape(unet: Denoiser, codec: Codec | None) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a model draws, decoded where it draws latents."""
    channels, height, width = sample_shape(unet)
    if codec is None:
        return channels, height, width
    return codec.network.config["in_channels"], height * codec.factor, width * codec.factor
