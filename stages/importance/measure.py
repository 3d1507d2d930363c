"""A denoiser, images and noise -> the saliency of every weight."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.importance.criteria import CRITERIA, FORMULAS, Layer
from stages.importance.ordered_sum import OrderedSum
from stages.importance.partial import PartialSum, Position
from stages.models.channels_last import to_channels_last
from stages.models.families import Condition, Denoiser, prediction
from stages.models.params import CriterionName, FormulaName, PrecisionName
from stages.models.prediction_types import training_target
from stages.models.saliency import Importance
from stages.runtime.device import computing, naming_switch
from stages.runtime.errors import InputError
from stages.runtime.processes import Processes
from stages.runtime.progress import track
from stages.storage.tensors import tensors_sha256

NOT_FINITE = "losses or gradients are not finite; use another checkpoint, or importance.precision float32"


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
    processes: Processes | None = None,
    partial: PartialSum | None = None,
) -> Importance:
    """Score every weight of a denoiser as Diff-Pruning does (Fang et al., 2023, algorithm 1), saliencies on the CPU.

    Args:
        unet: The dense model; its weights do not change, its gradients are cleared.
        scheduler: The noise schedule that it was trained with.
        batches: Calibration batches; gradients or saliencies are averaged over them, each ends its own sum.
        timesteps: Ascending, as in the original.
        criterion: See `CRITERIA`.
        formula: paper, diffusers or ldm, see `FORMULAS`.
        threshold: T, for criteria with a threshold.
        timesteps_per_pass: Timesteps in one pass; 1 is bit-identical to the original, more is equal to about 1e-6.
        precision: bfloat16 uses autocast; tf32 needs a GPU that has it, others compute in float32.
        label: Name of the progress bar; None shows none.
        model_sha256: `tensors_sha256` of the weights where it is known; None computes it.
        processes: Share the timesteps; all take the same arguments and return the same bits as a single process.
        partial: Where a single process keeps its sum every so often, and goes on from; several keep none.

    Raises:
        InputError: The model has an operation without a deterministic kernel, while no other may run.
    """
    measurement = _Measurement(unet, scheduler, criterion, formula, threshold, precision, processes, partial)
    with computing(precision), naming_switch("importance.deterministic"):
        return measurement.run(batches, timesteps, timesteps_per_pass, label, model_sha256)


@contextmanager
def _prepared(unet: Denoiser, *, channels_last: bool) -> Iterator[None]:
    """Enable the gradients of weights only; channels-last storage is faster for passes of several timesteps."""
    unet.eval().zero_grad(set_to_none=True)
    before = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    weights = {layer.weight for layer in _weighted_layers(unet).values()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
        if channels_last:
            to_channels_last(unet)
        yield
    finally:
        nn.Module.to(unet, memory_format=torch.contiguous_format)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
        unet.zero_grad(set_to_none=True)


def _weighted_layers(unet: Denoiser) -> dict[str, Layer]:
    """Return the layers that have a weight, by name; a norm may have none."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, Layer)}
    return {name: layer for name, layer in layers.items() if layer.weight is not None}


class _Measurement:
    """Sums gradients, or saliencies per timestep, over batches; each process of a round computes one pass."""

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        criterion: CriterionName,
        formula: FormulaName,
        threshold: float,
        precision: str,
        processes: Processes | None,
        partial: PartialSum | None,
    ) -> None:
        self.unet, self.scheduler, self.precision = unet, scheduler, precision
        self.criterion_name, self.formula_name = criterion, formula
        self.criterion, self.formula = CRITERIA[criterion], FORMULAS[formula]
        self.score = self.criterion.saliency[formula]
        self.threshold = threshold if self.criterion.has_threshold else 0.0
        self.weights = self.criterion.weights(scheduler.alphas_cumprod)
        self.layers = _weighted_layers(unet)
        self.processes = processes or Processes(next(unet.parameters()).device)
        self.sum = OrderedSum(self.processes)
        self.partial = partial if partial and self.processes.count == 1 else PartialSum()

    def run(
        self,
        batches: Iterable[CalibrationDraw],
        timesteps: Sequence[int],
        timesteps_per_pass: int,
        label: str | None,
        model_sha256: str | None,
    ) -> Importance:
        """Measure the importance, as `measure_importance` describes."""
        needs_gradients = self.criterion.needs_gradients
        num_each = 1 if self.criterion.per_timestep else timesteps_per_pass
        with _prepared(self.unet, channels_last=num_each > 1):
            losses = self.add_all(batches, timesteps, num_each, label) if needs_gradients else []
            saliency = self.saliency(max(1, len(losses)))
        return Importance(
            criterion=self.criterion_name,
            formula=self.formula_name,
            precision=self.precision,
            model_sha256=model_sha256 or tensors_sha256(self.unet.state_dict()),
            counts_doubled=self.formula.counts_doubled,
            timesteps=list(timesteps) if needs_gradients else [],
            losses=losses,
            saliency=saliency,
        )

    def add_all(
        self, batches: Iterable[CalibrationDraw], timesteps: Sequence[int], num_each: int, label: str | None
    ) -> list[list[float]]:
        """Sum over all batches, from where an earlier process stopped; return the losses that were used of each."""
        position, tensors = self.partial.read()
        self._restore(tensors)
        for index, batch in enumerate(batches):
            if index >= len(position.losses):
                used = self.add(batch, timesteps, num_each, label, position)
                position = Position(losses=[*position.losses, used])
                self._keep(position)
        return position.losses

    def add(
        self, batch: CalibrationDraw, timesteps: Sequence[int], num_each: int, label: str | None, start: Position
    ) -> list[float]:
        """Sum over the timesteps until L_t < threshold · max L; return the losses that were used.

        As in the original, the first timestep below the threshold ends the sum; this is the paper's set
        {t : L_t / L_max > T} only if the loss decreases with t. Later timesteps of the same pass are left out of the
        backward pass.
        """
        used, largest, num_processes = list(start.used), start.largest, self.processes.count
        chunks = [timesteps[begin : begin + num_each] for begin in range(0, len(timesteps), num_each)]
        rounds = [chunks[begin : begin + num_processes] for begin in range(0, len(chunks), num_processes)]
        left, done = rounds[start.rounds :], start.rounds
        for passes in track(left, f"{label}, pass", len(rounds), done=done) if label else left:
            own = passes[self.processes.index] if self.processes.index < len(passes) else ()
            losses = self.forward(batch, own) if own else []
            counts, ended = [], False
            for values in self._gather(losses, passes):
                if not all(map(math.isfinite, values)):
                    raise InputError(NOT_FINITE)
                num_used, largest, ended = self._count(values, largest)
                counts.append(num_used)
                used += values[:num_used]
                if ended:
                    break
            self._backward(losses, own, counts)
            if ended:
                break
            done += 1
            self._keep(Position(losses=start.losses, used=used, largest=largest, rounds=done))
        return used

    def _keep(self, position: Position) -> None:
        """Keep the sum, if it is time to: what the passes up to the position have added."""
        if self.partial.is_due:
            summed = {f"{index:05d}": total for index, total in enumerate(self.sum.total)}
            gradients = {name: layer.weight.grad for name, layer in self.layers.items()}
            found = summed if self.criterion.per_timestep else gradients
            self.partial.write(position, {name: it for name, it in found.items() if it is not None})

    def _restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a sum that `_keep` wrote."""
        if self.criterion.per_timestep and tensors:
            self.sum.total = [tensors[name].to(self.processes.device) for name in sorted(tensors)]
            self.sum.holder = self.processes.index
        for name, gradient in () if self.criterion.per_timestep else tensors.items():
            weight = self.layers[name].weight
            weight.grad = torch.empty_like(weight).copy_(gradient)  # in the weight's layout in memory

    def _gather(self, losses: Sequence[torch.Tensor], passes: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the losses of each pass of a round, in the order of their timesteps."""
        values = [loss.item() for loss in losses]
        padded = values + [0.0] * (len(passes[0]) - len(values))
        return [found[: len(chunk)] for found, chunk in zip(self.processes.gather(padded), passes, strict=False)]

    def _backward(self, losses: Sequence[torch.Tensor], timesteps: Sequence[int], counts: Sequence[int]) -> None:
        """Compute the gradients of this process's pass, and add those of all passes to the sum in their order.

        Args:
            losses: Of this process's pass.
            timesteps: Of this process's pass.
            counts: For each pass of the round, how many of its losses are used.
        """
        num_used = counts[self.processes.index] if self.processes.index < len(counts) else 0
        if num_used:
            weights = [float(self.weights[timestep]) for timestep in timesteps[:num_used]]
            sum(weight * loss for weight, loss in zip(weights, losses, strict=False)).backward()  # type: ignore[union-attr]
        if self.criterion.per_timestep or self.processes.count > 1:  # otherwise .grad is the sum
            self.sum.add(self._values() if num_used else [], [index for index, count in enumerate(counts) if count])
            self.unet.zero_grad(set_to_none=True)

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
            predicted = prediction(self.unet(noisy, repeated, **condition).sample, self.unet)
        errors = (predicted.float() - training_target(self.scheduler, images, noise, repeated)).square()
        return [self.formula.loss(part) for part in errors.split(batch_size)]

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    @torch.no_grad()
    def _values(self) -> list[torch.Tensor]:
        """Return what is summed, from the current gradients: saliencies of the layers that count, or the gradients."""
        gradients = ((name, _gradient(layer)) for name, layer in self.layers.items())
        return list((self._scores(gradients) if self.criterion.per_timestep else dict(gradients)).values())

    def _scores(self, gradients: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        scored = ((name, self.score(self.layers[name], gradient)) for name, gradient in gradients)
        return {name: value for name, value in scored if value is not None}

    @torch.no_grad()
    def saliency(self, num_batches: int) -> dict[str, torch.Tensor]:
        """Compute the saliency of every layer that counts, averaged over the batches."""
        gradients = {name: _gradient(layer) for name, layer in self.layers.items()}  # zero where the sum has them
        if self.criterion.per_timestep:
            scores = self._scores(gradients.items())
            totals = self.sum.result(list(scores.values()))
            values = {name: total / num_batches for name, total in zip(scores, totals, strict=True)}
        else:
            totals = self.sum.result(list(gradients.values()))
            values = self._scores((name, total / num_batches) for name, total in zip(gradients, totals, strict=True))
        return {name: value.cpu().contiguous() for name, value in values.items()}


def _gradient(layer: Layer) -> torch.Tensor:
    gradient = layer.weight.grad
    return torch.zeros_like(layer.weight) if gradient is None else gradient
