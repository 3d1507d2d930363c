"""evaluation.json: the record of an evaluation; docs/metrics.md explains each key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stages.protocol.intervals import estimate, paired_difference
from stages.protocol.protocol import Protocol
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record

DENSE = "dense"
FID_DENSE, FID_DENSE_UNPAIRED = "fid_dense", "fid_dense_unpaired"
TO_DENSE = (FID_DENSE, "ssim", "mse")
"""Metrics that compare a model's images with those of the dense model from the same noise."""
VISIBLE_SSIM = 0.9
"""Below this SSIM a pair of images differs visibly: at a glance, side by side."""
SHOWN = 48
"""Images of the first set, at most, that are kept for the pictures."""
SNAPSHOT = "step-"
"""Prefix of the names of snapshots, which end with the step."""


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
    """Half of the width of the 95 % interval over the sets; None for a single set, and for `fid_dense_unpaired`."""
    above_dense: Difference | None = None
    """Difference from the dense model; None for the dense model, and for `TO_DENSE`, which compare with it anyway."""


class Pair(Frozen):
    """Similarity of one pair of images from the same noise."""

    set: int
    index: int
    """Position in the set."""
    ssim: float
    mse: float


class ClassChange(Frozen):
    """How one class of images changed."""

    name: str
    images: int
    """The dense model's images of the class."""
    visible: int
    """How many of them differ visibly from the model's image of the same noise."""
    changed: int | None
    """How many of these are predicted to be of another class; None if the extractor has no classifier."""


def make_metric(values: Sequence[float], dense: Sequence[float] | None = None) -> Metric:
    """Make the record of a metric from its value in each set, and from the dense model's for the difference."""
    found, above = estimate(values), None
    if dense is not None:
        apart = paired_difference(values, dense)
        above = Difference(mean=apart.mean, half_width=apart.half_width, is_distinct=apart.is_distinct)
    return Metric(sets=list(values), mean=found.mean, half_width=found.half_width, above_dense=above)


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
    fid_dense: Metric | None = None
    """FID of each set to the dense model's set from the same noise; None in records from before the field."""
    fid_dense_unpaired: Metric | None = None
    """FID of each set to the dense model's next set, from other noise; None for a single set. Without an interval,
    because two values share each dense set."""
    ssim_quantiles: dict[str, float]
    worst_pairs: list[Pair] = Field(min_length=1)
    """Pairs with the lowest SSIM, lowest first."""
    visible_pairs: int | None = None
    """Number of pairs with an SSIM below VISIBLE_SSIM; None in records from before the field."""
    classes: tuple[ClassChange, ...] = ()
    """The pairs by class; empty for the dense model, and where `classes_by` is None."""

    def metric(self, name: str) -> Metric:
        """Return the metric of a name."""
        found: Metric = getattr(self, name)
        return found

    def metrics(self) -> dict[str, Metric]:
        """Return METRICS and, unless the record is from before that field, FID_DENSE by name."""
        more = {FID_DENSE: self.fid_dense} if self.fid_dense else {}
        return {name: self.metric(name) for name in METRICS} | more


class EvaluationRecord(Frozen):
    """Evaluation of a dense model and of models pruned from it, under one protocol."""

    protocol_id: str
    protocol: Protocol
    dense_sha256: Sha256
    """Of the dense model's weights, with those of its autoencoder and conditions, by `reference.dense_sha256`."""
    floor_fid: float
    """FID between two halves of the real images."""
    classes_by: Literal["labels", "predictions"] | None = None
    """Where the classes of `Model.classes` come from: the conditions of a conditional model, or the extractor's
    predictions for the dense model's images; None if there are neither, and in records from before the field."""
    models: dict[str, Model]

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluationRecord":
        if self.protocol_id != self.protocol.id:
            raise ValueError(f"protocol_id is {self.protocol_id}, but the protocol has the id {self.protocol.id}")
        if DENSE not in self.models:
            raise ValueError(f"models has no {DENSE}")
        models = self.models.values()
        metrics = [metric for model in models for metric in (*model.metrics().values(), model.fid_dense_unpaired)]
        if any(metric and len(metric.sets) != self.protocol.sets for metric in metrics):
            raise ValueError(f"a metric does not have one value for each of the {self.protocol.sets} sets")
        if len({(model.fid_dense is None, model.fid_dense_unpaired is None) for model in models}) > 1:
            raise ValueError(f"some models have {FID_DENSE} or {FID_DENSE_UNPAIRED} and others have not")
        return self

    @property
    def fid_dense_floor(self) -> float | None:
        """FID between sets of the dense model from different noise; None for one set, or from before the field."""
        unpaired = self.models[DENSE].fid_dense_unpaired
        return unpaired.mean if unpaired else None

    @property
    def num_pairs(self) -> int:
        """Pairs of images that a model is compared with the dense one on."""
        return self.protocol.sets * self.protocol.num_images

    def macs_ratio(self, name: str) -> float:
        """Ratio of the dense model's MACs to those of another model."""
        return self.models[DENSE].macs / self.models[name].macs


METRICS = tuple(name for name, field in Model.model_fields.items() if field.annotation is Metric)
"""The metrics that every record has."""


def read_snapshots(folder: Path) -> EvaluationRecord:
    """Read snapshots.json: the dense model and the finetuned model's snapshots, if finetune.snapshots asks for some.

    Raises:
        InputError: snapshots.json is missing, damaged or of another version.
    """
    remedy = "set finetune.snapshots and run the stages finetune and evaluate"
    return read_record(folder / "snapshots.json", EvaluationRecord, remedy)


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read evaluation.json, which the evaluate stage writes.

    Raises:
        InputError: evaluation.json is missing, damaged or of another version.
    """
    return read_record(folder / "evaluation.json", EvaluationRecord, "run the evaluate stage again")
