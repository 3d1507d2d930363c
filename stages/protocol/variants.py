"""variants.json: the quality of variants of the models of an evaluation, under the same protocol."""

from pathlib import Path

from pydantic import Field, model_validator

from stages.models.variants.kinds import Form, Kind
from stages.protocol.evaluation import Metric
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record

VARIANTS_FILE = "variants.json"
MEASURED = ("fid", "fid_dense", "kid", "precision", "recall", "ssim", "mse")


class Variant(Frozen):
    """Size and quality of one variant."""

    model: str
    """The model that it was made from: dense, pruned or finetuned."""
    form: Form
    """What holds its weights."""
    interval: int = Field(ge=1)
    """Sampling steps from one full pass to the next; 1 without a cache."""
    size_bytes: int
    """Size of the file with its weights or graph."""
    sha256: Sha256
    """Hash of that file."""
    metrics: dict[str, Metric]
    """The metrics of MEASURED, as of the models of an evaluation."""
    ssim_to_model: Metric | None = None
    """SSIM with the images of the model that it was made from, from the same noise; None where that was not measured,
    in records of before November 2026."""

    @property
    def kind(self) -> Kind:
        """The kind of variant."""
        return Kind(self.form, self.interval)


class VariantsRecord(Frozen):
    """The variants of a compression; none where params.yaml asks for none."""

    protocol_id: str | None = None
    """The protocol of the reference; None without variants."""
    variants: dict[str, Variant]
    """Name, as that of its folder -> variant."""

    def flat_metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the means for DVC and MLflow, whose keys hold no plus signs: model -> kind -> metric -> mean."""
        flat: dict[str, dict[str, dict[str, float]]] = {}
        for variant in self.variants.values():
            means = {name: metric.mean for name, metric in variant.metrics.items()}
            to_model = {"ssim_to_model": variant.ssim_to_model.mean} if variant.ssim_to_model else {}
            numbers = {**means, **to_model, "size_bytes": float(variant.size_bytes)}
            flat.setdefault(variant.model, {})[variant.kind.name.replace("+", "_")] = numbers
        return flat

    @model_validator(mode="after")
    def _has_metrics(self) -> "VariantsRecord":
        if any(set(variant.metrics) != set(MEASURED) for variant in self.variants.values()):
            raise ValueError(f"a variant has other metrics than {', '.join(MEASURED)}")
        return self


def read_variants(folder: Path) -> VariantsRecord:
    """Read variants.json, which the variants stage writes.

    Raises:
        InputError: It is missing, damaged or of another version.
    """
    return read_record(folder / VARIANTS_FILE, VariantsRecord, "run the variants stage again")
