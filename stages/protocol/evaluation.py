"""evaluation.json: what an evaluation found, as every other program reads it; docs/metrics.md explains each key."""

from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from stages.protocol.protocol import Protocol
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_json

DENSE = "dense"


class Difference(Frozen):
    """How much a metric is above that of the dense model, set by set."""

    mean: float
    half_width: float | None
    """Of the 95 % interval; None for a single set."""
    is_distinct: bool | None
    """Whether zero lies outside the interval."""


class Metric(Frozen):
    """One metric of one model."""

    sets: list[float] = Field(min_length=1)
    mean: float
    half_width: float | None
    above_dense: Difference | None = None
    """None for the dense model, and for SSIM and MSE, which are differences themselves."""


class Pair(Frozen):
    """One pair of images from the same noise."""

    set: int
    index: int
    ssim: float
    mse: float


class Model(Frozen):
    """One model."""

    params: int = Field(gt=0)
    macs: int = Field(gt=0)
    """Without the products inside attention, as in the paper's tables."""
    attention_macs: int
    size_bytes: int
    """Of the weights on disk."""
    weights_sha256: Sha256
    """Of that file."""
    fid: Metric
    kid: Metric
    precision: Metric
    recall: Metric
    ssim: Metric
    mse: Metric
    fid_pooled: float
    """FID of all sets as one, which has less bias and no interval."""
    ssim_quantiles: dict[str, float]
    worst_pairs: list[Pair] = Field(min_length=1)
    """The lowest SSIM first."""

    def metric(self, name: str) -> Metric:
        """Give a metric by its name."""
        found: Metric = getattr(self, name)
        return found


class EvaluationRecord(Frozen):
    """An evaluation of a dense model and others under one protocol."""

    protocol_id: str
    protocol: Protocol
    dense_sha256: Sha256
    """Of the dense model's weights, by `tensors_sha256`."""
    floor_fid: float
    """Of one half of the real images against the other."""
    models: dict[str, Model]

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluationRecord":
        if self.protocol_id != self.protocol.id:
            raise ValueError(f"protocol_id is {self.protocol_id}, that of the protocol beside it {self.protocol.id}")
        if DENSE not in self.models:
            raise ValueError(f"models has no {DENSE}")
        metrics = [model.metric(name) for model in self.models.values() for name in METRICS]
        if any(len(metric.sets) != self.protocol.sets for metric in metrics):
            raise ValueError("a metric has not as many values as there are sets")
        return self

    def macs_ratio(self, name: str) -> float:
        """Give the dense model's MACs over those of another."""
        return self.models[DENSE].macs / self.models[name].macs


METRICS = tuple(name for name, field in Model.model_fields.items() if field.annotation is Metric)


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read what the evaluate stage wrote.

    Raises:
        InputError: evaluation.json is missing, damaged or of another version.
    """
    path = folder / "evaluation.json"
    try:
        return EvaluationRecord.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path} is no evaluation of this version ({where}: {first['msg']}); evaluate again") from None
