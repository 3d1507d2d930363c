"""A checkpoint in the format of the code that the model was published with -> a diffusers folder."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.fetch.convert_dit import add_autoencoder, convert_dit
from stages.fetch.names import ddim_name, ldm_name
from stages.fetch.params import CheckpointModel, System
from stages.fetch.pickles import check_state_dict, read_pickle
from stages.fetch.source_checkpoint import SourceCheckpoint, choose_ema, tensor_shapes, write_component, write_index
from stages.models.layout import CLASS_EMBEDDING
from stages.runtime.errors import InputError
from stages.runtime.paths import expand_path
from stages.storage.files import read_json, temporary_folder

SYSTEMS = Path(__file__).parent / "systems"
Config = Mapping[str, Any]

DDIM_NOISE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
"""DDIM's code clips in DDPM's steps alone (`ddpm_steps`), not in its own (`generalized_steps`)."""
DDIM_STATES = ("model", "optimizer", "epoch", "step", "EMA")
"""Items of the list that DDIM's training saves; the last one only if it keeps an EMA."""

LDM_NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""√β is linear, which LDM calls "linear" and diffusers "scaled_linear". LDM's DDIM never clips latents, draws at the
timesteps 1, 1 + c, 1 + 2c, … and ends at ᾱ_0 instead of 1."""
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
"""Config of LDM-4's autoencoder; its latents are not scaled."""
NUM_CLASSES = 1000
UNUSED_LDM_TENSORS = (
    r"(log_|sqrt_|posterior_|alphas_)\w+|lvlb_weights|logvar"  # follow from the betas, or weight the loss
    r"|first_stage_model\.loss\..+"  # discriminator and perceptual network of the autoencoder's training
    r"|first_stage_model\.quantize\.(embedding\.)?(cluster_size|embed_avg)"  # running means of the codebook
    r"|model_ema\.(decay|num_updates)"
)
"""Regular expression of the names of LDM tensors that the pipeline does not need."""


@contextmanager
def converted(path: Path, source: CheckpointModel, place: Path) -> Iterator[Path]:
    """Convert a checkpoint into a temporary diffusers folder.

    Args:
        path: The checkpoint.
        source: Its layout, the system that it must hold, and which of its weights are taken.
        place: Existing folder in which the temporary folder is created.

    Raises:
        InputError: The checkpoint is missing, damaged, holds more than tensors, or does not hold this system.
    """
    config, (_, convert) = check_layout(source), LAYOUTS[source.layout]
    with temporary_folder(path, place) as folder:
        convert(path, config, folder, source.ema)
        if source.autoencoder is not None:
            add_autoencoder(
                expand_path(source.autoencoder, "fetch.model.autoencoder"), folder, source.autoencoder_sha256
            )
        yield folder


def check_layout(source: CheckpointModel) -> Config:
    """Check that a system has the layout that is asked for, and return its config.

    Raises:
        InputError: It has not; the message names those that have.
    """
    layout, system = source.layout, source.system
    class_name, config = LAYOUTS[layout][0], read_json(SYSTEMS / f"{system}.json")
    if config["_class_name"] != class_name:
        fitting = [it for it in get_args(System) if read_json(SYSTEMS / f"{it}.json")["_class_name"] == class_name]
        raise InputError(f"fetch.model.system {system} has no layout {layout}; systems with it: {', '.join(fitting)}")
    return config


def convert_ddim(path: Path, config: Config, folder: Path, ema: bool | None = None) -> None:  # noqa: FBT001  # LAYOUTS
    """Convert a UNet of DDIM: a state dict, or the list that its training saves.

    Args:
        path: The checkpoint.
        config: Config of the UNet2DModel that it holds.
        folder: Where the pipeline is written.
        ema: Whether to take the EMA weights of a list; None takes them if there are any.

    Raises:
        InputError: The checkpoint holds something else.
    """
    content = read_pickle(path)
    if isinstance(content, list):
        if len(content) not in (len(DDIM_STATES) - 1, len(DDIM_STATES)):
            raise InputError(f"{path} is a list of {len(content)}; DDIM's training saves {', '.join(DDIM_STATES)}")
        sets = {False: content[0]} | ({True: content[-1]} if len(content) == len(DDIM_STATES) else {})
    else:
        sets = {False: content}
    states = {is_ema: check_state_dict(state, path) for is_ema, state in sets.items()}
    chosen = states[choose_ema(path, states, ema, by_default=True)]
    state = {name.removeprefix("module."): tensor for name, tensor in chosen.items()}
    checkpoint = SourceCheckpoint(state, path)
    unet = checkpoint.take(tensor_shapes(config), lambda name: ddim_name(name, config))
    checkpoint.check_empty()
    write_component(folder / "unet", config, unet)
    write_index(folder, "DDPMPipeline", DDIM_NOISE, unet=config)


def convert_ldm(
    path: Path,
    config: Config,
    folder: Path,
    ema: bool | None = None,  # noqa: FBT001
    autoencoder: Config = VQ_F4,
    num_classes: int = NUM_CLASSES,
) -> None:
    """Convert a class-conditional latent diffusion model with its autoencoder and class embedding.

    Args:
        path: The checkpoint that Lightning saved.
        config: Config of the UNet2DConditionModel that it holds.
        folder: Where the pipeline is written.
        ema: Whether to take its EMA weights; None takes the others, as the authors' config says (use_ema false).
        autoencoder: Config of its VQModel.
        num_classes: Classes without the unconditional one, which is the last row of the embedding.

    Raises:
        InputError: The checkpoint holds something else.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(f"{path} holds no state_dict; give the model.ckpt of a latent diffusion model")
    checkpoint = SourceCheckpoint(check_state_dict(content["state_dict"], path), path)
    _check_ldm_values(checkpoint, autoencoder)
    unet = _take_ldm_unet(checkpoint, config, ema)
    vqvae = checkpoint.take(
        tensor_shapes(autoencoder), lambda name: f"first_stage_model.{ddim_name(name, autoencoder)}"
    )
    width = config["cross_attention_dim"]
    shapes = {"weight": torch.Size((num_classes + 1, width))}
    classes = checkpoint.take(shapes, lambda name: f"cond_stage_model.embedding.{name}")
    checkpoint.check_empty()
    write_component(folder / "unet", config, unet)
    write_component(folder / "vqvae", autoencoder, vqvae)
    embedding = {"num_classes": num_classes, "width": width, "unconditional": num_classes}
    write_component(folder / CLASS_EMBEDDING, embedding, classes)
    write_index(folder, "LDMPipeline", LDM_NOISE, unet=config, vqvae=autoencoder)


def _check_ldm_values(checkpoint: SourceCheckpoint, autoencoder: Config) -> None:
    """Compare noise schedule and scale of the latents with those of the system, and drop the tensors not needed."""
    noise = DDPMScheduler.from_config(LDM_NOISE)
    checkpoint.check("betas", noise.betas)
    checkpoint.check("alphas_cumprod", noise.alphas_cumprod)
    checkpoint.check("scale_factor", torch.tensor(float(autoencoder["scaling_factor"])))
    checkpoint.drop(UNUSED_LDM_TENSORS)


def _take_ldm_unet(checkpoint: SourceCheckpoint, config: Config, ema: bool | None) -> dict[str, torch.Tensor]:  # noqa: FBT001
    """Take the weights or their EMA, which LDM stores under names without dots, and drop the other."""
    shapes = tensor_shapes(config)
    names = {name: f"diffusion_model.{ldm_name(name, config)}" for name in shapes}
    sets = {
        False: {name: f"model.{dotted}" for name, dotted in names.items()},
        True: {name: "model_ema." + dotted.replace(".", "") for name, dotted in names.items()},
    }
    held = {key: names for key, names in sets.items() if not checkpoint.tensors.keys().isdisjoint(names.values())}
    chosen = choose_ema(checkpoint.origin, held or sets, ema, by_default=False)
    checkpoint.drop("|".join(re.escape(name) for name in sets[not chosen].values()))
    return checkpoint.take(shapes, lambda name: sets[chosen][name])


LAYOUTS: dict[str, tuple[str, Callable[[Path, Config, Path, bool | None], None]]] = {
    "ddim": ("UNet2DModel", convert_ddim),
    "ldm": ("UNet2DConditionModel", convert_ldm),
    "dit": ("DiTTransformer2DModel", convert_dit),
}
"""fetch.model.layout -> the class of its model in diffusers, and the converter: (checkpoint, config, folder, ema)."""
