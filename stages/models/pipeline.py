"""A diffusers pipeline folder, dense or pruned <-> a denoiser and its noise schedule, without pickle.

Loading needs neither torch-pruning nor the pruning plan: the config gives architecture and widths.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.models.checks import check_built, check_finite, check_heads, check_layers, check_supported
from stages.models.families import (
    AUTOENCODER_CLASSES,
    CLASSES,
    Denoiser,
    config_defaults,
    family_of,
    find_family,
)
from stages.models.families.family import META_KEYS, plain_config
from stages.models.layout import AUTOENCODERS, CLASS_EMBEDDING, PLAN, WEIGHTS, denoiser_name
from stages.models.own_code import initialise_own, is_own
from stages.models.prediction_types import PREDICTION_TYPES
from stages.models.pruned_unet import REMOVED_KEY, Layers
from stages.models.schedules import make_schedule
from stages.models.shortcuts import bypass, bypassed
from stages.runtime.errors import InputError, without_password
from stages.storage.files import copy_file, read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors

CPU = torch.device("cpu")
EMBEDDING_KEYS = ("num_classes", "width", "unconditional")
"""Keys of a class embedding's config."""
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Parameter names of attention in models of 2022 on the Hub -> current names."""


def read_unet(folder: Path, device: torch.device = CPU) -> Denoiser:
    """Load a denoiser, dense or pruned, exactly as it was written.

    Args:
        folder: A diffusers pipeline folder: unet/ or transformer/ in it or, in the Hub's old layout, its top.
        device: Device of the loaded denoiser.

    Returns:
        The denoiser in float32, in eval mode.

    Raises:
        InputError: The folder, its config or its weights are missing, damaged or do not fit each other.
    """
    unet_folder = denoiser_folder(folder)
    config = read_json(unet_folder / "config.json")
    if is_own(config, unet_folder):
        unet = build_own(config, read_tensors(unet_folder / WEIGHTS), unet_folder)
    else:
        check_supported(config, unet_folder / "config.json")
        unet = build_unet(config, read_tensors(unet_folder / WEIGHTS), str(unet_folder))
    return unet.to(device)  # type: ignore[arg-type,no-any-return]  # diffusers wraps away the types


def build_own(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> Denoiser:
    """Build a model by the code in its folder, if that is trusted, and load the tensors into it.

    Raises:
        InputError: The code is not trusted or fails, or the tensors do not fit or are not finite.
    """
    unet, origin = initialise_own(config, folder), str(folder)
    check_names(tensors, unet, origin)
    try:
        unet.load_state_dict({name: _to_float32(tensor) for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{origin}: the weights do not fit the config ({last_line(error)})") from None
    check_finite(unet, origin)
    return unet.eval()


def weights_file(folder: Path) -> Path:
    """Return the path of the denoiser's weights in a pipeline folder."""
    return denoiser_folder(folder) / WEIGHTS


def denoiser_folder(folder: Path) -> Path:
    """Return the folder of the model in a pipeline folder, named as its family does, or that folder itself.

    Raises:
        InputError: The pipeline folder does not exist, or is a file.
    """
    return component(folder, denoiser_name(folder))


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> Denoiser:
    """Build the architecture of `config` on the meta device and assign the tensors to it.

    Raises:
        InputError: The config is invalid, the tensors do not fit it, or a tensor is not finite.
    """
    current = {rename_attention(name): tensor for name, tensor in tensors.items()}
    family = find_family(config)
    check_layers(config, family.layer_counts if family else (), len(current), origin)
    try:
        with torch.device("meta"):
            unet: Denoiser = CLASSES[config["_class_name"]].from_config(dict(config))
        check_names(current, unet, origin)
        unet.load_state_dict({name: _to_float32(tensor) for name, tensor in current.items()}, assign=True)
        family_of(unet).prepare(unet)
        check_built(unet)
        check_heads(unet)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{origin}: the weights do not fit the config ({last_line(error)})") from None
    check_finite(unet, origin)
    return unet.eval()


def check_names(tensors: Mapping[str, torch.Tensor], network: torch.nn.Module, origin: str | Path) -> None:
    """Check that the weights have the names of the network, since PyTorch's own message lists all of them.

    Raises:
        InputError: A name is missing or unexpected; the first of each is named, and a prefix of all.
    """
    expected = network.state_dict().keys()
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if not missing and not unexpected:
        return
    kinds = {"missing": missing, "unexpected": unexpected}
    found = "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds.items() if names)
    prefixes = [name.removesuffix(missing[0]) for name in unexpected if missing and name.endswith(f".{missing[0]}")]
    advice = f"; remove the prefix {prefixes[0]} from every name" if prefixes else "; use the weights of this config"
    raise InputError(f"{origin}: the weights do not fit the config ({found}){advice}")


def last_line(error: BaseException) -> str:
    """Return the line of PyTorch's message that says what differs; the error's type where it has no message."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())


def rename_attention(name: str) -> str:
    """Replace the attention names of 2022 in a parameter's name by the current ones."""
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Copy into new memory: tensors of a mapped file are not aligned, and kernels may round differently there."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def unet_config(unet: Denoiser) -> dict[str, Any]:
    """Return the config of a denoiser of any widths and depth; a dense one's is as diffusers writes it."""
    family = family_of(unet)
    config = family.dense_config(unet)
    with torch.device("meta"):
        dense = family.build_dense(unet)
    removed = bypassed(unet)
    bypass(dense, removed)
    widths, before = {}, family.heads(dense)
    heads = {name: number for name, number in family.heads(unet).items() if number != before[name]}
    for name, module in dense.named_modules():
        current = unet.get_submodule(name)
        if isinstance(module, Layers) and current.weight is not None and current.weight.shape != module.weight.shape:
            widths[name] = list(cast("torch.Tensor", current.weight).shape[:2])
    if not widths and not removed:
        return config
    name = family.pruned_name
    custom = {"_class_name": name, "auto_map": {"AutoModel": f"{family.module}.{name}"}}
    shallower = {REMOVED_KEY: removed} if removed else {}
    return {**config, **custom, "pruned_widths": widths, "pruned_heads": heads, **shallower}


def read_scheduler(folder: Path) -> DDPMScheduler:
    """Load the noise schedule that the model was trained with.

    Raises:
        InputError: The scheduler's config is missing, damaged or not supported.
    """
    path = component(folder, "scheduler") / "scheduler_config.json"
    config = read_json(path)
    if (predicted := config.get("prediction_type", "epsilon")) not in list(PREDICTION_TYPES):  # a list cannot be a key
        raise InputError(f"{path} has prediction_type {predicted}; supported: {', '.join(PREDICTION_TYPES)}")
    return make_schedule(config, path)


def component(folder: Path, name: str) -> Path:
    """Return a component's subfolder of a pipeline folder, or the folder itself if it has no such subfolder.

    Raises:
        InputError: The folder does not exist, or is a file.
    """
    if not folder.is_dir():
        found = "is a file; give the folder of the pipeline" if folder.exists() else "does not exist; correct its path"
        raise InputError(f"model folder {folder} {found}")
    return folder / name if (folder / name).is_dir() else folder


def write_pipeline(folder: Path, unet: Denoiser, scheduler: DDPMScheduler, source: Path | None = None) -> None:
    """Write a denoiser and its scheduler as a diffusers pipeline folder.

    With a pruned denoiser goes the file that defines its class, so that plain diffusers can load it with
    `trust_remote_code=True`.

    Args:
        folder: The new pipeline folder.
        unet: A denoiser of any widths.
        scheduler: The noise schedule.
        source: The pipeline folder that the denoiser was made from; its autoencoder and class embedding are copied.

    Raises:
        InputError: A component of `source` is missing or cannot be copied, or the folder cannot be written.
    """
    config, family = unet_config(unet), family_of(unet)
    module = family.module if "auto_map" in config else "diffusers"
    copied = _copy_components(source, folder, family.autoencoder)
    parts = {family.component: [module, config["_class_name"]], "scheduler": ["diffusers", "DDPMScheduler"], **copied}
    write_json(folder / "model_index.json", {"_class_name": family.pipelines[bool(copied)], **parts})
    scheduler_config = {**plain_config(scheduler.config), "_class_name": "DDPMScheduler"}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    write_json(folder / family.component / "config.json", config)
    write_tensors(folder / family.component / WEIGHTS, unet.state_dict(), metadata={"format": "pt"})
    if module == family.module:
        family.write_code(unet, folder / family.component)


def autoencoder_folder(folder: Path) -> Path | None:
    """Return the folder of a pipeline's autoencoder; None for a model in pixel space."""
    return next((folder / name for name in AUTOENCODERS if (folder / name).is_dir()), None)


def _copy_components(source: Path | None, folder: Path, name: str) -> dict[str, Any]:
    """Copy the autoencoder, under the name of a component, and the class embedding: known keys of configs, and weights.

    Names of classes and modules come from a list and never from the JSON, since diffusers would import them.

    Returns:
        The entries of model_index.json for the autoencoder.

    Raises:
        InputError: model_index.json lists an autoencoder that is missing, or a file cannot be copied.
    """
    if source is None:
        return {}
    _check_listed(source)
    if (source / CLASS_EMBEDDING).is_dir():  # not a class of diffusers
        _copy_component(source / CLASS_EMBEDDING, folder / CLASS_EMBEDDING, EMBEDDING_KEYS)
    autoencoder = autoencoder_folder(source)
    if autoencoder is None:
        return {}
    kind = str(read_json(autoencoder / "config.json").get("_class_name"))
    if kind not in AUTOENCODER_CLASSES:
        raise InputError(f"{autoencoder} holds a {kind}; supported: {', '.join(AUTOENCODER_CLASSES)}")
    known = (*META_KEYS, *config_defaults(AUTOENCODER_CLASSES[kind]))
    _copy_component(autoencoder, folder / name, known)
    return {name: ["diffusers", kind]}


def _check_listed(source: Path) -> None:
    """Check that the autoencoder that model_index.json lists exists; [null, null] marks an absent component."""
    path = source / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    for name in AUTOENCODERS:
        is_listed = isinstance(index.get(name), list) and any(index[name])
        if is_listed and not (source / name).is_dir():
            raise InputError(f"{path} lists a component {name!r} without a folder of that name; complete the pipeline")


def _copy_component(source: Path, target: Path, known: Collection[str]) -> None:
    config = with_latent_scale(read_json(source / "config.json"))
    write_json(target / "config.json", {key: value for key, value in config.items() if key in known})
    if source.name != CLASS_EMBEDDING or (source / WEIGHTS).is_file():  # else the model embeds its classes itself
        copy_file(source / WEIGHTS, target / WEIGHTS)


def with_latent_scale(config: dict[str, Any]) -> dict[str, Any]:
    """Give a VQModel without a scaling factor that of 1: diffusers would divide its latents by Stable Diffusion's."""
    is_unscaled = config.get("_class_name") == "VQModel" and config.get("scaling_factor") is None
    return {**config, "scaling_factor": 1.0} if is_unscaled else config  # configs of 2022 lack the key


def copy_plan(source: Path, target: Path) -> None:
    """Copy the pruning plan, if there is one, to the folder of a model with the same widths."""
    if (source / PLAN).is_file():
        copy_file(source / PLAN, target / PLAN)
