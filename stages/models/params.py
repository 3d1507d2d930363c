"""Types of params.yaml that several stages read."""

from typing import Literal

from pydantic import Field, model_validator

from stages.runtime.schema import Section

CriterionName = Literal["random", "magnitude", "taylor", "diff-pruning", "no-cancel-taylor", "fisher", "snr-taylor"]
FormulaName = Literal["paper", "diffusers"]
Quantity = Literal["channels", "macs", "params", "latency_ms"]
SchedulerName = Literal[
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "PNDM",
    "UniPCMultistep",
]


class SamplerParams(Section):
    """How pictures are drawn."""

    scheduler: SchedulerName = "DDIM"
    """By its name in diffusers, less "Scheduler"; the noise schedule is the model's own."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "leading"
    """Of the steps, in diffusers' words; leading is uniform from 0; quadratic, as the original's, is DDIM's."""
    steps: int = Field(ge=1, le=1000)
    eta: float = Field(0.0, ge=0, le=1)
    """Share of DDPM's noise in each step of DDIM; 0 is deterministic."""
    clip: bool | None = None
    """Whether each estimate of the clean image is clipped to [-1, 1], for DDIM and DDPM; null asks the model."""

    @model_validator(mode="after")
    def _is_known_to_the_scheduler(self) -> "SamplerParams":
        if self.scheduler != "DDIM" and (self.eta or self.spacing == "quadratic"):
            raise ValueError(f"scheduler {self.scheduler} has neither eta nor spacing quadratic; only DDIM has")
        if self.scheduler not in ("DDIM", "DDPM") and self.clip:
            raise ValueError(f"scheduler {self.scheduler} does not clip; only DDIM and DDPM do")
        if self.scheduler == "DDIM" and self.spacing == "linspace":
            raise ValueError("scheduler DDIM goes down by T / steps and so misses linspace; take leading or trailing")
        return self
