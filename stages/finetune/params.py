"""The block finetune of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.models.params import PrecisionName, RoundsParams, SamplesParams
from stages.runtime.errors import InputError
from stages.runtime.schema import Section

MUON_TO_ADAM = 2
"""Ratio of Muon's learning rate to Adam's that was good on two models (docs/adr/0035)."""


class JacobianParams(Section):
    """Second-order Jacobian matching: what it weighs, and how much of it is computed."""

    weight: float = Field(gt=0)
    """Weight of the loss. The losses here are means over the pixels, so w is the weight w of losses that are sums over
    them, at any image size: 0.1 as published."""
    every: int = Field(1, ge=1)
    """Steps from one that computes this loss to the next; it then counts `every` times."""
    images: int | None = Field(None, ge=1)
    """Images of each batch that the loss is computed on, evenly spaced in it; a divisor of batch_size. null is all."""
    vectors: int = Field(1, ge=1, le=64)
    """Random unit vectors for each image, over which the loss is averaged; each costs two backward passes."""
    relative: bool = False
    """Whether the difference is divided by the dense model's squared norm instead, so that all timesteps count alike;
    otherwise the few images of the first timesteps, where the prediction is most sensitive, outweigh all others."""
    ramp_steps: int = Field(0, ge=0)
    """Steps in which the weight rises linearly from 0."""

    def weight_at(self, step: int) -> float:
        """Return the weight in a step, counted from 0: 0 where the loss is not computed."""
        done = step + 1
        if done % self.every:
            return 0.0
        return self.weight * self.every * min(1.0, done / max(self.ramp_steps, 1))


class MuonParams(Section):
    """Muon, for the weights of linear layers and convolutions."""

    learning_rate: float = Field(gt=0)
    """Its highest learning rate. At the same rate its steps have the size of Adam's; twice that was good."""


class LossParams(Section):
    """Weights of the losses that are summed; a loss of weight 0 is not computed."""

    noise: float = Field(1, ge=0)
    """Weight of the squared error of what the model predicts, the loss that the dense model was trained with: of the
    noise, or of v or the clean image if its prediction_type says so."""
    output: float = Field(0, ge=0)
    """Weight of the squared distance from the dense model's prediction."""
    feature: float = Field(0, ge=0)
    """Weight of the relative squared distance from the dense model's features, on the kept channels."""
    jacobian: JacobianParams | None = None
    """Squared difference of what one random direction of the output says of the input, in the dense model and here;
    null turns it off."""
    min_snr: float | None = Field(None, gt=0)
    """γ of the min-SNR weights of the timesteps; null gives all timesteps the same weight."""

    @model_validator(mode="after")
    def _has_one(self) -> "LossParams":
        if not (self.noise or self.output or self.feature):
            raise ValueError("noise, output and feature are all 0; set one of them above 0")
        return self

    def without_features(self) -> "LossParams":
        """Return the weights of the held-out loss: those of noise and output, or noise 1 if both are 0."""
        noise = self.noise if self.noise or self.output else 1.0
        return self.model_copy(update={"feature": 0.0, "jacobian": None, "noise": noise})

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss uses the dense model."""
        return bool(self.distils or self.jacobian)

    @property
    def distils(self) -> bool:
        """Whether a loss uses the dense model's predictions or features."""
        return bool(self.output or self.feature)


class EngineParams(Section):
    """How steps are computed; another setting changes the last bits of the result.

    With dropout, channels_last, accumulate and the number of processes change its masks as well.
    """

    precision: PrecisionName = "float32"
    """Precision of a step's passes: float32, tf32 (NVIDIA GPUs from Ampere on), or bfloat16 under autocast; weights,
    EMA, losses and measurements stay float32."""
    deterministic: bool = True
    """Whether only kernels run that repeat their result bit for bit; false lets a GPU choose for speed, and a resumed
    training then differs from an uninterrupted one in the last bits."""
    compile: bool = False
    """Whether torch.compile compiles the model; the first step then takes up to minutes."""
    channels_last: bool = False
    """Whether weights have the memory layout NHWC instead of NCHW; activations follow them."""
    accumulate: int = Field(1, ge=1)
    """Parts of a batch that each process computes one after the other, to save memory."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass instead of stored, to save memory."""


class FinetuneParams(Section):
    """How the pruned model is trained."""

    init: Literal["pruned", "scratch"] = "pruned"
    """Initial weights: those of the pruned model, or (scratch, the baseline) random ones in the same widths."""
    steps: int = Field(ge=1)
    """Optimiser steps, of all rounds together if rounds.count is above 1."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Images per step, over all processes and parts."""
    loss: LossParams = LossParams()
    """Weights of the losses."""
    antithetic: bool = True
    """Whether B // 2 + 1 of the B timesteps of a batch are drawn and the rest are T - 1 - t of the first of them, as in
    the original."""
    learning_rate: float = Field(2e-4, gt=0)
    """Highest learning rate of Adam."""
    muon: MuonParams | None = None
    """Muon, which then takes the weights of linear layers and convolutions, and leaves biases, norms, embeddings and
    other parameters to Adam; null, as in the paper, gives Adam all."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly; the last of them has the highest rate."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.99, 0.999, 0.9999), min_length=1, max_length=8
    )
    """Decays of the exponential moving averages of the weights; each ramps up as (1 + step) / (10 + step). The EMA
    with the lowest held-out loss at the end, by the weights of noise and output in `loss`, is the result."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout probability of all dropout layers, those of attention included, as in the original's code for diffusers
    (the UNet of its own code has none there); null keeps those of the model."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    flip: bool = False
    """Whether half of the images are mirrored left to right; wrong for digits, right for most photographs. Refused for
    latents: mirrored ones are not those of a mirrored image."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the images that a conditional model gets with the empty condition, for guidance; a model whose own
    classes include no empty one gets every image with its class."""
    heldout_images: int = Field(512, ge=1)
    """Largest number of held-out images that the loss is measured on."""
    heldout_every: int = Field(500, ge=1)
    """Steps between two measurements of the held-out loss."""
    gate: float | None = Field(None, gt=0)
    """Held-out loss to reach by the last step; null disables it. At a constant learning rate training stops as soon
    as it is out of reach. The step is kept as a checkpoint, for another gate."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints that are kept, on disk and in ESPALIER_STORE."""
    snapshots: tuple[Annotated[int, Field(ge=1)], ...] = Field((), max_length=32)
    """Steps before the last at which the EMA with the lowest held-out loss is kept as a model of its own, which the
    evaluate stage measures: what recovery costs. Checkpoints grow by a model each."""
    samples: SamplesParams | None = None
    """Images drawn during the training; null draws none."""
    engine: EngineParams = EngineParams()
    """Precision, compilation and memory."""

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneParams":
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError("ema_decays names a decay twice; remove one")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        if self.init == "scratch" and self.loss.feature:
            raise ValueError("init scratch has no channels of the dense model; set loss.feature to 0")
        if (
            list(self.snapshots) != sorted({*self.snapshots} - {self.steps})
            or max(self.snapshots, default=0) > self.steps
        ):
            found = f"snapshots {list(self.snapshots)} must rise and stay below steps {self.steps}"
            raise ValueError(f"{found}, whose model is the result")
        if self.batch_size % self.engine.accumulate:
            raise ValueError(f"engine.accumulate {self.engine.accumulate} does not divide batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _jacobian_fits(self) -> "FinetuneParams":
        jacobian = self.loss.jacobian
        if jacobian is None:
            return self
        images, parts = jacobian.images or self.batch_size, self.engine.accumulate
        if self.batch_size % images:
            raise ValueError(f"loss.jacobian.images {images} does not divide batch_size {self.batch_size}")
        if images % parts:
            raise ValueError(f"engine.accumulate {parts} does not divide loss.jacobian.images {images}")
        if jacobian.every > self.steps:
            raise ValueError(f"loss.jacobian.every {jacobian.every} must not exceed steps {self.steps}")
        if jacobian.ramp_steps >= self.steps:
            raise ValueError(f"loss.jacobian.ramp_steps {jacobian.ramp_steps} must be less than steps {self.steps}")
        return self

    @property
    def num_moments(self) -> int:
        """Moments that the optimiser keeps of a weight of a layer."""
        return 2 if self.muon is None else 1

    @property
    def divided(self) -> tuple[str, int]:
        """Key and number of images that processes and parts share evenly; the batch then divides with them."""
        if self.loss.jacobian and self.loss.jacobian.images:
            return "finetune.loss.jacobian.images", self.loss.jacobian.images
        return "finetune.batch_size", self.batch_size

    def after_rounds(self, rounds: RoundsParams) -> "FinetuneParams":
        """Return the params of the last round's recovery, which takes the steps that the rounds before it leave.

        Raises:
            InputError: They leave none, a round is too short for the warm-up or the Jacobian loss, the weights would
                not be used, or snapshots are asked for.
        """
        if rounds.count == 1:
            return self
        if self.init == "scratch":
            raise InputError("finetune.init scratch uses no weights of earlier rounds; set rounds.count to 1")
        if self.snapshots:
            raise InputError("finetune.snapshots are those of one training; empty it, or set rounds.count to 1")
        left = self.steps - rounds.steps_before_last
        if left < 1:
            found = f"finetune.steps {self.steps} leaves none after {rounds.count - 1} × {rounds.steps} of rounds.steps"
            raise InputError(f"{found}; raise it, or lower rounds.steps or rounds.count")
        if min(left, rounds.steps) <= self.warmup_steps:
            found = f"finetune.warmup_steps {self.warmup_steps} takes all {min(left, rounds.steps)} steps of a round"
            raise InputError(f"{found}; lower it, or raise rounds.steps or finetune.steps")
        jacobian = self.loss.jacobian
        if jacobian and max(jacobian.every, jacobian.ramp_steps + 1) > min(left, rounds.steps):
            found = f"finetune.loss.jacobian.every or .ramp_steps does not fit a round of {min(left, rounds.steps)}"
            raise InputError(f"{found}; lower it, or raise rounds.steps or finetune.steps")
        return self.model_copy(update={"steps": left})

    def of_weights(self) -> "FinetuneParams":
        """Return the params without those that change no weight, so that a kept checkpoint serves a changed gate."""
        fields, chosen = type(self).model_fields, ("gate", "checkpoint_every", "keep_checkpoints")
        return self.model_copy(update={key: fields[key].default for key in chosen})

    def in_round(self, rounds: RoundsParams) -> "FinetuneParams":
        """Return the params of the recovery after each cut but the last, which draws no samples and has no gate."""
        return self.model_copy(update={"steps": rounds.steps, "gate": None, "samples": None})
