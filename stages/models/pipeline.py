"""A diffusers folder, dense or pruned -> a UNet and its scheduler, with no pickle; and back.

Loading needs neither torch-pruning nor the pruning plan: the config gives architecture and widths.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.data.images import Conditions
from stages.models import pruned_unet
from stages.models.families import FAMILIES, Denoiser, family_name
from stages.models.layout import CLASS_EMBEDDING, CODECS, PLAN, WEIGHTS
from stages.models.pruned_unet import PRUNED_KEYS, Layers
from stages.runtime.errors import InputError, first_line
from stages.storage.files import copy_file, read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors

CPU = torch.device("cpu")
SCHEDULERS = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}
"""They share DDPM's noise schedule, which is all that is used of them."""
CODE = Path(pruned_unet.__file__)
CLASSES = {cls.__name__: cls for family in FAMILIES.values() for cls in (family.dense, family.pruned)}
LATENT_PIPELINE = "LDMPipeline"
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def read_unet(folder: Path, device: torch.device = CPU) -> Denoiser:
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


def weights_file(folder: Path) -> Path:
    """Find the file that holds a UNet's weights."""
    return component(folder, "unet") / WEIGHTS


def check_supported(config: Mapping[str, Any], origin: Path) -> None:
    """Refuse what this version cannot draw, train and prune.

    Raises:
        InputError: Another class of model, one with class labels, or one that does not predict ε alone.
    """
    if str(config.get("_class_name")) not in CLASSES:
        found = f"{origin} describes a {config.get('_class_name')}"
        raise InputError(f"{found}; supported: {', '.join(FAMILIES)} (docs/models.md)")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError(f"{origin} describes a model with class labels; supported: none, or cross-attention")
    if config.get("addition_embed_type") or config.get("encoder_hid_dim_type"):
        raise InputError(f"{origin} describes a model with further conditions; supported: encoder_hidden_states alone")
    if config.get("in_channels") != config.get("out_channels"):
        sides = f"{config.get('in_channels')} channels to {config.get('out_channels')}"
        raise InputError(f"{origin} describes a model from {sides}; supported: as many out as in (no learned variance)")
    if type(config.get("cross_attention_dim", 1)) is not int:
        raise InputError(f"{origin} has cross_attention_dim {config['cross_attention_dim']!r}; supported: one number")
    if type(config.get("sample_size")) is not int or config["sample_size"] < 1:
        raise InputError(
            f"{origin} has sample_size {config.get('sample_size')!r}; supported: one number, square images"
        )


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> Denoiser:
    """Build the architecture of `config` on the meta device and adopt the tensors.

    Raises:
        InputError: The config is none, or the tensors do not fit it.
    """
    current = {rename_attention(name): tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            unet: Denoiser = CLASSES[config["_class_name"]].from_config(dict(config))
        unet.load_state_dict({name: _to_float32(tensor) for name, tensor in current.items()}, assign=True)
        check_heads(unet)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{origin}: the weights do not fit the config ({last})") from None
    broken = [name for name, tensor in unet.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{origin}: {broken[0]} holds values that are not finite; use another checkpoint")
    return unet.eval()


def check_heads(unet: Denoiser) -> None:
    """Make sure that each attention's width is divided by its number of heads, which no tensor shows.

    Raises:
        ValueError: It is not.
    """
    for name, module in unet.named_modules():
        heads = module.heads if isinstance(module, Attention) else 1
        if type(heads) is not int or heads < 1 or (heads > 1 and module.to_q.out_features % heads):
            raise ValueError(f"{name} cannot have {heads} heads")


def rename_attention(name: str) -> str:
    """Give a parameter of attention its name of today; models of 2022 on the Hub have query, key, value, proj_attn."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for before, after in old.items():
        name = name.replace(before, after)
    return name


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Copy into memory of its own: tensors of a mapped file lie unaligned, where kernels may round otherwise."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def dense_config(unet: Denoiser) -> dict[str, Any]:
    """The config of the dense model that a UNet, pruned or not, comes from."""
    plain = {key: value for key, value in _plain(unet.config).items() if key not in (*PRUNED_KEYS, "auto_map")}
    return {**plain, "_class_name": family_name(unet)}


def describe(unet: Denoiser) -> dict[str, Any]:
    """Write the config of a UNet of any widths; a dense one's is as diffusers writes it."""
    config = dense_config(unet)
    family = FAMILIES[config["_class_name"]]
    with torch.device("meta"):
        dense = family.dense.from_config(dict(config))
    widths, heads = {}, {}
    for name, module in dense.named_modules():
        now = unet.get_submodule(name)
        if isinstance(module, Layers) and now.weight is not None and now.weight.shape != module.weight.shape:
            widths[name] = list(cast("torch.Tensor", now.weight).shape[:2])
        elif isinstance(module, Attention) and now.heads != module.heads:
            heads[name] = now.heads
    if not widths:
        return config
    name = family.pruned.__name__
    custom = {"_class_name": name, "auto_map": {"AutoModel": f"{CODE.stem}.{name}"}}
    return {**config, **custom, "pruned_widths": widths, "pruned_heads": heads}


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


def write_pipeline(folder: Path, unet: Denoiser, scheduler: DDPMScheduler, source: Path | None = None) -> None:
    """Write a UNet and its scheduler as a diffusers pipeline folder.

    A pruned UNet takes the file that defines its class along, so that plain diffusers opens it with
    `trust_remote_code=True`.

    Args:
        folder: Where to.
        unet: A UNet of any widths.
        scheduler: The noise schedule.
        source: The pipeline that the UNet comes from; its other components, such as a decoder, are taken along.
    """
    config = describe(unet)
    module = CODE.stem if "pruned_widths" in config else "diffusers"
    index = {**PIPELINE, **_copy_others(source, folder), "unet": [module, config["_class_name"]]}
    write_json(folder / "model_index.json", index)
    noise = {**_plain(scheduler.config), "_class_name": "DDPMScheduler"}
    write_json(folder / "scheduler" / "scheduler_config.json", noise)
    write_json(folder / "unet" / "config.json", config)
    write_tensors(folder / "unet" / WEIGHTS, unet.state_dict(), metadata={"format": "pt"})
    if module == CODE.stem:
        copy_file(CODE, folder / "unet" / CODE.name)


def _copy_others(source: Path | None, folder: Path) -> dict[str, Any]:
    """Copy the JSON and safetensors of what a pipeline has beside UNet and scheduler: the index entries that name it.

    Raises:
        InputError: A component is missing or cannot be copied.
    """
    path = source / "model_index.json" if source else None
    index = read_json(path) if path and path.is_file() else {}
    others = {name: entry for name, entry in index.items() if isinstance(entry, list) and name not in PIPELINE}
    others = {name: entry for name, entry in others.items() if any(entry)}  # [null, null] is none
    for name in CODECS:
        if source and name not in others and (source / name).is_dir():
            others[name] = ["diffusers", read_json(source / name / "config.json").get("_class_name")]
            index["_class_name"] = LATENT_PIPELINE
    unlisted = [CLASS_EMBEDDING] if source and (source / CLASS_EMBEDDING).is_dir() else []  # no class of diffusers
    for name in [*others, *unlisted]:
        if not (name.isidentifier() and source and (source / name).is_dir()):
            raise InputError(f"{path} names a component {name!r}, which is no folder beside it; complete the pipeline")
        for file in sorted(file for suffix in ("json", "safetensors") for file in (source / name).glob(f"*.{suffix}")):
            copy_file(file, folder / name / file.name)
    return {**others, "_class_name": index.get("_class_name", "DiffusionPipeline")} if others else {}


def copy_plan(source: Path, target: Path) -> None:
    """Hand the record of the kept channels on to a model with the same widths, where there is one."""
    if (source / PLAN).is_file():
        copy_file(source / PLAN, target / PLAN)


def check_conditions(unet: Denoiser, conditions: Conditions | None, origin: Path) -> None:
    """Make sure that a conditional model has conditions of its width, and no other has any.

    Raises:
        InputError: It is not so.
    """
    width = unet.config["cross_attention_dim"] if isinstance(unet, UNet2DConditionModel) else None
    found = conditions.table.shape[-1] if conditions else None
    if width != found:
        needed = f"conditions of width {width}" if width else "no conditions"
        given = f"those of width {found}" if found else "none"
        raise InputError(f"the model takes {needed}, {origin} has {given}; fetch model and data together")


def check_images(images: NDArray[Any], shape: tuple[int, int, int], origin: Path) -> None:
    """Refuse images, or latents, that the model does not draw.

    Raises:
        InputError: The shapes differ.
    """
    if images.shape[1:] != shape:
        found, expected = ("×".join(str(length) for length in lengths) for lengths in (images.shape[1:], shape))
        raise InputError(f"{origin} holds {found} images, the model draws {expected}; fetch both together")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON sees it, without what diffusers notes for itself."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return {key: value for key, value in plain.items() if key in ("_class_name", "_diffusers_version") or key[0] != "_"}
