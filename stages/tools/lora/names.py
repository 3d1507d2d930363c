"""Names of tensors in adapter files -> the layer of the model and the factor of its LoRA; peft, diffusers and kohya."""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from stages.runtime.errors import InputError

Role = Literal["down", "up", "bias", "embedding down", "embedding up", "alpha"]
"""down is A, up is B of W + s·B·A."""

ADAPTER_NAME = r"(?:\.(?!weight|bias)\w+)?"
"""peft's name of the adapter, which its files leave out and its state dicts have."""
ENDINGS: dict[Role, str] = {
    "down": rf"\.lora_A{ADAPTER_NAME}\.weight|[._]lora\.down\.weight|\.lora_down\.weight",
    "up": rf"\.lora_B{ADAPTER_NAME}\.weight|[._]lora\.up\.weight|\.lora_up\.weight",
    "bias": rf"\.lora_B{ADAPTER_NAME}\.bias",
    "embedding down": rf"\.lora_embedding_A{ADAPTER_NAME}",
    "embedding up": rf"\.lora_embedding_B{ADAPTER_NAME}",
    "alpha": r"\.alpha",
}
"""Role -> how its name ends behind that of the layer: peft and today's diffusers, diffusers before, kohya."""
DOTTED = "base_model.model.", "unet.", "transformer."
FLATTENED = "lora_unet_", "lora_transformer_"
"""Beginnings of names; with the latter, kohya's, the layer has underscores in place of dots."""
OTHER_COMPONENTS = "text_encoder", "lora_te"
"""Beginnings of the names of text encoders, which no plan cuts."""
OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA, which divides by the norm of each row over all inputs",
    "dora_scale": "DoRA, which divides by the norm of each row over all inputs",
    "hada_": "LoHa, a product of elements",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "a convolution of three factors",
}
"""Part of a tensor's name -> the method it belongs to, whose weights are not W + s·B·A."""


class Part(NamedTuple):
    """What one tensor of an adapter is."""

    layer: str
    """The layer as the file writes it, without prefix; see `LayerNames`."""
    role: Role
    is_flattened: bool = False


def parse_name(name: str, origin: str) -> Part | None:
    """Find the layer and the role of a tensor by its name; None for a tensor of a text encoder.

    Raises:
        InputError: The tensor is not one of a LoRA.
    """
    if name.startswith(OTHER_COMPONENTS):
        return None
    prefix = next((prefix for prefix in (*DOTTED, *FLATTENED) if name.startswith(prefix)), "")
    for role, ending in ENDINGS.items():
        if found := re.fullmatch(rf"(.+?)(?:{ending})", name.removeprefix(prefix)):
            return Part(found[1], role, prefix in FLATTENED)
    method = next((text for part, text in OTHER_METHODS.items() if part in name), "")
    if method:
        raise InputError(f"{origin}: {name} belongs to {method}; only LoRA can be sliced, train one without it")
    allowed = "lora_A and lora_B, lora.down and lora.up, lora_down and lora_up, alpha"
    raise InputError(f"{origin}: {name} is no tensor of a LoRA; allowed: {allowed} (no trained biases or whole layers)")


class LayerNames:
    """The layers of a model, found by the names that adapters give them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.flattened = {name.replace(".", "_"): name for name in self.names}

    def find(self, part: Part) -> str | None:
        """Return the name of a layer in the model; None if there is no such layer.

        `X.processor.to_q`, as diffusers wrote the layers of attentions, is `X.to_q`, and `X.processor.to_out`
        is `X.to_out.0`.
        """
        if part.is_flattened:
            return self.flattened.get(part.layer)
        layer = re.sub(r"\.processor\.(to_(?:q|k|v|out))$", r".\1", part.layer)
        return next((name for name in (layer, f"{layer}.0") if name in self.names), None)
