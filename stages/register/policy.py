"""mlflow/promotion.yaml -> the promotion policy, and the result of one of its checks."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from stages.models.params import PrecisionName
from stages.models.variants.kinds import Kind, parse_kind
from stages.runtime.schema import Section, read_yaml

Tolerance = Annotated[float, Field(ge=0)]
SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def _check_fid_tolerance(tolerance: float | str) -> float | str:
    if isinstance(tolerance, str) and SHARE.fullmatch(tolerance):
        return tolerance
    with suppress(ValueError):
        if 0 <= (number := float(tolerance)) < math.inf:
            return number
    raise ValueError("give a share such as 50%, or a FID of 0 or more")


FidTolerance = Annotated[float | str, AfterValidator(_check_fid_tolerance)]
"""A share such as 50%, or a FID: what is small for one data set and extractor is more than the whole FID of another."""


def resolve_tolerance(tolerance: float | str, scale: float) -> float:
    """Return a tolerance as a FID; a share is one of `scale`."""
    share = SHARE.fullmatch(tolerance) if isinstance(tolerance, str) else None
    return float(share[1]) / 100 * scale if share else float(tolerance)


class ChampionTolerance(Section):
    """How much worse than the champion a version may be.

    FID and SSIM: the worse end of the 95 % interval of the paired difference counts.
    """

    fid: FidTolerance
    """Largest FID above the champion's; sets of images are paired. A share is one of the dense model's FID, or of the
    floor, the FID of one half of the real images against the other, where that is larger."""
    fid_dense: FidTolerance | None = None
    """Largest FID to the dense model's images above the champion's; sets of images are paired. A share is one of the
    floor, the FID between sets of the dense model from different noise. Null: not checked."""
    ssim: Tolerance
    """Largest SSIM below the champion's, both against the same dense model; sets of images are paired."""
    speed_up: Annotated[float, Field(ge=0, lt=1)]
    """Largest loss of speed-up over the dense model, as a share of the champion's speed-up."""


class DenseTolerance(Section):
    """How far from the dense model a version may be; it keeps many small losses from adding up to a large one."""

    fid: FidTolerance
    """Largest FID above the dense model's, at the upper end of the 95 % interval; shares as in `champion`."""
    fid_dense: FidTolerance | None = None
    """Largest FID to the dense model's images from the same noise, at the upper end of the 95 % interval; shares as in
    `champion`. Null: not checked."""
    ssim: Annotated[float, Field(ge=0, le=1)]
    """Largest SSIM below 1, at the lower end of the 95 % interval."""


class MacsLimit(Section):
    """How much computation a version may need."""

    macs: Annotated[float, Field(gt=0, le=1)]
    """Largest share of the dense model's MACs."""


class LatencyLimit(Section):
    """The row of costs.json that counts, and the least speed-up in it."""

    batch: Annotated[int, Field(ge=1)]
    """Batch size, in images."""
    precision: PrecisionName
    mode: Literal["eager", "compiled"]
    speed_up: Tolerance
    """Least speed-up over the dense model, as a factor, at the lower end of the 95 % interval."""


class CanaryTolerance(Section):
    """How far the samples of a downloaded version may be from those that Espalier draws from its weights."""

    levels: Annotated[float, Field(ge=0, le=255)]
    """Largest mean absolute difference of an image, in grey levels from 0 to 255."""


class VariantLimit(Section):
    """A variant of the finetuned model that a version must hold, and how good and fast it must be."""

    kind: str | tuple[str, ...]
    """Its kind as in the block variants of params.yaml: onnx, int8-dynamic, int8, int4, float8, cache-N, or a list
    such as [int8, cache-2]."""
    fid: FidTolerance
    """Largest FID above the dense model's, as in `dense`."""
    fid_dense: FidTolerance | None = None
    """Largest FID to the dense model's images, as in `dense`. Null: not checked."""
    ssim: Annotated[float, Field(ge=0, le=1)]
    """Largest SSIM below 1, as in `dense`."""
    speed_up: Tolerance | None = None
    """Least speed-up over the dense model in PyTorch, as a factor, at the lower end of the 95 % interval, in the
    runtime that the variant is for. Null: not checked."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Batch size at which `speed_up` counts, in images."""
    levels: Annotated[float, Field(ge=0, le=255)] = 1.0
    """For graphs, largest mean absolute difference of an image that the version draws with the variant from the one
    that Espalier draws from the version's weights, in grey levels from 0 to 255."""

    @field_validator("kind")
    @classmethod
    def _is_kind(cls, kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
        parse_kind(kind)
        return kind

    def parsed(self) -> Kind:
        """Return the kind."""
        return parse_kind(self.kind)


class Policy(Section):
    """What a version must fulfil to become the champion."""

    champion: ChampionTolerance
    dense: DenseTolerance
    budget: MacsLimit
    latency: LatencyLimit
    canary: CanaryTolerance
    variant: VariantLimit | None = None
    """A variant that every version must hold. Null: none is asked for."""


@dataclass(frozen=True)
class Check:
    """The result of one check of the gate."""

    name: str
    passed: bool
    reason: str
    """What was found, and what is allowed."""


def load_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        InputError: The file is missing or is not valid YAML, or a value is not allowed.
    """
    return read_yaml(path, Policy)
