"""costs.json: what a forward pass of each model costs on one device."""

from pathlib import Path

from pydantic import Field, model_validator

from stages.protocol.evaluation import DENSE
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record

VARIANT_COSTS = "variants.json"
"""File beside costs.json with a record of the same form, of models and their variants; absent without variants."""


class Cost(Frozen):
    """Time and memory of a forward pass of one model in one setting; times are None where it was left out."""

    model: str
    batch: int
    precision: str
    mode: str
    """eager or compiled; onnxruntime for graphs."""
    device: str
    deterministic: bool = True
    """Whether deterministic kernels were timed, as in all records without this field."""
    passes: int = 0
    """Number of timed passes."""
    median_ms: float | None = None
    p95_ms: float | None = None
    """95th percentile; None for fewer than 20 passes."""
    images_per_s: float | None = None
    speed_up: float | None = None
    """Relative to the first model: the median ratio of passes that were timed in turn."""
    speed_up_low: float | None = None
    """Lower end of the 95 % interval of speed_up, by the bootstrap."""
    speed_up_high: float | None = None
    """Upper end of the interval."""
    peak_bytes: int | None = None
    """Peak memory; None for compiled passes. Of a graph: the growth of a process with ONNX Runtime and NumPy alone."""
    joules_per_image: float | None = None
    """Energy of the processor packages or of the GPU during a pass, for each image of the batch, whoever else computes
    and with what they take when idle; None where the machine has no counter that can be read."""
    energy_source: str = ""
    """The counter: RAPL with the number of packages, or NVML; empty where there is none."""
    left_out: str = ""
    """Reason why there are no times; empty where there are."""

    @property
    def kernels(self) -> str:
        """The kernels that ran, in words."""
        return "deterministic kernels" if self.deterministic else "kernels chosen for speed"


class CostsRecord(Frozen):
    """The time and memory of the models' forward passes, measured in one run on one device."""

    weights_sha256: dict[str, Sha256]
    """Model -> the hash of its weights' file."""
    costs: list[Cost] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_rows_of_all_models(self) -> "CostsRecord":
        if DENSE not in self.weights_sha256 or {cost.model for cost in self.costs} != set(self.weights_sha256):
            raise ValueError("the models of weights_sha256 and those of the costs are not the same")
        return self

    def first(self, model: str) -> Cost:
        """Return the row of a model that the results table shows: that of the first batch and precision."""
        return next(cost for cost in self.costs if cost.model == model)


def read_variant_costs(folder: Path) -> CostsRecord | None:
    """Read the costs of the variants, which the costs stage writes if there are any.

    Raises:
        InputError: The file is damaged or of another version.
    """
    path = folder / VARIANT_COSTS
    return read_record(path, CostsRecord, "run the costs stage again") if path.is_file() else None


def read_costs(folder: Path) -> CostsRecord:
    """Read costs.json, which the costs stage writes.

    Raises:
        InputError: costs.json is missing, damaged or of another version.
    """
    return read_record(folder / "costs.json", CostsRecord, "run the costs stage again")
