"""Types of params.yaml that several stages read."""

from typing import Literal

from pydantic import Field, model_validator

from stages.runtime.schema import Section

CriterionName = Literal["random", "magnitude", "taylor", "diff-pruning", "no-cancel-taylor", "fisher", "snr-taylor"]
FormulaName = Literal["paper", "diffusers", "ldm"]
PrecisionName = Literal["float32", "tf32", "bfloat16"]
"""float32 in full; tf32: of float32 tensors, but for products and convolutions tensor cores of an NVIDIA GPU round the
factors to 10 bits; bfloat16."""
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
STEP_EVENLY = ("DDIM", "PNDM")
"""Samplers of diffusers that step from t to t − T // steps, wherever the next timestep is."""
CLIPPING = "DDIM", "DDPM", "HeunDiscrete"
THRESHOLDING = "DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"
"""Samplers that clip their estimates of the clean image where the model says so, and those that threshold them."""
CALL_TWICE = ("HeunDiscrete", "PNDM")
"""Samplers that call the model at some timesteps twice."""


class RoundsParams(Section):
    """Pruning in several rounds, with a short recovery between them."""

    count: int = Field(1, ge=1, le=100)
    """Number of cuts. Their sizes divide the way from the dense model to prune.target by equal factors; 1 cuts once."""
    steps: int = Field(50, ge=1)
    """Optimiser steps of the recovery after each cut but the last, out of finetune.steps; unused if count is 1."""

    @property
    def steps_before_last(self) -> int:
        """Optimiser steps of all recoveries but the last."""
        return (self.count - 1) * self.steps


class SamplerParams(Section):
    """How images are sampled."""

    scheduler: SchedulerName = "DDIM"
    """Name of the diffusers class without "Scheduler"; the noise schedule is always the model's own."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "leading"
    """Spacing of the timesteps, as diffusers names it; quadratic (Song et al., 2021, appendix D.2) is for DDIM only."""
    steps: int = Field(ge=1)
    """Number of sampling steps, at most that of the model's timesteps."""
    eta: float = Field(0.0, ge=0, le=1)
    """Noise of each DDIM step relative to DDPM's; 0 is deterministic."""
    clip: bool | None = None
    """Whether DDIM, DDPM and HeunDiscrete clip each estimate of the clean image, to [-1, 1] or the model's
    `clip_sample_range`; null takes the model's own setting, which may also be thresholding."""

    @model_validator(mode="after")
    def _scheduler_supports_options(self) -> "SamplerParams":
        if self.scheduler != "DDIM" and (self.eta or self.spacing == "quadratic"):
            raise ValueError(f"scheduler {self.scheduler} has neither eta nor spacing quadratic; use scheduler DDIM")
        if self.scheduler not in CLIPPING and self.clip:
            found = f"scheduler {self.scheduler} does not clip"
            raise ValueError(f"{found}; use {', '.join(CLIPPING[:-1])} or {CLIPPING[-1]}, or set clip to null")
        if self.scheduler == "DDIM" and self.spacing == "linspace":
            raise ValueError(
                "scheduler DDIM steps by T / steps and misses the timesteps of linspace; use leading or trailing"
            )
        return self


class SamplesParams(Section):
    """Images drawn from the model during the training, always from the same noise."""

    every: int = Field(ge=1)
    """Steps between two rows of samples."""
    num_images: int = Field(8, ge=1, le=64)
    """Images per row."""
    steps: int = Field(20, ge=1)
    """DDIM steps, a divisor of the model's timesteps."""

    @property
    def sampler(self) -> SamplerParams:
        """The sampler of these images."""
        return SamplerParams(steps=self.steps)
