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
    """How images are sampled."""

    scheduler: SchedulerName = "DDIM"
    """Name of the diffusers class without "Scheduler"; the noise schedule is always the model's own."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "leading"
    """Spacing of the timesteps, as diffusers names it; quadratic (Song et al., 2021, appendix D.2) is for DDIM only."""
    steps: int = Field(ge=1, le=1000)
    """Number of sampling steps."""
    eta: float = Field(0.0, ge=0, le=1)
    """Noise of each DDIM step relative to DDPM's; 0 is deterministic."""
    clip: bool | None = None
    """Whether DDIM and DDPM clip each estimate of the clean image to [-1, 1]; null takes the model's own setting."""

    @model_validator(mode="after")
    def _scheduler_supports_options(self) -> "SamplerParams":
        if self.scheduler != "DDIM" and (self.eta or self.spacing == "quadratic"):
            raise ValueError(f"scheduler {self.scheduler} has neither eta nor spacing quadratic; use scheduler DDIM")
        if self.scheduler not in ("DDIM", "DDPM") and self.clip:
            raise ValueError(f"scheduler {self.scheduler} does not clip; use DDIM or DDPM, or set clip to null")
        if self.scheduler == "DDIM" and self.spacing == "linspace":
            raise ValueError(
                "scheduler DDIM steps by T / steps and misses the timesteps of linspace; use leading or trailing"
            )
        return self
