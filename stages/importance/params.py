"""The block `importance` of params.yaml."""

from pydantic import Field, model_validator

from stages.models.params import CriterionName, FormulaName, PrecisionName
from stages.runtime.schema import Section


class ReportParams(Section):
    """Diagnostics of the importance: a heatmap of its origin and the stability of its rankings."""

    timesteps: int = Field(20, ge=2)
    """Number of timesteps of both diagnostics, evenly spaced over those that the importance used."""
    draws: int = Field(3, ge=2)
    """Number of independent calibration batches whose rankings are compared, pair by pair."""


class DrawParams(Section):
    """Calibration images that the dense model draws itself, anew at every timestep."""

    steps: int = Field(20, ge=1)
    """DDIM steps of each image, from the model's own schedule; a divisor of its timesteps."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale of a conditional model; null or 1 disables it."""


class ImportanceParams(Section):
    """How the importance of each weight for the denoising loss is measured."""

    criterion: CriterionName = "diff-pruning"
    """Formula of the saliency; stages/importance/criteria.py defines each."""
    formula: FormulaName = "paper"
    """Which implementation of Diff-Pruning to follow: paper is ddpm_exp, diffusers is ddpm_prune.py, ldm is ldm_exp,
    which also gives all norm groups the scores of their first one and needs `draw`."""
    threshold: float = Field(0.05, ge=0, lt=1)
    """For diff-pruning, no-cancel-taylor and fisher: the sum over timesteps ends once L_t / L_max < threshold."""
    num_images: int = Field(16, ge=1)
    """Images in a calibration batch; all timesteps share one noise tensor of this batch size, unless `draw` is set."""
    draw: DrawParams | None = None
    """Draw images of distinct classes and their noise anew at every timestep; null takes training images."""
    batches: int = Field(1, ge=1)
    """Number of calibration batches, taken one after the other; memory does not depend on it."""
    noises: int = Field(1, ge=1)
    """Number of noise tensors for each batch."""
    stride: int = Field(1, ge=1)
    """Distance between two timesteps; 1 uses all."""
    num_timesteps: int | None = Field(None, ge=1)
    """Use only this many of these timesteps, from t = 0 on; null uses all."""
    timesteps_per_pass: int = Field(1, ge=1)
    """Timesteps in one forward and backward pass; no-cancel-taylor and fisher always use 1."""
    precision: PrecisionName = "float32"
    """Precision of losses and gradients: float32, tf32 (NVIDIA GPUs from Ampere on), or bfloat16 under autocast;
    weights and sums stay float32."""
    deterministic: bool = True
    """Whether only kernels run that repeat their result bit for bit; false lets a GPU choose for speed."""
    report: ReportParams | None = ReportParams()
    """The diagnostics; null skips them and their extra passes."""

    @model_validator(mode="after")
    def _check_draw(self) -> "ImportanceParams":
        if self.formula == "ldm" and self.draw is None:
            raise ValueError(
                "formula ldm draws its images anew at every timestep; give draw, such as {steps: 20, guidance: 3.0}"
            )
        return self
