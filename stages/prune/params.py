"""The block prune of params.yaml."""

import math
import re
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from stages.models.params import Quantity
from stages.runtime.schema import Section


def _check_amount(amount: float | str) -> float | str:
    share = re.fullmatch(r"(\d+(\.\d+)?)%", amount) if isinstance(amount, str) else None
    number = float(share[1]) if share else amount
    if isinstance(number, str) or not 0 < number < math.inf:
        raise ValueError("give a number above 0, or a share of the dense model such as 56%")
    return amount


Amount = Annotated[float | str, AfterValidator(_check_amount)]
"""Absolute, or a share of the dense model's, as 56%."""


class Target(Section):
    """How small the model becomes: exactly one of these."""

    ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the channels to remove; with ranking uniform from every group, as in the paper."""
    macs: Amount | None = None
    """Multiply-accumulates of one image, without the matrix products inside attention: 3.4e9, 56% or 0.56."""
    params: Amount | None = None
    """As macs: a number below 1 is a share of the dense model's."""
    latency_ms: Amount | None = None
    """Of a forward pass of one image on this device."""

    @model_validator(mode="after")
    def _is_one(self) -> "Target":
        if len(self._given()) != 1:
            raise ValueError("give exactly one of ratio, macs, params, latency_ms")
        return self

    def _given(self) -> dict[str, float | str]:
        return {name: amount for name, amount in self if amount is not None}

    @property
    def quantity(self) -> Quantity:
        """What the target is measured in."""
        (name,) = self._given()
        return "channels" if name == "ratio" else cast("Quantity", name)

    def asked(self, dense: float) -> float:
        """Find the cost that is asked for, given that of the dense model."""
        (amount,) = self._given().values()
        if self.ratio is not None:
            return (1 - self.ratio) * dense
        if isinstance(amount, str):
            return float(amount[:-1]) / 100 * dense
        is_share = amount < 1 and self.latency_ms is None  # half a millisecond is one, half an operation is not
        return float(amount) * dense if is_share else float(amount)


class CompensateParams(Section):
    """How the layers that read cut channels make up for them."""

    num_images: int = Field(ge=1)
    """Calibration images."""
    num_timesteps: int = Field(ge=1)
    """Timesteps that the activations are taken at, evenly spaced; every image and timestep has noise of its own."""
    damping: float = Field(0.1, ge=1e-6, le=1e6)
    """λ, as a share of the mean square activation; draws towards the weights as they are."""
    rounds: int = Field(8, ge=1)
    """Parts that the layers are corrected in, in running order; each sees the activations that those before it left."""


class PruneParams(Section):
    """How much is cut, and where."""

    target: Target
    ranking: Literal["uniform", "global"] = "uniform"
    """uniform takes the same share from every group; global ranks all channels by score over their group's mean."""
    order: Literal["interleaved", "upfront"] = "interleaved"
    """interleaved scores a group after those before it were cut, as the original does; upfront on dense widths."""
    round_to: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Widths that are cut become multiples of this; each head's, where an attention has several."""
    floor: float = Field(0, ge=0, lt=1)
    """Share of its channels that every group keeps."""
    heads: Literal["width", "whole"] = "width"
    """Whether an attention with several heads gets narrower heads or fewer."""
    include: tuple[str, ...] = ("*",)
    """Patterns of layers that may lose outputs, such as up_blocks.*; a group goes only if all of its layers may."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that may not."""
    compensate: CompensateParams | None = None
    """Correct the weights that are left by least squares; null leaves them."""
    latency_repeats: int = Field(30, ge=3)
    """Timed passes of each candidate, for a target in milliseconds."""
