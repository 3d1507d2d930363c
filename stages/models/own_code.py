"""The folder of a model whose class diffusers does not have -> the model, built by the code in the folder."""

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from stages.models.families import Denoiser, config_shape, find_family
from stages.models.families.description import Description
from stages.models.families.family import check_sample_size
from stages.models.families.own import construct
from stages.models.layout import CODE, DESCRIPTION
from stages.models.pruned_own import CLASS_NAME, KEYS, RESERVED, accepted, all_attentions, attentions, make_class
from stages.models.trust import check_trust
from stages.runtime.bounded import MAX_JSON_BYTES, read_bounded
from stages.runtime.errors import InputError, first_line, refusing_code
from stages.runtime.schema import validate_tree
from stages.storage.files import read_json

MAX_BYTES = 1 << 20
"""Largest size of the file with the class."""
CONFIG = "config.json"
Fused = (nn.Linear, nn.Conv2d)
_classes: dict[str, Any] = {}
"""Hash of code and description -> the class, so that teacher and student have the same one."""


def is_own(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model folder brings the code of its class; that of a class of diffusers is never used."""
    return config.get("_class_name") == CLASS_NAME or (find_family(config) is None and (folder / CODE).is_file())


def read_own_files(folder: Path) -> dict[str, bytes]:
    """Read the files of an own class beside its weights, by name: the class, its description if any, its config.

    A folder with a class of diffusers has none.

    Raises:
        InputError: One is larger than its limit, or the config is missing or damaged.
    """
    if not is_own(read_json(folder / CONFIG), folder):
        return {}
    limits = {CODE: MAX_BYTES, DESCRIPTION: MAX_JSON_BYTES, CONFIG: MAX_JSON_BYTES}
    return {name: read_bounded(folder / name, limit) for name, limit in limits.items() if (folder / name).is_file()}


def initialise_own(config: Mapping[str, Any], folder: Path) -> Denoiser:
    """Run the code in a model folder, if that is trusted, and build the model with weights of its default init.

    Raises:
        InputError: The code is not trusted or fails, or does not do what its description says.
    """
    path, origin = folder / CODE, folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path} does not exist; put the class {config.get('denoiser_class')} there")
    config, description = _complete(config, folder)
    name, content = config["denoiser_class"], read_bounded(path, MAX_BYTES)
    check_trust(path, content)
    cls = _load_class(path, content, name, description)
    _check_config(cls.espalier_code, config, origin)
    _check_forward(cls.espalier_code, description, path)
    model = construct(cls, config, path)
    _check_description(model, description, folder)
    return model


def _complete(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Description]:
    """Add the description and the name of the class to a config, where it has none yet.

    Raises:
        InputError: The description is missing or not valid, or the config lacks the size of the samples.
    """
    origin = folder / CONFIG
    if config.get("_class_name") == CLASS_NAME:
        description = validate_tree(config.get("description"), Description, f"{origin}, description")
        return dict(config), description
    place = folder / DESCRIPTION
    if not place.is_file():
        raise InputError(
            f"{place} does not exist; describe what the class takes and returns (docs/how-to/own-class.md)"
        )
    description = validate_tree(read_json(place), Description, str(place))
    own = {"denoiser_class": config.get("_class_name"), "description": description.model_dump(mode="json")}
    return {**config, **own}, description


def read_sample_shape(config: Mapping[str, Any], origin: Path) -> tuple[int, int, int]:
    """Read channels, height and width of the samples from a config.

    Raises:
        InputError: One is missing, or is no positive integer.
    """
    check_sample_size(config, origin)
    if type(config.get("in_channels")) is not int or config["in_channels"] < 1:
        found = f"{origin} has in_channels {config.get('in_channels')!r}"
        raise InputError(f"{found}; supported: the number of channels of the samples")
    return config_shape(config)


def _check_config(code: type[nn.Module], config: Mapping[str, Any], origin: Path) -> None:
    """Check that a config says how large samples are, and that the constructor takes all other keys.

    Raises:
        InputError: It does not.
    """
    read_sample_shape(config, origin)
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in KEYS}
    try:
        inspect.signature(code).bind(**accepted(code, settings))
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(code).parameters)) or "nothing"
        raise InputError(f"{origin}: {code.__name__} takes {takes} ({first_line(error)}); correct its keys") from None


def _load_class(path: Path, content: bytes, name: object, description: Description) -> Any:  # noqa: ANN401
    """Run the file of a class, once for each content, and derive the class that Espalier uses."""
    told = json.dumps([name, description.model_dump(mode="json")], sort_keys=True).encode()
    sha256 = hashlib.sha256(hashlib.sha256(content).digest() + told).hexdigest()
    if sha256 not in _classes:
        module = _run(path, content, f"espalier_denoiser_{sha256[:16]}")
        code = vars(module).get(str(name))
        if not (isinstance(code, type) and issubclass(code, nn.Module)):
            there = [
                key for key, it in vars(module).items() if isinstance(it, type) and it.__module__ == module.__name__
            ]
            found = f"{path} has no class {name}, the _class_name of config.json"
            raise InputError(f"{found}, that is a torch.nn.Module; it has {', '.join(there) or 'none'}")
        if taken := [(base.__name__, key) for base in _own_bases(code) for key in RESERVED if key in vars(base)]:
            raise InputError(f"{path}: {taken[0][0]} defines {taken[0][1]}, a name that diffusers needs; rename it")
        cls = make_class(code)
        cls.espalier_code_text, cls.espalier_code_sha256 = content, sha256
        _classes[sha256] = cls
    return _classes[sha256]


def _own_bases(code: type[nn.Module]) -> list[type]:
    """List a class and its bases without those of PyTorch, diffusers and Python."""
    return [
        base for base in code.__mro__ if base.__module__.partition(".")[0] not in ("torch", "diffusers", "builtins")
    ]


def _run(path: Path, content: bytes, name: str) -> ModuleType:
    """Run a Python file as a module of its own; nothing is written beside it, and no path is searched.

    Raises:
        InputError: It raises an exception.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        with refusing_code(str(path)):
            exec(compile(content, str(path), "exec"), vars(module))  # noqa: S102  # the user trusts it: check_trust
    except InputError:
        del sys.modules[name]
        raise
    return module


def _check_forward(code: type[nn.Module], description: Description, path: Path) -> None:
    """Check that forward has the described arguments, and needs no others.

    Raises:
        InputError: It has not.
    """
    inputs = description.inputs.model_dump(exclude_none=True)
    signature = inspect.signature(code.forward)
    try:
        signature.bind(None, **dict.fromkeys(inputs.values()))
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[1:])
        told = ", ".join(f"{key}: {name}" for key, name in inputs.items())
        found = f"forward of {code.__name__} takes {takes}, inputs of {DESCRIPTION} has {told}"
        raise InputError(f"{path}: {found} ({first_line(error)}); correct inputs") from None


def _check_description(model: Denoiser, description: Description, folder: Path) -> None:
    """Check that the described layers exist and fit.

    Raises:
        InputError: They do not, or layers share weights.
    """
    origin, modules = f"{folder / DESCRIPTION}", dict(model.named_modules())
    for glob in description.protected:
        _check_glob("protected", glob, modules, origin)
    for entry in description.attention:
        _check_glob("attention.qkv", entry.qkv, modules, origin)
    _check_overlap(model, origin)
    for name, found in attentions(model).items():
        _check_attention(name, {**found, "heads": model.espalier_heads[name]}, modules, origin)
    for block, layer in description.features.items():
        for name in (block, layer) if layer else (block,):
            _check_glob("features", name, modules, origin)
    if len(list(model.parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        raise InputError(
            f"{folder / CODE}: layers share a weight, which a cut would part; supported: weights of one layer"
        )


def _check_glob(key: str, glob: str, names: Iterable[str], origin: str) -> None:
    if not any(fnmatchcase(name, glob) for name in names):
        near = get_close_matches(glob, [name for name in names if name], 1, 0)
        raise InputError(
            f"{origin}: {key} {glob} matches no module of the model; did you mean {near[0] if near else '*'}?"
        )


def _check_overlap(model: Denoiser, origin: str) -> None:
    """Check that each attention is described once, and has layers that no other has.

    Raises:
        InputError: It is not.
    """
    seen: dict[str, str] = {}
    for name, entry in all_attentions(model):
        for place in (f"module {name or 'at the top'}", f"layer {entry['out_layer']}"):
            if place in seen:
                both = " and ".join(sorted({seen[place], entry["qkv_layer"]}))
                found = f"{origin}: attention describes the {place} twice, by {both}"
                raise InputError(f"{found}; supported: one entry for each module, with layers of its own")
            seen[place] = entry["qkv_layer"]


def _check_attention(name: str, entry: Mapping[str, Any], modules: Mapping[str, nn.Module], origin: str) -> None:
    """Check widths of an attention: three times heads times their width in, heads times their width out."""
    qkv, out, heads = modules[entry["qkv_layer"]], modules.get(entry["out_layer"]), entry["heads"]
    where = f"{origin}: attention {entry['qkv_layer']}"
    if not isinstance(qkv, Fused):
        raise InputError(f"{where} is a {type(qkv).__name__}; supported: Linear, Conv2d")
    if not isinstance(out, Fused):
        raise InputError(f"{where}: out {entry['out_layer']} is no Linear or Conv2d of the model; correct it")
    outputs, inputs = len(qkv.weight), out.weight.shape[1]
    if outputs % (3 * heads) or outputs != 3 * inputs:
        found = f"has {outputs} outputs, and {entry['out_layer']} {inputs} inputs"
        raise InputError(f"{where} {found}; expected 3 × {heads} heads of one width, and a third of it")
    attribute = entry["heads_attribute"]
    if attribute is not None and getattr(modules[name], attribute, None) != heads:
        found = f"{name or 'the model'}.{attribute} is {getattr(modules[name], attribute, 'missing')}"
        raise InputError(f"{where}: {found}, expected the number of heads, {heads}; correct heads_attribute")
