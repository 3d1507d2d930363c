"""What the two families of UNets have in common."""

import re
from pathlib import Path

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from stages.models import pruned_unet
from stages.models.families.family import Branch, Config, Denoiser, Family, check_sample_size
from stages.models.pruned_unet import Bypass, has_shortcut
from stages.runtime.errors import InputError

CONDITIONS = "further conditions; supported: encoder_hidden_states alone"
UNSUPPORTED_CONDITIONS = {
    "addition_embed_type": CONDITIONS,
    "encoder_hid_dim_type": CONDITIONS,
    "encoder_hid_dim": CONDITIONS,
    "time_cond_proj_dim": CONDITIONS,
}
"""Key of a UNet's config -> the conditions that it adds."""
UNSUPPORTED_BLOCKS = {
    "SimpleCrossAttn": "attention with added keys and values, whose channels cannot be cut together",
    "K": "norms whose scale and shift depend on the timestep, whose channels cannot be cut together",
}
"""Beginning of a block's type -> what it holds."""
KINDS = ("attentions", "resnets", "downsamplers", "upsamplers")


BRANCHES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    ResnetBlock2D: ("resnet", ("timestep",)),
    Attention: ("attention", ()),
    Transformer2DModel: ("transformer", ("condition",)),
}
"""Module with a residual branch -> its kind, and the inputs of the model that it reads besides the sample."""


class UNet(Family):
    """Blocks of residual networks and attentions down to a small resolution and up again."""

    shortcut = Bypass
    code = Path(pruned_unet.__file__)
    parts = (
        "time_embedding",
        "class_embedding",
        "conv_in",
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_norm_out",
        "conv_out",
    )
    layer_counts = ("layers_per_block", "transformer_layers_per_block")

    def check_config(self, config: Config, origin: Path) -> None:
        """Check the conditions, the channels of input and output, the blocks and the size of the samples.

        Raises:
            InputError: One of them is not supported.
        """
        for key, reason in UNSUPPORTED_CONDITIONS.items():
            if config.get(key) is not None:
                raise InputError(f"{origin} describes a model with {reason} ({key} is {config[key]!r})")
        _check_channels(config["in_channels"], config["out_channels"], origin)
        if not isinstance(config["block_out_channels"], list | tuple) or not config["block_out_channels"]:
            found = f"{origin} has block_out_channels {config['block_out_channels']!r}"
            raise InputError(f"{found}; supported: a list of one width a block")
        _check_blocks(config, origin)
        self.check_inputs(config, origin)
        check_sample_size(config, origin)

    def check_inputs(self, config: Config, origin: Path) -> None:
        """Check how timestep and condition enter.

        Raises:
            InputError: It is not supported.
        """

    def protected(self, model: Denoiser) -> list[nn.Module]:
        """List the last convolution, whose outputs are the prediction."""
        return [model.get_submodule("conv_out")]

    def feature_blocks(self, model: Denoiser) -> dict[str, str | None]:
        """Name the residual blocks; the outputs of the second convolution of each are its channels."""
        blocks = [name for name, module in model.named_modules() if isinstance(module, ResnetBlock2D)]
        return {name: f"{name}.conv2" for name in blocks}

    def residual_branches(self, model: Denoiser) -> list[Branch]:
        """List the residual blocks that keep the resolution, the self-attentions and the transformers."""
        found = [
            Branch(name, *BRANCHES[type(module)])
            for name, module in model.named_modules()
            if type(module) in BRANCHES and has_shortcut(module)
        ]
        return sorted(found, key=lambda branch: self.parts.index(branch.name.partition(".")[0]))

    def deep_blocks(self, model: Denoiser) -> list[str]:
        """Name the blocks below the full resolution; the last one's output goes into the last block up."""
        last = len(model.config["block_out_channels"]) - 1
        middle = ["mid_block"] if getattr(model, "mid_block", None) is not None else []
        down, up = (f"down_blocks.{index}" for index in range(1, last + 1)), (f"up_blocks.{i}" for i in range(last))
        return [*down, *middle, *up] if last else []

    def known_timesteps(self, model: Denoiser) -> int | None:
        """Return the length of a learned table of timesteps."""
        is_learned = model.config["time_embedding_type"] == "learned"
        return int(model.config["num_train_timesteps"]) if is_learned else None

    def side_multiple(self, model: Denoiser) -> int:
        """Return the factor by which the blocks reduce the resolution."""
        return int(2 ** (len(model.config["block_out_channels"]) - 1))

    def module_name(self, layer: str) -> str:
        """Name the module of a layer: down_blocks.0.resnets.1.conv1 -> down 0 · resnet 1; conv_in stays."""
        words = layer.split(".")
        part, *rest = words
        block = part.removesuffix("_blocks").removesuffix("_block")
        if block == part:
            return part.replace("_", " ")
        index = f" {rest.pop(0)}" if rest and rest[0].isdecimal() else ""
        if not rest or rest[0] not in KINDS:
            return f"{block}{index}"
        kind, number = rest[0].removesuffix("s"), rest[1] if len(rest) > 1 and rest[1].isdecimal() else ""
        return f"{block}{index} · {kind} {number}".rstrip()


def _check_channels(inputs: object, outputs: object, origin: Path) -> None:
    """Check that a model has as many output as input channels, or twice as many, with a learned variance.

    Raises:
        InputError: The numbers differ; the reason says what further channels usually are.
    """
    is_pair = isinstance(inputs, int) and isinstance(outputs, int)
    if inputs == outputs or (is_pair and outputs == 2 * inputs):  # type: ignore[operator]
        return
    reason = "no others"
    if is_pair and inputs > outputs:  # type: ignore[operator]
        reason = "no fixed condition, as the further in_channels of inpainting or super-resolution are"
    sides = f"{inputs!r} input and {outputs!r} output channels"
    found = f"in_channels is {inputs!r}, out_channels {outputs!r}"
    allowed = "equal numbers, or twice as many outputs with a learned variance"
    raise InputError(f"{origin} describes a model with {sides}; supported: {allowed} ({found}; {reason})")


def _check_blocks(config: Config, origin: Path) -> None:
    """Check the types of blocks.

    Raises:
        InputError: A type is not supported; its key is named.
    """
    for key in ("down_block_types", "mid_block_type", "up_block_types"):
        value = config[key]
        if not isinstance(value, str | list | tuple | None):
            raise InputError(f"{origin} has {key} {value!r}; supported: names of blocks")
        for block in [value] if isinstance(value, str) else value or ():
            for kind, content in UNSUPPORTED_BLOCKS.items():
                if re.match(rf"(UNetMidBlock2D)?{kind}[A-Z]", str(block)):
                    raise InputError(f"{origin} has {key} {block}, which holds {content}; use a model without it")
