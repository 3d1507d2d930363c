"""A model and its class_embedding/ folder -> the conditions of its classes as an array."""

from pathlib import Path

import torch

from stages.data.images import Table, label_table
from stages.models.families import Denoiser, family_of
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.storage.tensors import read_tensors

LABEL_KEYS = ("num_classes", "unconditional")
"""Keys of the config.json beside a model that embeds its classes itself."""


def read_class_embedding(unet: Denoiser, folder: Path) -> Table | None:
    """Read the class embedding of a model and check that it fits; of a model that embeds its classes, their labels.

    Args:
        unet: The model.
        folder: Its pipeline folder.

    Returns:
        What the model gets for each class, the empty condition last: [K, 1, D] float32, whose last row is zeros if the
        embedding has no empty condition, or class labels, int64 [K]; None for an unconditional model.

    Raises:
        InputError: The embedding is missing or unexpected, does not fit the model, or contradicts its own config.
    """
    embedding, family = folder / CLASS_EMBEDDING, family_of(unet)
    width, num_labels = family.condition_width(unet), family.num_labels(unet)
    if num_labels is not None:
        return _read_labels(embedding, num_labels, family.empty_label(unet))
    if width is None:
        if embedding.is_dir():
            raise InputError(f"{embedding} embeds classes, but the model is unconditional; remove it")
        return None
    if not embedding.is_dir():
        raise InputError(f"{embedding} does not exist; supported: unconditional and class-conditional models, not text")
    config = read_json(embedding / "config.json")
    tensors = read_tensors(embedding / WEIGHTS)
    if "weight" not in tensors:
        raise InputError(f"{embedding / WEIGHTS} holds {', '.join(tensors) or 'nothing'}, expected weight; rename it")
    weight = tensors["weight"]
    _check_width(list(weight.shape), config, width, embedding)
    _check_rows(len(weight), config, embedding)
    if not weight.isfinite().all():
        raise InputError(f"{embedding} holds values that are not finite; use another checkpoint")
    unconditional, weight = config.get("unconditional"), weight.float()
    last = weight.new_zeros(1, weight.shape[1]) if unconditional is None else weight[unconditional][None]
    table: Table = torch.cat([weight[: config["num_classes"]], last])[:, None].numpy()
    return table


def _read_labels(embedding: Path, num_labels: int, empty: int | None) -> Table:
    """List the labels of a model that embeds its classes itself; a config.json may say which is the empty class.

    Raises:
        InputError: The folder holds weights, or its config does not fit the model.
    """
    if not embedding.exists():
        return label_table(num_labels if empty is None else num_labels - 1, empty)
    if (embedding / WEIGHTS).is_file():
        raise InputError(f"{embedding} holds weights, but the model embeds its classes itself; keep config.json alone")
    allowed = f"it may hold config.json with {' and '.join(LABEL_KEYS)}, or be left out"
    if not embedding.is_dir():
        raise InputError(f"{embedding} is no folder; {allowed}")
    config = read_json(embedding / "config.json")
    if others := config.keys() - LABEL_KEYS:
        raise InputError(f"{embedding} has {', '.join(sorted(others))} in config.json; {allowed}")
    _check_rows(num_labels, config, embedding)
    return label_table(config["num_classes"], config.get("unconditional", empty))


def _check_width(shape: list[int], config: dict[str, object], width: int, embedding: Path) -> None:
    """Check the shape of the weight against the config of the embedding and the width of the model.

    Raises:
        InputError: They differ.
    """
    if shape[1:] != [width] or config.get("width") != width:
        found = f"a weight of shape {shape} and width {config.get('width')} in its config.json"
        raise InputError(f"{embedding} has {found}, the model takes {width}; use the embedding of this model")


def _check_rows(rows: int, config: dict[str, object], embedding: Path) -> None:
    """Check that the classes are the first rows of the embedding, and that the empty one is none of them.

    Raises:
        InputError: They are not, or it is.
    """
    classes, unconditional = config.get("num_classes"), config.get("unconditional")
    is_count = type(classes) is int and 0 < classes <= rows
    is_behind = type(classes) is int and type(unconditional) is int and classes <= unconditional < rows
    if not (is_count and (unconditional is None or is_behind)):
        found = f"{rows} rows, but num_classes {classes} and unconditional {unconditional} in its config.json"
        allowed = f"1 to {rows} classes, and null or a row behind those of the classes"
        raise InputError(f"{embedding} has {found}; allowed: {allowed}")
