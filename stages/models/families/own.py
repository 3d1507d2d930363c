"""An own class, which diffusers does not have: its code and its description stand in the folder of the model."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.models import pruned_own
from stages.models.families.family import Config, Denoiser, Family, FusedAttention, plain_config
from stages.models.layout import CODE
from stages.models.pruned_own import CLASS_NAME, PRUNED_KEYS, OwnDenoiser, attentions
from stages.models.pruned_unet import Bypass
from stages.runtime.errors import InputError, refusing_code

TRAVELLING = '''\
"""The class of this model for diffusers: {name} of {code}, with the widths of its config."""

import sys

sys.modules.pop(f"{{__package__}}.{stem}", None)  # diffusers keeps the files of all models in one place

from .{stem} import {name}
from .{adapter} import make_class

{pruned} = make_class({name})
'''


class Own(Family):
    """Any class of PyTorch."""

    dense = pruned = OwnDenoiser
    shortcut = Bypass
    code = Path(pruned_own.__file__)
    parts = ()
    layer_counts = ()
    proven = True
    pruned_name = CLASS_NAME
    module = "pruned_denoiser"

    def check_config(self, config: Config, origin: Path) -> None:
        """Refuse a config without its code, which only `own_code.initialise_own` opens.

        Raises:
            InputError: In every case.
        """
        found = f"{origin} describes a {config.get('denoiser_class')}, an own class"
        raise InputError(f"{found}, which is not supported here (docs/models.md)")

    def identity(self, model: Denoiser) -> str:
        """Name the class, and the hash of its code and description."""
        return f"{model.espalier_code.__name__} of {CODE} {model.espalier_code_sha256[:12]}"

    def write_code(self, model: Denoiser, folder: Path) -> None:
        """Write the class, the adapter to diffusers, and the file that puts both together."""
        super().write_code(model, folder)
        (folder / CODE).write_bytes(model.espalier_code_text)
        names = {"name": model.espalier_code.__name__, "code": CODE, "stem": Path(CODE).stem}
        text = TRAVELLING.format(**names, adapter=self.code.stem, pruned=CLASS_NAME)
        (folder / f"{self.module}.py").write_text(text)

    def dense_config(self, model: Denoiser) -> dict[str, Any]:
        """Return the config without what was pruned."""
        config = {key: value for key, value in plain_config(model.config).items() if key not in PRUNED_KEYS}
        auto_map = {"AutoModel": f"{self.module}.{CLASS_NAME}"}
        return {**config, "_class_name": CLASS_NAME, "auto_map": auto_map}

    def build_dense(self, model: Denoiser) -> Denoiser:
        """Run the constructor on the CPU, since that of any class may compute.

        Raises:
            InputError: The constructor raises an exception.
        """
        return construct(type(model), self.dense_config(model), CODE)

    def protected(self, model: Denoiser) -> list[nn.Module]:
        """List the described layers, and those of the fused attentions, which have separate groups."""
        fused = self.fused_attentions(model)
        return [
            module for name, module in model.named_modules() if name and (name in fused or _is_protected(model, name))
        ]

    def feature_blocks(self, model: Denoiser) -> dict[str, str | None]:
        """Return the described features."""
        return dict(model.config["description"]["features"])

    def module_name(self, layer: str) -> str:
        """Name the module that a layer belongs to: blocks.0.conv1 -> blocks.0."""
        return layer.rpartition(".")[0] or layer

    def condition_width(self, model: Denoiser) -> int | None:
        """Return D of the encoder states."""
        width: int | None = model.config["description"]["encoder_width"]
        return width

    def num_labels(self, model: Denoiser) -> int | None:
        """Return the described number of labels."""
        number: int | None = model.config["description"]["num_labels"]
        return number

    def empty_label(self, model: Denoiser) -> int | None:
        """Return the described label of the empty class."""
        label: int | None = model.config["description"]["empty_label"]
        return label

    def example_condition(self, model: Denoiser, batch_size: int) -> dict[str, torch.Tensor]:
        """Spread labels from the first to the last, or build encoder states of zeros."""
        labels, width, device = self.num_labels(model), self.condition_width(model), model.device
        if labels is not None:
            return {"class_labels": torch.linspace(0, labels - 1, batch_size, device=device).long()}
        return {} if width is None else {"encoder_hidden_states": torch.zeros(batch_size, 1, width, device=device)}

    def attention_outputs(self, model: Denoiser) -> dict[str, tuple[str, int]]:  # noqa: ARG002
        """Name none: fused layers have separate groups, and others are not understood."""
        return {}

    def fused_attentions(self, model: Denoiser) -> Mapping[str, FusedAttention]:
        """Return the described attentions whose layers are not protected."""
        return {
            each["qkv_layer"]: FusedAttention(
                name, each["out_layer"], model.espalier_heads[name], by_head=each["first"] == "head"
            )
            for name, each in attentions(model).items()
            if not _is_protected(model, each["qkv_layer"])
        }

    def heads(self, model: Denoiser) -> dict[str, int]:
        """Return the numbers of heads of the described attentions."""
        return dict(model.espalier_heads)

    def set_heads(self, model: Denoiser, heads: Mapping[str, int]) -> None:
        """Note how many heads are left, also for the model's own code."""
        pruned_own.set_heads(model, heads)

    def note_widths(self, model: Denoiser) -> None:
        """Set the width attributes of layers."""
        pruned_own.note_widths(model)

    def narrow(self, model: Denoiser, widths: Mapping[str, Sequence[int]], heads: Mapping[str, int]) -> Denoiser:
        """Replace the parameters of some layers by uninitialized ones of other widths, in place."""
        pruned_own.narrow(model, widths)
        pruned_own.set_heads(model, heads)
        return model


def construct(cls: Any, config: Config, origin: str | Path) -> Denoiser:  # noqa: ANN401  # made while it runs
    """Build a model by the constructor of an own class, on the CPU: the only place that runs it.

    Args:
        cls: What `make_class` derived from the own class.
        config: The constructor's keys, and those of `make_class`.
        origin: The file of the class, for the message.

    Raises:
        InputError: The constructor raises an exception, also one that would end the program.
    """
    name = cls.espalier_code.__name__
    with refusing_code(f"{origin}: the constructor of {name}"), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        built: Denoiser = cls.from_config(config)
    return built


def _is_protected(model: Denoiser, layer: str) -> bool:
    """Whether the description says that a layer keeps all outputs."""
    return any(fnmatchcase(layer, glob) for glob in model.config["description"]["protected"])


OWN = Own()
