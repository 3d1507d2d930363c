"""A diffusers folder, dense or pruned -> a UNet and its scheduler, with no pickle; and back.

Loading needs neither torch-pruning nor the pruning plan: the config gives the architecture, the tensors the widths.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.artifacts import read_json, read_tensors, write_json, write_tensors
from stages.errors import InputError, first_line

PLAN = "pruning_plan.json"
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULERS = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}
"""They share DDPM's noise schedule, which is all that is used of them."""
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def read_unet(folder: Path, device: torch.device = CPU) -> UNet2DModel:
    """Load a UNet, dense or pruned, exactly as it was written.

    Args:
        folder: A diffusers pipeline folder, with the UNet in unet/ or, as in the Hub's old layout, at its top.
        device: Where the UNet goes.

    Returns:
        The UNet in float32, in eval mode.

    Raises:
        InputError: The folder, its config or its weights are missing, damaged or do not fit each other.
    """
    home = component(folder, "unet")
    config = read_json(home / "config.json")
    check_supported(config, home / "config.json")
    unet = build_unet(config, read_tensors(home / WEIGHTS), str(home))
    return unet.to(device)  # type: ignore[arg-type,no-any-return]  # diffusers wraps away the types


def check_supported(config: Mapping[str, Any], origin: Path) -> None:
    """Refuse what this version cannot draw, train and prune.

    Raises:
        InputError: Another class of model, one with class labels, or one that does not predict ε alone.
    """
    if config.get("_class_name") != "UNet2DModel":
        raise InputError(f"{origin} describes a {config.get('_class_name')}; supported: UNet2DModel")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError(f"{origin} describes a class-conditional model; supported: unconditional ones")
    if config.get("in_channels") != config.get("out_channels"):
        sides = f"{config.get('in_channels')} channels to {config.get('out_channels')}"
        raise InputError(f"{origin} describes a model from {sides}; supported: as many out as in (no learned variance)")
    if type(config.get("sample_size")) is not int or config["sample_size"] < 1:
        raise InputError(
            f"{origin} has sample_size {config.get('sample_size')!r}; supported: one number, square images"
        )


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> UNet2DModel:
    """Build the architecture of `config` on the meta device, narrow it to the tensors' widths and adopt the tensors."""
    current = {rename_attention(name): tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            unet: UNet2DModel = UNet2DModel.from_config(dict(config))
        fit_widths(unet, {name: tensor.shape for name, tensor in current.items()})
        unet.load_state_dict({name: _to_float32(tensor) for name, tensor in current.items()}, assign=True)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{origin}: the weights do not fit the config ({last})") from None
    return unet.eval()


def rename_attention(name: str) -> str:
    """Give a parameter of attention its name of today; models of 2022 on the Hub have query, key, value, proj_attn."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for before, after in old.items():
        name = name.replace(before, after)
    return name


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def fit_widths(unet: UNet2DModel, shapes: Mapping[str, torch.Size]) -> None:
    """Give every layer of a UNet the widths of `shapes` (parameter name -> shape); new parameters are empty.

    Raises:
        KeyError: A layer has no shape.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            for kind, parameter in list(module.named_parameters(recurse=False)):
                shape = shapes[f"{name}.{kind}"]
                if shape != parameter.shape:
                    setattr(module, kind, nn.Parameter(torch.empty(shape, device=parameter.device)))
            _note_widths(module)
    note_block_widths(unet)


def _note_widths(layer: nn.Conv2d | nn.Linear | nn.GroupNorm) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        layer.num_channels = layer.weight.shape[0]


def note_block_widths(unet: UNet2DModel) -> None:
    """Make the widths that diffusers' blocks remember (and partly check in forward) those of their layers."""
    for module in unet.modules():
        if isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
        elif isinstance(module, Attention):
            module.inner_dim, module.query_dim = module.to_v.out_features, module.to_q.in_features


def read_scheduler(folder: Path) -> DDPMScheduler:
    """Load the noise schedule that the model was trained with.

    Raises:
        InputError: The scheduler's config is missing or damaged, or the model predicts something other than ε.
    """
    path = component(folder, "scheduler") / "scheduler_config.json"
    config = read_json(path)
    if config.get("_class_name") not in SCHEDULERS:
        raise InputError(f"{path} describes a {config.get('_class_name')}; supported: {', '.join(sorted(SCHEDULERS))}")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{path} has prediction_type {config['prediction_type']}; supported: epsilon")
    try:
        scheduler: DDPMScheduler = DDPMScheduler.from_config(config)
        usable = bool(scheduler.alphas_cumprod.isfinite().all()) and len(scheduler.alphas_cumprod) > 0
    except Exception as error:  # noqa: BLE001  # likewise
        raise InputError(f"{path} is no noise schedule ({first_line(error)})") from None
    if not usable:
        raise InputError(f"{path} is no noise schedule: no timesteps, or betas that are no numbers")
    return scheduler


def component(folder: Path, name: str) -> Path:
    """Find a component of a pipeline folder: its subfolder, or the folder itself where there is none.

    Raises:
        InputError: The folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist")
    return folder / name if (folder / name).is_dir() else folder


def write_pipeline(folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    """Write a UNet and its scheduler as a diffusers pipeline folder; the config stays that of the dense model."""
    write_json(folder / "model_index.json", PIPELINE)
    noise = {**_plain(scheduler.config), "_class_name": "DDPMScheduler"}
    write_json(folder / "scheduler" / "scheduler_config.json", noise)
    write_json(folder / "unet" / "config.json", {**_plain(unet.config), "_class_name": "UNet2DModel"})
    write_tensors(folder / "unet" / WEIGHTS, unet.state_dict(), metadata={"format": "pt"})


def copy_plan(source: Path, target: Path) -> None:
    """Hand the record of the kept channels on to a model with the same widths, where there is one."""
    if (source / PLAN).is_file():
        shutil.copyfile(source / PLAN, target / PLAN)


def check_images(unet: UNet2DModel, images: NDArray[np.uint8], origin: Path) -> None:
    """Refuse images that the model does not draw.

    Raises:
        InputError: The shapes differ.
    """
    channels, size = unet.config["in_channels"], unet.config["sample_size"]
    if images.shape[1:] != (channels, size, size):
        found = "×".join(str(length) for length in images.shape[1:])
        raise InputError(
            f"{origin} holds {found} images, the model draws {channels}×{size}×{size}; fetch both together"
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON sees it, without what diffusers notes for itself."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return {key: value for key, value in plain.items() if key in ("_class_name", "_diffusers_version") or key[0] != "_"}
