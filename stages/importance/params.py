"""The block importance of params.yaml."""

from typing import Literal

from pydantic import Field

from stages.models.params import CriterionName, FormulaName
from stages.runtime.schema import Section


class ReportParams(Section):
    """What is measured beside the importance, to judge it by."""

    timesteps: int = Field(20, ge=2)
    """Timesteps of the heatmap and of the stability, evenly spaced."""
    draws: int = Field(3, ge=2)
    """Fresh calibration batches with fresh noise whose rankings are compared."""


class ImportanceParams(Section):
    """How much each weight matters to the denoising loss."""

    criterion: CriterionName
    formula: FormulaName
    """Which of the original's two engines to follow: paper is ddpm_exp, diffusers is ddpm_prune.py."""
    threshold: float = Field(ge=0, lt=1)
    """T of diff-pruning, no-cancel-taylor and fisher: the sum over timesteps ends where L_t / L_max falls below it."""
    num_images: int = Field(ge=1)
    """Images in a calibration batch; one noise tensor of that many serves all timesteps."""
    batches: int = Field(1, ge=1)
    """Calibration batches, one after the other; memory does not grow with them."""
    noises: int = Field(1, ge=1)
    """Noise tensors for each batch."""
    stride: int = Field(ge=1)
    """Distance between the timesteps used; 1 takes every one."""
    num_timesteps: int | None = Field(None, ge=1)
    """The first so many of them alone count; null takes all."""
    timesteps_per_pass: int = Field(1, ge=1)
    """Timesteps that share a forward and a backward pass; no-cancel-taylor and fisher need each alone and take 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes losses and gradients under autocast; weights and sums stay float32."""
    report: ReportParams | None = ReportParams()
    """null leaves out the heatmap and the stability, which cost some passes of their own."""
