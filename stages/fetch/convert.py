"""A checkpoint of the code that a model was published with -> a diffusers folder."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.fetch.names import ddim_name, ldm_name
from stages.fetch.params import System
from stages.fetch.pickles import only_tensors, read_pickle
from stages.models.families import FAMILIES
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.runtime.errors import InputError
from stages.storage.files import read_json, temporary_folder, write_json
from stages.storage.tensors import write_tensors

SYSTEMS = Path(__file__).parent / "systems"
Config = Mapping[str, Any]

DDIM_NOISE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}
DDIM_STATES = ("model", "optimizer", "epoch", "step", "EMA")
"""What DDIM's training saves as a list; the last only where it averages."""

LDM_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
"""LDM calls it linear: √β is."""
VQ_F4 = {
    "_class_name": "VQModel",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "vq_embed_dim": 3,
}
"""The autoencoder of LDM-4, whose latents are not scaled."""
NUM_CLASSES = 1000
LEFT_OUT = (
    r"(log_|sqrt_|posterior_|alphas_)\w+|lvlb_weights|logvar"  # follow from betas, or weigh the loss
    r"|first_stage_model\.loss\..+"  # the discriminator and the perceptual net of its training
    r"|first_stage_model\.quantize\.(embedding\.)?(cluster_size|embed_avg)"  # averages, of the codebook
    r"|model_ema\.(decay|num_updates)"
)
"""Tensors of LDM that nothing is made of."""


class Checkpoint:
    """The tensors of a checkpoint, each of which must be taken or left out on purpose.

    Args:
        tensors: By their names there.
        origin: What a refusal is told of.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], origin: Path) -> None:
        self.tensors, self.origin = dict(tensors), origin

    def take(self, shapes: Mapping[str, torch.Size], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
        """Take the tensors of a network, in float32 and under its own names.

        Args:
            shapes: By these names; a 1×1 convolution there may be a linear layer here.
            rename: Gives the name there.

        Raises:
            InputError: One is missing or has another shape.
        """
        return {name: self._take(rename(name), shape).to(torch.float32, copy=True) for name, shape in shapes.items()}

    def _take(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name not in self.tensors:
            raise self.unfit(f"it lacks {name}")
        tensor = self.tensors.pop(name)
        if tensor.shape not in (shape, (*shape, 1, 1)):
            raise self.unfit(f"{name} is of shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor.reshape(shape)

    def check(self, name: str, expected: torch.Tensor) -> None:
        """Compare a tensor that says what is known already, where there is one.

        Raises:
            InputError: It says something else.
        """
        found = self.tensors.pop(name, expected)
        if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=0):
            raise self.unfit(f"its {name} are not those of the system")

    def leave_out(self, pattern: str) -> None:
        """Leave out the tensors whose whole name fits."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not re.fullmatch(pattern, name)}

    def close(self) -> None:
        """Make sure that nothing is left.

        Raises:
            InputError: A tensor is.
        """
        if self.tensors:
            raise self.unfit(f"{min(self.tensors)} belongs to no part of it")

    def unfit(self, why: str) -> InputError:
        """Say that the checkpoint is another one."""
        return InputError(f"{self.origin} is not that model: {why}; correct fetch.model.path, .layout or .system")


@contextmanager
def converted(path: Path, layout: str, system: str, place: Path) -> Iterator[Path]:
    """Give a diffusers folder made of a checkpoint, which lies in `place` for a while.

    Args:
        path: The checkpoint.
        layout: One of LAYOUTS.
        system: Name of a config in SYSTEMS.
        place: Where the folder is made.

    Raises:
        InputError: The checkpoint is missing, not whole, holds more than tensors, or is not of this system.
    """
    kind, convert = LAYOUTS[layout]
    config = read_json(SYSTEMS / f"{system}.json")
    if config["_class_name"] != kind:
        fitting = [it for it in get_args(System) if read_json(SYSTEMS / f"{it}.json")["_class_name"] == kind]
        raise InputError(f"fetch.model.system {system} has no layout {layout}, which is for {', '.join(fitting)}")
    with temporary_folder(path, place) as folder:
        convert(path, config, folder)
        yield folder


def convert_ddim(path: Path, config: Config, folder: Path) -> None:
    """Convert a UNet of DDIM: a state dict, or what its training saves, of which the average counts.

    Args:
        path: The checkpoint.
        config: Of the UNet2DModel that it holds.
        folder: Where the pipeline goes.

    Raises:
        InputError: It holds something else.
    """
    content = read_pickle(path)
    if isinstance(content, list):
        if len(content) not in (len(DDIM_STATES) - 1, len(DDIM_STATES)):
            raise InputError(f"{path} holds {len(content)} things, DDIM's training saves {', '.join(DDIM_STATES)}")
        content = content[-1] if len(content) == len(DDIM_STATES) else content[0]
    state = {name.removeprefix("module."): tensor for name, tensor in only_tensors(content, path).items()}
    checkpoint = Checkpoint(state, path)
    unet = checkpoint.take(shapes_of(config), lambda name: ddim_name(name, config))
    checkpoint.close()
    _write(folder / "unet", config, unet)
    _write_rest(folder, "DDPMPipeline", DDIM_NOISE, unet=config)


def convert_ldm(
    path: Path, config: Config, folder: Path, autoencoder: Config = VQ_F4, num_classes: int = NUM_CLASSES
) -> None:
    """Convert a class-conditional latent diffusion model with autoencoder and class embedding.

    Args:
        path: The checkpoint, as Lightning saves it.
        config: Of the UNet2DConditionModel that it holds; its averages count where there are some.
        folder: Where the pipeline goes.
        autoencoder: Config of its VQModel.
        num_classes: The embedding has one row more, of no class.

    Raises:
        InputError: It holds something else.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(f"{path} holds no state_dict; give the model.ckpt of a latent diffusion model")
    checkpoint = Checkpoint(only_tensors(content["state_dict"], path), path)
    noise = DDPMScheduler(**LDM_NOISE)
    checkpoint.check("betas", noise.betas)
    checkpoint.check("alphas_cumprod", noise.alphas_cumprod)
    checkpoint.check("scale_factor", torch.tensor(float(autoencoder["scaling_factor"])))
    checkpoint.leave_out(LEFT_OUT)
    unet = _take_ldm_unet(checkpoint, config)
    vqvae = checkpoint.take(shapes_of(autoencoder), lambda name: f"first_stage_model.{ddim_name(name, autoencoder)}")
    width = config["cross_attention_dim"]
    table = {"weight": torch.Size((num_classes + 1, width))}
    classes = checkpoint.take(table, lambda name: f"cond_stage_model.embedding.{name}")
    checkpoint.close()
    _write(folder / "unet", config, unet)
    _write(folder / "vqvae", autoencoder, vqvae)
    about = {"num_classes": num_classes, "width": width, "unconditional": num_classes}
    _write(folder / CLASS_EMBEDDING, about, classes)
    _write_rest(folder, "LDMPipeline", LDM_NOISE, unet=config, vqvae=autoencoder)


def _take_ldm_unet(checkpoint: Checkpoint, config: Config) -> dict[str, torch.Tensor]:
    """Take the averages, which LDM keeps under names without dots, or the weights where it keeps none."""
    shapes = shapes_of(config)
    names = {name: f"diffusion_model.{ldm_name(name, config)}" for name in shapes}
    if not any(name.startswith("model_ema.diffusion_model") for name in checkpoint.tensors):
        return checkpoint.take(shapes, lambda name: f"model.{names[name]}")
    checkpoint.leave_out("|".join(re.escape(f"model.{name}") for name in names.values()))
    return checkpoint.take(shapes, lambda name: "model_ema." + names[name].replace(".", ""))


LAYOUTS: dict[str, tuple[str, Callable[[Path, Config, Path], None]]] = {
    "ddim": ("UNet2DModel", convert_ddim),
    "ldm": ("UNet2DConditionModel", convert_ldm),
}


def shapes_of(config: Config) -> dict[str, torch.Size]:
    """List the tensors of a network of diffusers with their shapes, without making it."""
    dense: dict[str, Any] = {name: family.dense for name, family in FAMILIES.items()}
    with torch.device("meta"):
        network: nn.Module = {**dense, "VQModel": VQModel}[config["_class_name"]].from_config(dict(config))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _write(home: Path, config: Config, tensors: Mapping[str, torch.Tensor]) -> None:
    write_json(home / "config.json", config)
    write_tensors(home / WEIGHTS, tensors, metadata={"format": "pt"})


def _write_rest(folder: Path, pipeline: str, noise: Config, **components: Config) -> None:
    """Write the scheduler, and the index that names the components."""
    classes = {**{name: config["_class_name"] for name, config in components.items()}, "scheduler": "DDPMScheduler"}
    index = {name: ["diffusers", cls] for name, cls in classes.items()}
    write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon", **noise}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
