"""The block `prune` of params.yaml."""

import math
import re
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from stages.models.params import Quantity, RoundsParams
from stages.runtime.errors import InputError
from stages.runtime.schema import Section


def _check_amount(amount: float | str) -> float | str:
    share = re.fullmatch(r"(\d+(\.\d+)?)%", amount) if isinstance(amount, str) else None
    number = float(share[1]) if share else amount
    if isinstance(number, str) or not 0 < number < math.inf:
        found = re.fullmatch(r"(\d+(\.\d+)?)\s*%?", str(amount))
        meant = f"did you mean {found[1]}%? " if isinstance(amount, str) and found and float(found[1]) else ""
        raise ValueError(f"{meant}give a number above 0, or a percentage of the dense model such as 56%")
    return amount


def _check_count(amount: float | str) -> float | str:
    """Refuse 44 where 44% is meant, since no model has that few."""
    if not isinstance(amount, str) and 1 <= amount <= 100:  # noqa: PLR2004  # percent
        raise ValueError(f"did you mean {amount:g}%? a number from 1 on is the count itself, such as 3.4e9")
    return amount


def _check_share(ratio: object) -> object:
    """Refuse 30 and 30% where 0.3 is meant."""
    found = re.fullmatch(r"(\d+(\.\d+)?)\s*(%?)", str(ratio))
    if found and (found[3] or 2 <= float(found[1]) <= 100):  # noqa: PLR2004  # percent
        raise ValueError(f"did you mean {float(found[1]) / 100:g}? the ratio is a share from 0 to below 1")
    return ratio


Amount = Annotated[float | str, AfterValidator(_check_amount)]
"""An absolute cost, or a percentage of the dense model's, such as 56%."""
Count = Annotated[Amount, AfterValidator(_check_count)]
"""An amount of what every model has more than a hundred of."""
Share = Annotated[float, BeforeValidator(_check_share), Field(ge=0, lt=1)]


class Target(Section):
    """Size of the pruned model; exactly one field is set."""

    ratio: Share | None = None
    """Share of the channels to remove; with ranking uniform, of every group, as in the paper. null: not the target."""
    macs: Count | None = None
    """Multiply-accumulates per image, without the matrix products inside attention: 3.4e9, 56% or 0.56 (a number below
    1 is a share of the dense model's). null: not the target."""
    params: Count | None = None
    """Parameters: 2e7, 56% or 0.56 (a number below 1 is a share of the dense model's). null: not the target."""
    latency_ms: Amount | None = None
    """Milliseconds of a forward pass of one image on this device: 12.5 or 56%. null: not the target."""

    @model_validator(mode="after")
    def _check_one(self) -> "Target":
        if len(self.given()) != 1:
            raise ValueError("give exactly one of ratio, macs, params, latency_ms")
        return self

    def given(self) -> dict[str, float | str]:
        """Return the field that is set: its name -> its value."""
        return {name: amount for name, amount in self if amount is not None}

    @property
    def quantity(self) -> Quantity:
        """The quantity that the target limits."""
        (name,) = self.given()
        return "channels" if name == "ratio" else cast("Quantity", name)

    def resolve(self, dense: float) -> float:
        """Compute the target cost from that of the dense model."""
        (amount,) = self.given().values()
        if self.ratio is not None:
            return (1 - self.ratio) * dense
        if isinstance(amount, str):
            return float(amount[:-1]) / 100 * dense
        is_share = (
            amount < 1 and self.latency_ms is None
        )  # 0.5 ms is a valid latency, 0.5 operations are not a valid cost
        return float(amount) * dense if is_share else float(amount)

    def on_the_way(self, part: float, dense: float) -> "Target":
        """Return the target after a part of the way, in [0, 1], on which equal parts shrink by equal factors."""
        share = (self.resolve(dense) / dense) ** part
        if self.ratio is not None:
            return Target(ratio=1 - share)
        (name,) = self.given()
        return Target.model_validate({name: f"{100 * share:.6f}%"})


class CalibrationParams(Section):
    """The noisy images on which models are compared."""

    num_images: int = Field(8, ge=1)
    """Number of calibration images."""
    num_timesteps: int = Field(10, ge=1)
    """Number of timesteps, in the middle of equal parts of the schedule; each pair of image and timestep has its own
    noise."""


class CompensateParams(CalibrationParams):
    """Least-squares correction of the layers that read removed channels."""

    damping: float = Field(0.01, ge=1e-6, le=1e6)
    """λ over the mean square activation; larger values stay closer to the uncorrected weights."""
    early_weight: float = Field(1.0, ge=1e-6, le=1e6)
    """Weight of the first sampling step, the noisiest, over that of the last: w(t) = early_weight^(t / last timestep).
    The errors of early steps accumulate; 1 weighs all timesteps alike."""
    rounds: int | None = Field(None, ge=1)
    """Most parts into which the layers are divided, in order of execution; each part is corrected on activations of the
    model with the parts before it corrected. null: only layers with equal inputs, such as queries, keys and values, are
    in one part. Fewer parts take less time and may harm."""


def _check_remove(remove: object) -> object:
    """Accept a number of branches, a share of those that can go, a way to find the number, or their names."""
    if remove in ("target", "search"):
        return remove
    if isinstance(remove, list | tuple) and remove and all(isinstance(name, str) and name for name in remove):
        return tuple(remove)
    share = re.fullmatch(r"(\d+(\.\d+)?)%", remove) if isinstance(remove, str) else None
    number = float(share[1]) / 100 if share else remove
    if isinstance(number, float) and 0 < number < 1:
        return number
    if isinstance(remove, int) and not isinstance(remove, bool) and remove > 0:
        return remove
    raise ValueError("give a number of branches from 1 on, a share below 1 such as 25%, target, search, or their names")


class DepthParams(CalibrationParams):
    """Removal of whole residual branches, of which the shortcuts stay, before channels are cut."""

    order: Literal["greedy", "similarity", "score"] = "greedy"
    """Which branch goes first. greedy: the one whose removal changes the prediction least, measured anew after each.
    similarity: the one whose module changes its input least, by the cosine of shortcut and output. score: the one whose
    weights have the lowest sum of scores. The branches before it in the order are gone, too."""
    remove: Annotated[int | float | str | tuple[str, ...], BeforeValidator(_check_remove)]
    """How many branches go: a number; a share of those that can go (25% or 0.25); target: as many as prune.target needs
    if no channel is cut; search: of `candidates` numbers, the one that changes the prediction least once channels are
    cut to prune.target; or a list of their modules, for which `order` has no meaning."""
    num_images: int = Field(16, ge=1)
    """Number of calibration images."""
    candidates: int = Field(4, ge=2, le=64)
    """Numbers of branches that search tries, from none to the most before the target is reached."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The modules that are listed; None if they are chosen by `order`."""
        return self.remove if isinstance(self.remove, tuple) else None

    @property
    def needs_images(self) -> bool:
        """Whether the choice is made on calibration images."""
        return self.remove == "search" or (self.names is None and self.order != "score")


Heads = Literal["width", "whole"]


class PruneParams(Section):
    """How many channels are removed, and from which layers."""

    target: Target
    """Size of the pruned model."""
    ranking: Literal["uniform", "global"] = "uniform"
    """uniform: remove the same share from every group. global: rank all channels by score over their group's mean."""
    order: Literal["interleaved", "upfront"] = "interleaved"
    """interleaved: score a group after those before it were cut, as in the original. upfront: score dense widths."""
    round_to: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Widths of cut groups become multiples of this, except under geglu halves; in attention with several heads, the
    width of a head."""
    floor: float = Field(0, ge=0, lt=1)
    """Share of its channels that every group keeps at least."""
    heads: Heads = "width"
    """Attention with several heads gets narrower heads (width) or fewer heads (whole)."""
    geglu: Literal["pairs", "halves"] = "pairs"
    """pairs: rank each value of a GEGLU with its gate. halves: rank all values and gates of a GEGLU, as the original's
    LDM code does, and cut a pair if either is among the lowest; a ratio of 0.3 then cuts about half of the pairs, and
    how many depends on the scores. halves needs target.ratio and ranking uniform."""
    include: tuple[str, ...] = ("*",)
    """Patterns of layers that may lose outputs, such as up_blocks.*; a group is cut only if all its layers match."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that keep all their outputs."""
    compensate: CompensateParams | None = None
    """Least-squares correction of the remaining weights; null skips it."""
    depth: DepthParams | None = Field(None, exclude_if=lambda depth: depth is None)
    """Removal of whole residual branches; null removes none, and is left out of records, which keep their hash."""
    latency_repeats: int = Field(30, ge=3)
    """Timed passes of each candidate, for target latency_ms."""

    @model_validator(mode="after")
    def _check_geglu(self) -> "PruneParams":
        if self.geglu == "halves" and (self.target.ratio is None or self.ranking != "uniform"):
            raise ValueError("geglu halves needs target.ratio and ranking uniform; give them, or set geglu to pairs")
        return self

    @model_validator(mode="after")
    def _check_depth(self) -> "PruneParams":
        if self.depth is None:
            return self
        if self.depth.remove in ("target", "search") and self.target.ratio is not None:
            raise ValueError(
                f"depth.remove {self.depth.remove} needs target.macs, params or latency_ms; give one of them"
            )
        if self.depth.remove == "target" and self.compensate is not None:
            raise ValueError(
                "depth.remove target cuts no channel, so there is nothing to compensate; set compensate to null"
            )
        return self

    def check_rounds(self, rounds: RoundsParams) -> None:
        """Check that the target can be reached in several cuts.

        Raises:
            InputError: It is a latency, the cut of GEGLU has no size of its own, or branches are removed.
        """
        if rounds.count > 1 and self.target.latency_ms is not None:
            found = "prune.target.latency_ms cannot be divided into rounds, since times vary from run to run"
            raise InputError(f"{found}; give ratio, macs or params, or set rounds.count to 1")
        if rounds.count > 1 and self.geglu == "halves":
            found = "prune.geglu halves cannot be divided into rounds, since scores decide how many pairs it cuts"
            raise InputError(f"{found}; set it to pairs, or rounds.count to 1")
        if rounds.count > 1 and self.depth is not None:
            found = "prune.depth cannot be divided into rounds, since only the first cut of a model can remove branches"
            raise InputError(f"{found}; set it to null, or rounds.count to 1")
