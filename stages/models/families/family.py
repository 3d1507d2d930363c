"""What the program must know of a class of diffusers to prune it; each other module of this package describes one."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from stages.models import pruned_unet
from stages.runtime.errors import InputError
from stages.storage.files import copy_file

Denoiser = ModelMixin
"""A model of one of the families; its forward takes the noisy samples, the timesteps and the family's condition."""
Config = Mapping[str, Any]
META_KEYS = ("_class_name", "_diffusers_version")
"""Keys that diffusers adds to every config."""
MAX_SIDE = 4096
"""Largest height and width of the samples."""
NO_STOCK = "only a UNet2DModel with a sinusoidal timestep embedding can be converted to a stock model"
ATTENTION_OUTPUTS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Branch:
    """A residual branch that can be removed, so that the shortcut beside it stays alone."""

    name: str
    """The module of the branch and its shortcut."""
    kind: str
    """resnet, attention or transformer."""
    reads: tuple[str, ...] = ()
    """The inputs of the model besides the sample that the branch reads; of each, one reader must stay."""


@dataclass(frozen=True)
class FusedAttention:
    """An attention with one layer for queries, keys and values."""

    name: str
    """The module of the attention."""
    out: str
    """The layer that reads what the heads give."""
    heads: int
    """The number of heads that it has left."""
    by_head: bool
    """Whether the outputs are those of the first head, then of the next; else all queries, then keys, then values."""

    def rows(self, num_outputs: int) -> torch.Tensor:
        """Return the layer's outputs that belong to each channel of the heads: [3, channels]."""
        rows, width = torch.arange(num_outputs), num_outputs // (3 * self.heads)
        if self.by_head:
            return rows.view(self.heads, 3, width).transpose(0, 1).reshape(3, -1)
        return rows.view(3, -1)


class Family(ABC):
    """One diffusers class that can be pruned."""

    dense: ClassVar[type[Any]]
    pruned: ClassVar[type[Any]]
    """Its subclass whose layers may have any widths."""
    code: ClassVar[Path]
    """The file of `pruned`, which travels with every pruned model; it needs only torch and diffusers."""
    shortcut: ClassVar[type[nn.Module]]
    """What stays of a removed residual branch: built from its module, which it takes the place of."""
    component: ClassVar[str] = "unet"
    """Name of the model in a diffusers pipeline, and of its folder."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names of the class in configs."""
    pipelines: ClassVar[tuple[str, str]] = "DDPMPipeline", "LDMPipeline"
    """The classes of diffusers that draw with such a model: in pixel space, and with an autoencoder."""
    autoencoder: ClassVar[str] = "vqvae"
    """The name that the second of them has for the autoencoder, of whatever class."""
    parts: ClassVar[tuple[str, ...]]
    """The modules at the top of the model in the order in which they run."""
    deep_blocks_add: ClassVar[bool] = False
    """Whether the deep blocks keep the shape of their input, so that what they add to it can be reused."""
    layer_counts: ClassVar[tuple[str, ...]]
    """Keys of the config whose product is a number of layers; each layer has at least one tensor."""

    proven: ClassVar[bool] = False
    """Whether each cut is compared with the dense model whose cut channels are masked, since its code is not known."""

    @property
    def name(self) -> str:
        """The name of the class in configs."""
        return self.dense.__name__

    @property
    def pruned_name(self) -> str:
        """The name of the pruned class in configs."""
        return self.pruned.__name__

    @property
    def module(self) -> str:
        """The name of the file that defines the pruned class, without its suffix."""
        return self.code.stem

    def write_code(self, model: Denoiser, folder: Path) -> None:  # noqa: ARG002
        """Write the files that define the pruned class to the folder of the model."""
        copy_file(self.code, folder / self.code.name)

    def identity(self, model: Denoiser) -> str:  # noqa: ARG002
        """Return what plans call the family of a model: two models of one identity run the same code."""
        return self.name

    def build_dense(self, model: Denoiser) -> Denoiser:
        """Build the dense model that a model, pruned or not, was made from, with weights of its default init."""
        built: Denoiser = self.dense.from_config(self.dense_config(model))
        return built

    @abstractmethod
    def check_config(self, config: Config, origin: Path) -> None:
        """Check what only this family has in its config, which is complete.

        Raises:
            InputError: A value is not supported; its key is named.
        """

    @abstractmethod
    def protected(self, model: Denoiser) -> list[nn.Module]:
        """List the layers that keep all outputs: at least those whose outputs are the prediction."""

    @abstractmethod
    def feature_blocks(self, model: Denoiser) -> dict[str, str | None]:
        """Name the blocks whose outputs are distilled, and the layer whose outputs are their channels; None: all stay.

        Channels are the second dimension of features [B, K, H, W] and the last one of features [B, N, K].
        """

    @abstractmethod
    def module_name(self, layer: str) -> str:
        """Name the module of a layer for tables and figures."""

    def prepare(self, model: Denoiser) -> None:  # noqa: B027  # most families have nothing to complete
        """Complete a model that was built without memory and then got its weights."""

    def known_timesteps(self, model: Denoiser) -> int | None:  # noqa: ARG002
        """Return the number of timesteps that the model has learned; None if it computes with any."""
        return None

    def side_multiple(self, model: Denoiser) -> int | None:  # noqa: ARG002
        """Return the number that height and width should be a multiple of; None if the model has one size only."""
        return None

    def condition_width(self, model: Denoiser) -> int | None:  # noqa: ARG002
        """Return the width of the condition [B, S, D]; None for models without one."""
        return None

    def num_labels(self, model: Denoiser) -> int | None:  # noqa: ARG002
        """Return the number of classes that the model embeds itself, the empty one included; None if it embeds none."""
        return None

    def empty_label(self, model: Denoiser) -> int | None:  # noqa: ARG002
        """Return the label of the empty class, where the class of the model fixes it."""
        return None

    def example_condition(self, model: Denoiser, batch_size: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Build a condition for forward on the model's device."""
        return {}

    def attention_outputs(self, model: Denoiser) -> dict[str, tuple[str, int]]:
        """Name the layers whose outputs are divided into heads: layer -> (attention, number of heads)."""
        attentions = {name: it.heads for name, it in model.named_modules() if isinstance(it, Attention)}
        return {f"{name}.{side}": (name, heads) for name, heads in attentions.items() for side in ATTENTION_OUTPUTS}

    def fused_attentions(self, model: Denoiser) -> Mapping[str, FusedAttention]:  # noqa: ARG002
        """Find the layers that give queries, keys and values of whole heads together: layer -> its attention."""
        return {}

    def heads(self, model: Denoiser) -> dict[str, int]:
        """Return the number of heads of each attention."""
        return {name: it.heads for name, it in model.named_modules() if isinstance(it, Attention)}

    def set_heads(self, model: Denoiser, heads: Mapping[str, int]) -> None:
        """Note how many heads attentions have left, in place."""
        for name, number in heads.items():
            model.get_submodule(name).heads = number  # type: ignore[assignment]

    def note_widths(self, model: Denoiser) -> None:
        """Set the width attributes of layers and blocks to the shapes of their weights, in place."""
        pruned_unet.note_widths(model)

    def narrow(self, model: Denoiser, widths: Mapping[str, Sequence[int]], heads: Mapping[str, int]) -> Denoiser:
        """Replace the parameters of some layers by uninitialized ones of other widths, in place."""
        return pruned_unet.narrow(model, widths, heads)

    def residual_branches(self, model: Denoiser) -> list[Branch]:  # noqa: ARG002
        """List the residual branches that a model has left and whose shortcut can stay alone, in order of the parts."""
        return []

    def deep_blocks(self, model: Denoiser) -> list[str]:  # noqa: ARG002
        """Name the modules inside the outermost blocks, whose output can be reused, in the order in which they run."""
        return []

    def to_stock(self, model: Denoiser, num_timesteps: int) -> Denoiser:  # noqa: ARG002
        """Convert a pruned model to one of the dense class with a config of other widths.

        Raises:
            InputError: No config of the dense class has these widths.
        """
        raise InputError(NO_STOCK)

    def dense_config(self, model: Denoiser) -> dict[str, Any]:
        """Return the config of the dense model that a model, pruned or not, was made from; only keys of its class."""
        known = (*META_KEYS, *config_defaults(self.dense))
        config = {key: value for key, value in plain_config(model.config).items() if key in known}
        return {**config, "_class_name": self.name}


def config_defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the default of each key of a diffusers class's config."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def plain_config(config: Config) -> dict[str, Any]:
    """Convert a config to plain JSON types, without the private entries of diffusers."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return {key: value for key, value in plain.items() if key in META_KEYS or not key.startswith("_")}


def check_sample_size(config: Config, origin: Path) -> None:
    """Check that the size of the samples is known: one side of square ones, or height and width.

    Raises:
        InputError: It is not, or a side is too long.
    """
    size = config.get("sample_size")
    lengths = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)  # noqa: PLR2004
    if not all(type(length) is int and 0 < length <= MAX_SIDE for length in lengths):
        found = f"{origin} has sample_size {size!r}"
        allowed = f"one positive integer, for square images, or [height, width]; at most {MAX_SIDE}"
        raise InputError(f"{found}; supported: {allowed}")
