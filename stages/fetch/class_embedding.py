"""The class_embedding/ folder of a model -> the conditions of its classes as an array."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.models.families import Denoiser, family_of
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.storage.tensors import read_tensors


def read_class_embedding(unet: Denoiser, folder: Path) -> NDArray[np.float32] | None:
    """Read the class embedding of a model and check that it fits the UNet.

    Args:
        unet: The UNet of the model.
        folder: Its pipeline folder.

    Returns:
        [K, 1, D] float32, one row per class and the unconditional one last (zeros if the model has none); None for an
        unconditional UNet.

    Raises:
        InputError: The embedding is missing or unexpected, does not fit the UNet, or contradicts its own config.
    """
    embedding = folder / CLASS_EMBEDDING
    width = family_of(unet).condition_width(unet)
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
    _check_shape(list(weight.shape), config, width, embedding)
    if not weight.isfinite().all():
        raise InputError(f"{embedding} holds values that are not finite; use another checkpoint")
    unconditional, weight = config.get("unconditional"), weight.float()
    last = weight.new_zeros(1, weight.shape[1]) if unconditional is None else weight[unconditional][None]
    table: NDArray[np.float32] = torch.cat([weight[: config["num_classes"]], last])[:, None].numpy()
    return table


def _check_shape(shape: list[int], config: dict[str, object], width: int, embedding: Path) -> None:
    """Check the shape of the weight against the config of the embedding and the width of the model.

    Raises:
        InputError: They differ.
    """
    if shape[1:] != [width] or config.get("width") != width:
        found = f"a weight of shape {shape} and width {config.get('width')} in its config.json"
        raise InputError(f"{embedding} has {found}, the model takes {width}; use the embedding of this model")
    classes, unconditional = config.get("num_classes"), config.get("unconditional")
    is_count = type(classes) is int and 0 < classes <= shape[0]
    is_row = unconditional is None or (type(unconditional) is int and 0 <= unconditional < shape[0])
    if not (is_count and is_row):
        found = f"num_classes {classes} and unconditional {unconditional}"
        raise InputError(f"{embedding} has {shape[0]} rows, but {found} in its config.json; correct it")
