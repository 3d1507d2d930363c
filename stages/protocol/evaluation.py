"""evaluation.json: the record of an evaluation; docs/metrics.md explains each key."""

from pathlib import Path

from pydantic import Field, model_validator

from stages.protocol.protocol import Protocol
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record

DENSE = "dense"


class Difference(Frozen):
    """Difference of a metric from that of the dense model, paired set by set."""

    mean: float
    half_width: float | None
    """Half of the width of the 95 % interval; None for a single set."""
    is_distinct: bool | None
    """Whether zero lies outside the interval; None for a single set."""


class Metric(Frozen):
    """One metric of one model."""

    sets: list[float] = Field(min_length=1)
    """Value of each set."""
    mean: float
    half_width: float | None
    """Half of the width of the 95 % interval over the sets; None for a single set."""
    above_dense: Difference | None = None
    """Difference from the dense model; None for the dense model, and for SSIM and MSE, which compare with it anyway."""


class Pair(Frozen):
    """Similarity of one pair of images from the same noise."""

    set: int
    index: int
    """Position in the set."""
    ssim: float
    mse: float


class Model(Frozen):
    """Size, quality and consistency of one model."""

    params: int = Field(gt=0)
    macs: int = Field(gt=0)
    """Multiply-accumulates for one image, without the matrix products inside attention, as in the paper's tables."""
    attention_macs: int
    """Multiply-accumulates of these products."""
    size_bytes: int
    """Size of the weights' file."""
    weights_sha256: Sha256
    """Hash of the weights' file."""
    fid: Metric
    kid: Metric
    precision: Metric
    recall: Metric
    ssim: Metric
    mse: Metric
    fid_pooled: float
    """FID of all sets together, which is less biased and has no interval."""
    ssim_quantiles: dict[str, float]
    worst_pairs: list[Pair] = Field(min_length=1)
    """Pairs with the lowest SSIM, lowest first."""

    def metric(self, name: str) -> Metric:
        """Return the metric of a name."""
        found: Metric = getattr(self, name)
        return found


class EvaluationRecord(Frozen):
    """Evaluation of a dense model and of models pruned from it, under one protocol."""

    protocol_id: str
    protocol: Protocol
    dense_sha256: Sha256
    """Hash of the dense model's weights, by `tensors_sha256`."""
    floor_fid: float
    """FID between two halves of the real images."""
    models: dict[str, Model]

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluationRecord":
        if self.protocol_id != self.protocol.id:
            raise ValueError(f"protocol_id is {self.protocol_id}, but the protocol has the id {self.protocol.id}")
        if DENSE not in self.models:
            raise ValueError(f"models has no {DENSE}")
        metrics = [model.metric(name) for model in self.models.values() for name in METRICS]
        if any(len(metric.sets) != self.protocol.sets for metric in metrics):
            raise ValueError(f"a metric does not have one value for each of the {self.protocol.sets} sets")
        return self

    def macs_ratio(self, name: str) -> float:
        """Ratio of the dense model's MACs to those of another model."""
        return self.models[DENSE].macs / self.models[name].macs


METRICS = tuple(name for name, field in Model.model_fields.items() if field.annotation is Metric)


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read evaluation.json, which the evaluate stage writes.

    Raises:
        InputError: evaluation.json is missing, damaged or of another version.
    """
    return read_record(folder / "evaluation.json", EvaluationRecord, "run the evaluate stage again")
