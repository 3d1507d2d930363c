"""denoiser.json: what a model of a class that diffusers does not have takes and returns, and what of it stays."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.schema import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Pattern = Annotated[str, Field(min_length=1)]


class Inputs(Section):
    """The names that the arguments of forward have."""

    sample: Name
    """The noisy images or latents, [B, C, H, W]."""
    timestep: Name
    """The timesteps, integers [B]."""
    labels: Name | None = None
    """Class labels, integers [B]; null without classes."""
    encoder_states: Name | None = None
    """A sequence of vectors for each image, [B, S, D]; null without."""


class Output(Section):
    """Where the prediction (ε, v or x₀) stands in what forward returns; all of it by default."""

    attribute: Name | None = None
    """Attribute of what forward returns."""
    index: int | None = Field(None, ge=0)
    """Place in a tuple or list."""
    channels: tuple[int, int] | None = None
    """First channel, and the one behind the last; null takes all. A learned variance beside them is left out."""

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if self.channels is not None and not 0 <= self.channels[0] < self.channels[1]:
            found = f"channels is {list(self.channels)}"
            raise ValueError(f"{found}; allowed: [first, end] with 0 <= first < end, the channel behind the last")
        return self


class FusedAttention(Section):
    """Attentions with one layer for queries, keys and values."""

    qkv: Pattern
    """Glob of the layers' names, such as blocks.*.attention.qkv."""
    out: Pattern
    """Name, in the same module, of the layer that reads what the heads give."""
    heads: int = Field(ge=1)
    """Number of heads."""
    heads_attribute: Name | None = None
    """Attribute of the module with that number, which the code reads; null where the code takes it from a width."""
    first: Literal["part", "head"] = "part"
    """Order of the layer's outputs. part: queries of all heads, then keys, then values. head: queries, keys and values
    of the first head, then of the next."""


class Description(Section):
    """denoiser.json."""

    inputs: Inputs
    output: Output = Output()
    num_labels: int | None = Field(None, ge=1)
    """Number of labels that the model embeds, the empty class included; set if and only if inputs.labels is."""
    empty_label: int | None = Field(None, ge=0)
    """Label of the empty class, the last one; null without."""
    encoder_width: int | None = Field(None, ge=1)
    """D of the encoder states; set if and only if inputs.encoder_states is."""
    protected: list[Pattern] = Field(min_length=1)
    """Globs of the layers that keep all outputs: at least the last one."""
    attention: list[FusedAttention] = Field(default=[])
    features: dict[str, str | None] = Field(default={})
    """Module whose output is distilled -> the layer whose outputs are its channels; null: all stay."""

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        for one, other, value in (
            ("labels", "num_labels", self.num_labels),
            ("encoder_states", "encoder_width", self.encoder_width),
        ):
            if (getattr(self.inputs, one) is None) != (value is None):
                raise ValueError(f"inputs.{one} and {other} go together; give both or neither")
        if self.inputs.labels and self.inputs.encoder_states:
            raise ValueError("inputs has labels and encoder_states; supported: one of them")
        if self.empty_label is not None and self.empty_label + 1 != self.num_labels:
            raise ValueError(f"empty_label is {self.empty_label}; allowed: num_labels - 1, or null")
        return self
