"""A UNet, images and noise -> the saliency of every weight."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.importance.criteria import CRITERIA, FORMULAS, Layer
from stages.models.families import Condition, Denoiser
from stages.models.params import CriterionName, FormulaName, PrecisionName
from stages.models.prediction_types import training_target
from stages.models.saliency import Importance
from stages.runtime.device import computing, naming_switch
from stages.runtime.progress import track
from stages.storage.tensors import tensors_sha256


@dataclass(frozen=True)
class CalibrationBatch:
    """Calibration images with one noise tensor."""

    images: torch.Tensor
    """[B, C, H, W] in [-1, 1]."""
    noise: torch.Tensor
    """ε, of the same shape; all timesteps share it."""
    condition: Condition = field(default_factory=dict)
    """Further inputs of a conditional model, each [B, …]; empty for an unconditional one."""

    def at(self, timestep: int) -> "CalibrationBatch":
        """Return this batch for every timestep."""
        del timestep
        return self


class CalibrationDraw(Protocol):
    """What the loss of each timestep is measured on."""

    def at(self, timestep: int) -> CalibrationBatch:
        """Return the batch for a timestep; all have the same size."""
        ...


def measure_importance(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    batches: Iterable[CalibrationDraw],
    timesteps: Sequence[int],
    *,
    criterion: CriterionName,
    formula: FormulaName,
    threshold: float = 0.0,
    timesteps_per_pass: int = 1,
    precision: PrecisionName = "float32",
    label: str | None = "importance",
    model_sha256: str | None = None,
) -> Importance:
    """Score every weight of a UNet as Diff-Pruning does (Fang et al., 2023, algorithm 1).

    Args:
        unet: The dense model; its weights do not change, its gradients are cleared.
        scheduler: The noise schedule that it was trained with.
        batches: Calibration batches, taken one after the other; gradients or saliencies are averaged over them, and
            each batch ends its own sum over the timesteps.
        timesteps: Ascending, as in the original.
        criterion: See `CRITERIA`.
        formula: paper, diffusers or ldm, see `FORMULAS`.
        threshold: T, for criteria with a threshold.
        timesteps_per_pass: Timesteps in one forward and backward pass. It does not change which timesteps are used: 1
            is bit-identical to the original, more is faster and agrees to about 1e-6 (relative).
        precision: bfloat16 uses autocast; tf32 needs a GPU that has it, others compute in float32.
        label: Name of the progress bar; None shows none.
        model_sha256: `tensors_sha256` of the weights where it is known; None computes it.

    Returns:
        The saliencies, on the CPU, and for each batch the losses of the timesteps that were used.

    Raises:
        InputError: The model has an operation without a deterministic kernel, while no other may run.
    """
    measurement = _Measurement(unet, scheduler, criterion, formula, threshold, precision)
    known = model_sha256 or tensors_sha256(unet.state_dict())
    with computing(precision), naming_switch("importance.deterministic"):
        return measurement.run(batches, timesteps, timesteps_per_pass, label, known)


@contextmanager
def _prepared(unet: Denoiser, *, channels_last: bool) -> Iterator[None]:
    """Enable the gradients of weights only; channels-last storage is faster for passes of several timesteps."""
    unet.eval().zero_grad(set_to_none=True)
    before = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    weights = {layer.weight for layer in unet.modules() if isinstance(layer, Layer)}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
        if channels_last:
            nn.Module.to(unet, memory_format=torch.channels_last)
        yield
    finally:
        nn.Module.to(unet, memory_format=torch.contiguous_format)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
        unet.zero_grad(set_to_none=True)


class _Measurement:
    """Sums gradients, or saliencies per timestep, over batches; memory does not depend on their number."""

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        criterion: CriterionName,
        formula: FormulaName,
        threshold: float,
        precision: str,
    ) -> None:
        self.unet, self.scheduler, self.precision = unet, scheduler, precision
        self.criterion_name, self.formula_name = criterion, formula
        self.criterion, self.formula = CRITERIA[criterion], FORMULAS[formula]
        self.score = self.criterion.saliency[formula]
        self.threshold = threshold if self.criterion.has_threshold else 0.0
        self.weights = self.criterion.weights(scheduler.alphas_cumprod)
        self.layers: dict[str, Layer] = {
            name: layer for name, layer in unet.named_modules() if isinstance(layer, Layer)
        }
        self.totals: dict[str, torch.Tensor] = {}

    def run(
        self,
        batches: Iterable[CalibrationDraw],
        timesteps: Sequence[int],
        timesteps_per_pass: int,
        label: str | None,
        model_sha256: str,
    ) -> Importance:
        """Measure the importance, as `measure_importance` describes."""
        needs_gradients = self.criterion.needs_gradients
        num_each = 1 if self.criterion.per_timestep else timesteps_per_pass
        with _prepared(self.unet, channels_last=num_each > 1):
            losses = [self.add(batch, timesteps, num_each, label) for batch in batches] if needs_gradients else []
            saliency = self.saliency(max(1, len(losses)))
        return Importance(
            criterion=self.criterion_name,
            formula=self.formula_name,
            precision=self.precision,
            model_sha256=model_sha256,
            counts_doubled=self.formula.counts_doubled,
            timesteps=list(timesteps) if needs_gradients else [],
            losses=losses,
            saliency=saliency,
        )

    def add(self, batch: CalibrationDraw, timesteps: Sequence[int], num_each: int, label: str | None) -> list[float]:
        """Sum over the timesteps until L_t < threshold · max L; return the losses that were used.

        As in the original, the first timestep below the threshold ends the sum; this is the paper's set
        {t : L_t / L_max > T} only if the loss decreases with t. Later timesteps of the same pass are left out of the
        backward pass.
        """
        used: list[float] = []
        largest = 0.0
        starts = range(0, len(timesteps), num_each)
        for start in track(starts, f"{label}, pass", len(starts)) if label else starts:
            chunk = timesteps[start : start + num_each]
            losses = self.forward(batch, chunk)
            values = [loss.item() for loss in losses]
            num_used, largest, ended = self._count(values, largest)
            if num_used:
                weights = [float(self.weights[timestep]) for timestep in chunk[:num_used]]
                sum(weight * loss for weight, loss in zip(weights, losses, strict=False)).backward()  # type: ignore[union-attr]
            if self.criterion.per_timestep:
                self._add_saliency()
            used += values[:num_used]
            if ended:
                break
        return used

    def _count(self, losses: Sequence[float], largest: float) -> tuple[int, float, bool]:
        """Find how many of these losses are used, the largest loss so far, and whether the sum ends."""
        for index, loss in enumerate(losses):
            largest = max(largest, loss)
            if loss < self.threshold * largest:
                return index + self.formula.includes_last, largest, True
        return len(losses), largest, False

    def forward(self, batch: CalibrationDraw, timesteps: Sequence[int]) -> list[torch.Tensor]:
        """Compute L_t of each timestep, the loss of what the model predicts (ε, v or x₀), in one pass."""
        parts = [batch.at(timestep) for timestep in timesteps]
        images, noise = torch.cat([part.images for part in parts]), torch.cat([part.noise for part in parts])
        condition = {name: torch.cat([part.condition[name] for part in parts]) for name in parts[0].condition}
        batch_size = len(parts[0].images)
        repeated = torch.tensor(timesteps, device=images.device).repeat_interleave(batch_size)
        noisy = self.scheduler.add_noise(images, noise, repeated)  # type: ignore[arg-type]  # the annotation is too narrow
        with self._autocast(images.device.type):
            predicted = self.unet(noisy, repeated, **condition).sample
        errors = (predicted.float() - training_target(self.scheduler, images, noise, repeated)).square()
        return [self.formula.loss(part) for part in errors.split(batch_size)]

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    @torch.no_grad()
    def _add_saliency(self) -> None:
        """Add the saliencies of the current gradients to the totals and clear the gradients."""
        for name, layer in self.layers.items():
            value = self.score(layer, _gradient(layer))
            if value is not None:
                self.totals[name] = self.totals[name].add_(value) if name in self.totals else value
        self.unet.zero_grad(set_to_none=True)

    @torch.no_grad()
    def saliency(self, num_batches: int) -> dict[str, torch.Tensor]:
        """Compute the saliency of every layer that counts, averaged over the batches."""
        if self.criterion.per_timestep:
            values = {name: total / num_batches for name, total in self.totals.items()}
        else:
            scored = {name: self.score(layer, _gradient(layer) / num_batches) for name, layer in self.layers.items()}
            values = {name: value for name, value in scored.items() if value is not None}
        return {name: value.cpu() for name, value in values.items()}


def _gradient(layer: Layer) -> torch.Tensor:
    gradient = layer.weight.grad
    return torch.zeros_like(layer.weight) if gradient is None else gradient
