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


class Cost(Frozen):
    """What a forward pass of one model costs in one setting; without times where it was left out."""

    model: str
    batch: int
    precision: str
    mode: str
    """eager or compiled."""
    device: str
    passes: int = 0
    """How often it was timed."""
    median_ms: float | None = None
    p95_ms: float | None = None
    """None from fewer than 20 passes."""
    images_per_s: float | None = None
    speed_up: float | None = None
    """Over the first model: the median of the ratios of passes that were timed in turn."""
    speed_up_low: float | None = None
    """Ends of its 95 % interval, by the bootstrap."""
    speed_up_high: float | None = None
    peak_bytes: int | None = None
    """Eager only."""
    left_out: str = ""
    """Why there are no times."""


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
    costs: list[Cost] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluationRecord":
        if self.protocol_id != self.protocol.id:
            raise ValueError(f"protocol_id is {self.protocol_id}, that of the protocol beside it {self.protocol.id}")
        if DENSE not in self.models or {cost.model for cost in self.costs} != set(self.models):
            raise ValueError("the models and those of the costs are not the same")
        metrics = [model.metric(name) for model in self.models.values() for name in METRICS]
        if any(len(metric.sets) != self.protocol.sets for metric in metrics):
            raise ValueError("a metric has not as many values as there are sets")
        return self

    def headline(self, name: str) -> Cost:
        """Give the row of the truth table that stands in the results: the model's first."""
        return next(cost for cost in self.costs if cost.model == name)

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
