"""mlflow/promotion.yaml -> frozen, checked types; and what a version showed of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.runtime.schema import Section, read_yaml

Tolerance = Annotated[float, Field(ge=0)]


class ChampionTolerance(Section):
    """How much worse than the champion a version may be, at the worse end of the 95 % interval of the difference."""

    fid: Tolerance
    """FID above the champion's, paired set by set."""
    ssim: Tolerance
    """SSIM below the champion's, paired set by set; both against the same dense model."""
    speed_up: Annotated[float, Field(ge=0, lt=1)]
    """Share of the champion's speed-up that may be lost."""


class DenseTolerance(Section):
    """How far from the dense model a version may be, so that many small steps cannot add up to a large one."""

    fid: Tolerance
    """FID above the dense model's, at the upper end of the interval."""
    ssim: Annotated[float, Field(ge=0, le=1)]
    """SSIM below 1, at the lower end of the interval."""


class CostLimit(Section):
    """What it may cost."""

    macs: Annotated[float, Field(gt=0, le=1)]
    """Share of the dense model's MACs."""


class Latency(Section):
    """Which row of the truth table counts."""

    batch: Annotated[int, Field(ge=1)]
    precision: Literal["float32", "bfloat16"]
    mode: Literal["eager", "compiled"]
    speed_up: Tolerance
    """Least speed-up over the dense model, at the lower end of the interval."""


class Canary(Section):
    """The pictures that the version draws when it is loaded from the registry."""

    levels: Annotated[float, Field(ge=0, le=255)]
    """Mean absolute difference, in grey levels of 0 to 255, from those that it drew when it was registered."""


class Policy(Section):
    """All that a version must show."""

    champion: ChampionTolerance
    dense: DenseTolerance
    budget: CostLimit
    latency: Latency
    canary: Canary


@dataclass(frozen=True)
class Check:
    """One thing that a version must show."""

    name: str
    passed: bool
    reason: str
    """What was found, and what is allowed."""


def load_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        InputError: The file is missing, is no YAML, or a value is not allowed.
    """
    return read_yaml(path, Policy)
