"""params.yaml -> frozen, checked types; unknown keys are refused."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, cast

import click
from pydantic import AfterValidator, Field, model_validator

from stages.schema import Section, Sha256, read_yaml
from stages.sources import FetchParams

CriterionName = Literal["random", "magnitude", "taylor", "diff-pruning", "no-cancel-taylor", "fisher", "snr-taylor"]
FormulaName = Literal["paper", "diffusers"]


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


Quantity = Literal["channels", "macs", "params", "latency_ms"]


def _check_amount(amount: float | str) -> float | str:
    share = re.fullmatch(r"(\d+(\.\d+)?)%", amount) if isinstance(amount, str) else None
    number = float(share[1]) if share else amount
    if isinstance(number, str) or not 0 < number < math.inf:
        raise ValueError("give a number above 0, or a share of the dense model such as 56%")
    return amount


Amount = Annotated[float | str, AfterValidator(_check_amount)]
"""Absolute, or a share of the dense model's, as 56%."""


class Target(Section):
    """How small the model becomes: exactly one of these."""

    ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the channels to remove; with ranking uniform from every group, as in the paper."""
    macs: Amount | None = None
    """Multiply-accumulates of one image, without the matrix products inside attention: 3.4e9, 56% or 0.56."""
    params: Amount | None = None
    """As macs: a number below 1 is a share of the dense model's."""
    latency_ms: Amount | None = None
    """Of a forward pass of one image on this device."""

    @model_validator(mode="after")
    def _is_one(self) -> "Target":
        if len(self._given()) != 1:
            raise ValueError("give exactly one of ratio, macs, params, latency_ms")
        return self

    def _given(self) -> dict[str, float | str]:
        return {name: amount for name, amount in self if amount is not None}

    @property
    def quantity(self) -> Quantity:
        """What the target is measured in."""
        (name,) = self._given()
        return "channels" if name == "ratio" else cast("Quantity", name)

    def asked(self, dense: float) -> float:
        """Find the cost that is asked for, given that of the dense model."""
        (amount,) = self._given().values()
        if self.ratio is not None:
            return (1 - self.ratio) * dense
        if isinstance(amount, str):
            return float(amount[:-1]) / 100 * dense
        is_share = amount < 1 and self.latency_ms is None  # half a millisecond is one, half an operation is not
        return float(amount) * dense if is_share else float(amount)


class CompensateParams(Section):
    """How the layers that read cut channels make up for them."""

    num_images: int = Field(ge=1)
    """Calibration images."""
    num_timesteps: int = Field(ge=1)
    """Timesteps that the activations are taken at, evenly spaced; every image and timestep has noise of its own."""
    damping: float = Field(0.1, ge=1e-6, le=1e6)
    """λ, as a share of the mean square activation; draws towards the weights as they are."""
    rounds: int = Field(8, ge=1)
    """Parts that the layers are corrected in, in running order; each sees the activations that those before it left."""


class PruneParams(Section):
    """How much is cut, and where."""

    target: Target
    ranking: Literal["uniform", "global"] = "uniform"
    """uniform takes the same share from every group; global ranks all channels by score over their group's mean."""
    order: Literal["interleaved", "upfront"] = "interleaved"
    """interleaved scores a group after those before it were cut, as the original does; upfront on dense widths."""
    round_to: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Widths that are cut become multiples of this; each head's, where an attention has several."""
    floor: float = Field(0, ge=0, lt=1)
    """Share of its channels that every group keeps."""
    heads: Literal["width", "whole"] = "width"
    """Whether an attention with several heads gets narrower heads or fewer."""
    include: tuple[str, ...] = ("*",)
    """Patterns of layers that may lose outputs, such as up_blocks.*; a group goes only if all of its layers may."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that may not."""
    compensate: CompensateParams | None = None
    """Correct the weights that are left by least squares; null leaves them."""
    latency_repeats: int = Field(30, ge=3)
    """Timed passes of each candidate, for a target in milliseconds."""


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
    """Mirror half of the images; wrong for digits, right for most photographs."""
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


class ExtractorParams(Section):
    """What sees the images in place of people."""

    name: str = Field(min_length=1)
    """digits and thumbnail are ours; inception-v3-compat, vgg16 and others are torch-fidelity's, with fixed weights."""
    weights: Path | None = None
    """Its weights on this machine; null takes them from PyTorch's cache or their download page."""
    sha256: Sha256 | None = None
    """Of that file; null takes what the weights' own name or torch-fidelity promises, if they promise anything."""

    @model_validator(mode="after")
    def _has_weights(self) -> "ExtractorParams":
        if self.name in ("digits", "thumbnail") and self.weights is not None:
            raise ValueError(f"extractor {self.name} brings what it needs; leave weights null")
        return self


class ReferenceParams(Section):
    """The protocol: how every model's images are drawn, seen and scored."""

    sampler: SamplerParams
    guidance: float | None = Field(None, ge=0)
    """Scale of classifier-free guidance of a conditional model; 1, as null, draws without."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and activations; the sampler computes in float32."""
    num_images: int = Field(ge=2)
    """Images of a set; FID, KID, precision and recall are taken on one set at a time."""
    sets: int = Field(1, ge=1, le=1000)
    """Sets drawn from seeds of their own; intervals need two or more."""
    batch_size: int = Field(ge=1, le=1_000_000)
    """Images drawn or seen at once; no part of the protocol, though DVC draws anew when it changes."""
    extractor: ExtractorParams
    real_images: int | None = Field(None, ge=4)
    """Training images to compare with, at most, evenly spaced; null takes all, which costs memory for each."""
    kid_subsets: int = Field(ge=1, le=1_000_000)
    kid_subset_size: int = Field(ge=2)
    """Images in each of KID's subsets; at most num_images."""
    neighbours: int = Field(3, ge=1)
    """k of precision and recall: how far an image's neighbourhood reaches."""

    @model_validator(mode="after")
    def _images_suffice(self) -> "ReferenceParams":
        if self.kid_subset_size > self.num_images:
            raise ValueError(f"kid_subset_size {self.kid_subset_size} is more than num_images {self.num_images}")
        if self.neighbours >= self.num_images:
            raise ValueError(f"neighbours {self.neighbours} needs more than num_images {self.num_images}")
        return self


class CostParams(Section):
    """What the truth table of speed covers."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 16, 128), min_length=1)
    """Images a pass; the first is the one whose latency stands in the results."""
    precisions: tuple[Literal["float32", "bfloat16"], ...] = Field(("float32",), min_length=1)
    compiled: bool = False
    """Time torch.compile too; compiling takes up to minutes a row."""
    repeats: int = Field(50, ge=3, le=100_000)
    """Timed passes a row, at most."""
    seconds: float = Field(10, gt=0)
    """Time for a row. Three passes are taken at least; where they would not fit, by the row before, it is left out."""

    @model_validator(mode="after")
    def _are_settings(self) -> "CostParams":
        for name in ("batches", "precisions"):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} names a setting twice")
        return self


class EvaluateParams(Section):
    """What is measured beside the protocol's quality and consistency."""

    costs: CostParams


class Params(Section):
    """All of params.yaml: one seed, then one block a stage."""

    seed: int = Field(ge=0)
    """The root of every random draw."""
    fetch: FetchParams
    reference: ReferenceParams
    importance: ImportanceParams
    prune: PruneParams
    finetune: FinetuneParams
    evaluate: EvaluateParams


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        InputError: The file is missing, is no YAML, or a value is not allowed; every wrong value is named.
    """
    return read_yaml(path, Params)


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="The file to check.")
def main(params_path: Path) -> None:
    """Check a params file, before anything runs."""
    load_params(params_path)


if __name__ == "__main__":
    main()
