"""The block finetune of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.runtime.schema import Section


class LossParams(Section):
    """What the pruned model is trained on: a sum of losses with these weights; one of weight 0 costs nothing."""

    noise: float = Field(1, ge=0)
    """Of the squared error of the noise, the loss that the dense model was trained with."""
    output: float = Field(0, ge=0)
    """Of the squared distance from what the dense model predicts."""
    feature: float = Field(0, ge=0)
    """Of the relative squared distance from the dense model's features, cut to the channels that were kept."""
    min_snr: float | None = Field(None, gt=0)
    """γ of the min-SNR weights of the timesteps; null weighs all alike."""

    @model_validator(mode="after")
    def _has_one(self) -> "LossParams":
        if not (self.noise or self.output or self.feature):
            raise ValueError("all weights are 0; give one of noise, output, feature more")
        return self

    def without_features(self) -> "LossParams":
        """Give what held-out images are measured by: noise and output alone, or the noise where neither counts."""
        alone = 0.0 if self.noise or self.output else 1.0
        return self.model_copy(update={"feature": 0.0, "noise": self.noise or alone})

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model takes part."""
        return bool(self.output or self.feature)


class EngineParams(Section):
    """How steps are computed; on another setting a run comes to other last bits."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights, averages and losses stay float32."""
    compile: bool = False
    """Whether torch.compile fuses the model; the first step then takes up to minutes."""
    channels_last: bool = False
    """Memory layout of images and weights."""
    accumulate: int = Field(1, ge=1)
    """Parts that each process takes its share of the batch in, one after the other, to save memory."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them."""


class SamplesParams(Section):
    """Pictures of the model as it recovers, always from the same noise."""

    every: int = Field(ge=1)
    """Steps between two rows of pictures."""
    num_images: int = Field(8, ge=1, le=64)
    steps: int = Field(20, ge=1, le=1000)
    """Of DDIM."""


class FinetuneParams(Section):
    """How the pruned model recovers."""

    init: Literal["pruned", "scratch"] = "pruned"
    """scratch is the baseline: the pruned model's widths, fresh weights."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1, le=1_000_000)
    """Images a step, over all processes and parts."""
    loss: LossParams = LossParams()
    antithetic: bool = True
    """Whether half of a batch takes the timesteps T - 1 - t of the other half, as in the original."""
    learning_rate: float = Field(gt=0)
    """Of Adam, at its highest."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """In which the learning rate rises from 0."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(min_length=1, max_length=8)
    """Moving averages of the weights that are kept side by side; each decay ramps up as (1 + step) / (10 + step). The
    one with the lowest held-out loss at the end, by the weights of noise and output in `loss`, is the result."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """null leaves it as the model's config has it."""
    clip_norm: float = Field(gt=0)
    """Largest norm of the gradient."""
    flip: bool
    """CheckpointUploads half of the images; wrong for digits, right for most photographs."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the images of a conditional model that are shown without their condition, for guidance."""
    heldout_images: int = Field(ge=1)
    """Held-out images to measure the loss on, at most."""
    heldout_every: int = Field(ge=1)
    """Steps between two measurements of the held-out loss."""
    gate: float | None = Field(None, gt=0)
    """Held-out loss that must be reached at the end; training stops as soon as its curve cannot get there."""
    checkpoint_every: int = Field(ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of them stay."""
    samples: SamplesParams | None = None
    engine: EngineParams = EngineParams()

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneParams":
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError("ema_decays names a decay twice")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of the {self.steps} steps")
        if self.init == "scratch" and self.loss.feature:
            raise ValueError("init scratch has no channels of the dense model; set loss.feature to 0")
        if self.batch_size % self.engine.accumulate:
            raise ValueError(f"engine.accumulate {self.engine.accumulate} does not divide batch_size {self.batch_size}")
        return self
