"""A model, losses and images -> a recovered model and its curve, resumable at any step."""

import time
from collections.abc import Callable, Iterable
from statistics import fmean

import click
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.data.images import Images
from stages.finetune.batches import Batches, Prefetcher, heldout_batch
from stages.finetune.buffers import make_writable, unchanged_buffers
from stages.finetune.checkpoint import Checkpoint, Checkpoints, load_tensors, to_tensors
from stages.finetune.curve import CurvePoint, check_gate
from stages.finetune.distillation import Channels, Distillation
from stages.finetune.ema import EmaModels
from stages.finetune.engine import Engine
from stages.finetune.forecast import Forecast, TrainingCost, elapsed_s
from stages.finetune.interrupt import Interrupts, StoppedError
from stages.finetune.jacobian import JacobianMatching
from stages.finetune.learning_rate import rate_schedule
from stages.finetune.loss import Objective
from stages.finetune.measurement import HeldoutLoss, draw_samples
from stages.finetune.optimizer import WeightOptimizer
from stages.finetune.params import FinetuneParams
from stages.finetune.snapshots import Snapshots, TrainingClock
from stages.finetune.step_losses import StepLosses
from stages.models.families import Denoiser
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed

CurveCallback = Callable[[CurvePoint, NDArray[np.uint8] | None], None]
"""Called with each new row of the curve and the samples [N, C, H, W] drawn at the same step, if any."""
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Layers that finetune.dropout sets."""


class Trainer:
    """Adam, or Muon and Adam, with clipped gradients of the losses of `params`, and moving averages of the weights.

    Every step has its own seed, so an interrupted training that resumes gives the same bits as an uninterrupted one.

    Args:
        unet: The model; it is trained in place.
        scheduler: Its noise schedule.
        images: Packed images.
        params: The block finetune of params.yaml.
        seed: Root seed of all draws.
        teacher: The dense model and the kept channels of its blocks; None if no loss needs them.
        engine: Processes and precision; by default this process alone, on the model's device.
        context: Codec and conditions for drawing samples.

    Raises:
        InputError: The batch is larger than the data, or does not divide evenly.
    """

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        images: Images,
        params: FinetuneParams,
        seed: int,
        teacher: tuple[Denoiser, Channels] | None = None,
        engine: Engine | None = None,
        context: SamplingContext = DEFAULT_CONTEXT,
    ) -> None:
        self.unet, self.scheduler, self.params, self.seed, self.context = unet, scheduler, params, seed, context
        self.engine = engine or Engine(params.engine, unet.device)
        self.rows = self.engine.local_rows(params.batch_size)
        self.part_size = (self.rows.stop - self.rows.start) // params.engine.accumulate
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        self.batches = Batches(
            images,
            num_timesteps,
            seed,
            batch_size=params.batch_size,
            flip=params.flip,
            antithetic=params.antithetic,
            label_dropout=params.label_dropout,
        )
        self.prefetcher = Prefetcher(self.batches, self.rows)
        self._prepare_models(images, teacher)
        objective = Objective(scheduler, params.loss.without_features())
        heldout = heldout_batch(images, params.heldout_images, num_timesteps)
        self.heldout_loss = HeldoutLoss(heldout, self.part_size, objective, self.distillation)
        self.optimizer = WeightOptimizer(unet, params)
        self.relative_rate = rate_schedule(params)
        self.steps_done = 0
        self.step_losses = StepLosses()
        self.curve: list[CurvePoint] = []
        self.samples: dict[int, NDArray[np.uint8]] = {}
        self.snapshots, self.clock = Snapshots(), TrainingClock()
        self.draw_s = 0.0
        self.cost: TrainingCost = {}

    def _prepare_models(self, images: Images, teacher: tuple[Denoiser, Channels] | None) -> None:
        """Place the models on the device, and build what computes with them."""
        _set_dropout(self.unet.train(), self.params.dropout)
        make_writable(self.unet)
        self.engine.place(self.unet)
        if teacher:
            self.engine.place(teacher[0])
        self.ema_models = EmaModels(self.unet, self.params.ema_decays)  # copies, so before any hook is registered
        self.model = self.engine.wrap(self.unet)
        self.objective = Objective(self.scheduler, self.params.loss)
        self.distillation = Distillation(
            self.model,
            self.unet,
            self.scheduler,
            self.engine,
            teacher if self.params.loss.distils else None,
            images.conditions,
            with_features=bool(self.params.loss.feature),
        )
        self.jacobian = None
        if teacher and self.params.loss.jacobian:
            self.jacobian = JacobianMatching(
                self.unet, teacher[0], self.distillation, self.objective, self.params, self.seed
            )

    @property
    def best_ema(self) -> Denoiser:
        """The EMA model with the lowest held-out loss at the last measurement."""
        return self.ema_models.models[self.curve[-1].ema_decay if self.curve else self.params.ema_decays[0]]

    @property
    def losses(self) -> list[float]:
        """Training losses since the last row of the curve; reading them waits for the device.

        Raises:
            InputError: One of them is not finite.
        """
        return self.step_losses.read()

    def run(self, checkpoints: Checkpoints, callback: CurveCallback | None = None) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises:
            StoppedError: A signal stopped the training; a checkpoint is saved.
            InputError: The loss is not finite, or the gate is out of reach; the last checkpoint is kept.
        """
        with self.engine.accelerator.main_process_first():  # so that one process downloads it for all
            checkpoint = checkpoints.newest()
        if checkpoint is not None:
            self.restore(checkpoint)
            self._log(f"finetune goes on from step {self.steps_done}")
        self.engine.check_equal(self.steps_done)
        check_gate(self.curve, self.params)
        forecast = self._forecast(callback)
        self._log(forecast.summary())
        with Interrupts() as interrupts:
            begin = time.perf_counter()
            for _ in self._remaining_steps():
                self._advance(checkpoints, callback)
                if number := self.engine.largest(interrupts.number):
                    self._save(checkpoints)
                    checkpoints.wait()
                    self.engine.wait()  # a launcher ends all processes once one has ended
                    raise StoppedError(number, self.steps_done)
        self.cost = forecast.with_measured(time.perf_counter() - begin, self.params.batch_size)
        self._log(f"finetune took {self.cost['measured_s']} s, forecast {self.cost['forecast_s']} s")

    def _remaining_steps(self) -> Iterable[int]:
        steps = range(self.steps_done, self.params.steps)
        if not self.engine.is_main:
            return steps
        return track(steps, "finetune, step", self.params.steps, done=self.steps_done)

    def _advance(self, checkpoints: Checkpoints, callback: CurveCallback | None) -> None:
        """Take a step, then measure and save where it is due.

        Raises:
            InputError: The loss is not finite, or the gate is out of reach; this step is saved, for another gate.
        """
        self.clock.start()
        self.step()
        if self._is_measured(self.steps_done):
            self.measure(callback)
        if self.steps_done in self.params.snapshots:
            self.clock.mark(self.steps_done)
            self.snapshots.take(self.steps_done, self.best_ema)
        try:
            check_gate(self.curve, self.params)
        except InputError:
            self._save(checkpoints)
            checkpoints.wait()
            self.engine.wait()  # a launcher ends all processes once one has ended
            raise
        if self.steps_done % self.params.checkpoint_every == 0 and self.steps_done < self.params.steps:
            self._save(checkpoints)

    def step(self) -> None:
        """Take one optimiser step, without waiting for the device.

        Raises:
            InputError: The loss or the gradient of this step, or of one shortly before it, is not finite.
        """
        loss = self._accumulate(self.steps_done)
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), self.params.clip_norm)
        self.optimizer.step(self.relative_rate(self.steps_done))
        self.ema_models.update(self.unet, self.steps_done + 1)
        self.steps_done += 1
        self.step_losses.add(self.steps_done, loss, norm)

    def _accumulate(self, step: int) -> torch.Tensor:
        """Compute the gradients of a step's batch, part by part, and return its loss."""
        torch.manual_seed(derive_seed(self.seed, "dropout", step, self.engine.index))
        parts = self.prefetcher.get(step).split(self.part_size)
        vectors = self.jacobian.vectors(step) if self.jacobian else None
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.engine.device)
        for index, part in enumerate(parts, start=1):
            with self.engine.accumulating(self.model, is_last=index == len(parts)):
                batch = part.to(self.engine.device)
                if self.jacobian and vectors:
                    loss += self.jacobian.backward(batch, vectors[index - 1], step)
                part_loss = self.objective(self.distillation.forward(batch), batch.timesteps).mean() / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
        return self.engine.mean(loss)

    def measure(self, callback: CurveCallback | None = None) -> None:
        """Add a row to the curve, and a row of samples if one is due.

        Raises:
            InputError: A training loss is not finite.
        """
        self.clock.stop()
        train_losses = self.losses
        found = self.engine.of_main([self.heldout_loss(model) for model in self.ema_models.models.values()])
        losses = tuple(zip(self.ema_models.models, found, strict=True))
        self.curve.append(CurvePoint(self.steps_done, fmean(train_losses) if train_losses else None, losses))
        self.step_losses = StepLosses()
        if self._is_sampled(self.steps_done) and self.engine.is_main:
            self.draw_s = elapsed_s(lambda: self.samples.update({self.steps_done: self._draw_samples()}))
        if callback:
            callback(self.curve[-1], self.samples.get(self.steps_done))

    def _is_measured(self, step: int) -> bool:
        is_last, is_kept = step == self.params.steps, step in self.params.snapshots
        return step % self.params.heldout_every == 0 or is_last or is_kept or self._is_sampled(step)

    def _is_sampled(self, step: int) -> bool:
        samples = self.params.samples
        return samples is not None and (step % samples.every == 0 or step == self.params.steps)

    def _draw_samples(self) -> NDArray[np.uint8]:
        assert self.params.samples is not None
        return draw_samples(self.best_ema, self.scheduler, self.params.samples, self.context)

    def _forecast(self, callback: CurveCallback | None) -> Forecast:
        """Time a measurement, a row of samples and, once it is warm, the gradients of a step; no weight changes."""
        if not self.curve:
            self.measure(callback)
        heldout_s = elapsed_s(lambda: self.heldout_loss(self.best_ema)) * len(self.ema_models.models)
        step_s = self.mean_step_s()
        if self.params.samples and self.engine.is_main and not self.draw_s:
            self.draw_s = elapsed_s(self._draw_samples)
        steps = range(self.steps_done + 1, self.params.steps + 1)
        heldouts, samples = sum(map(self._is_measured, steps)), sum(map(self._is_sampled, steps))
        return Forecast(len(steps), step_s, heldouts, heldout_s, samples, self.draw_s)

    def mean_step_s(self) -> float:
        """Time a step without and one with the Jacobian loss, and average over how many of each remain.

        No weight and no buffer changes.
        """
        steps = range(self.steps_done, max(self.params.steps, self.steps_done + 1))
        with_jacobian = [step for step in steps if self.jacobian and self.jacobian.params.weight_at(step)]
        without = sorted({*steps} - {*with_jacobian})
        with unchanged_buffers(self.unet):
            seconds = [
                len(alike) * min(elapsed_s(lambda step=alike[0]: self._accumulate(step)) for _ in range(2))  # type: ignore[misc]
                for alike in (without, with_jacobian)
                if alike
            ]
        return sum(seconds) / len(steps)

    def _save(self, checkpoints: Checkpoints) -> None:
        self.clock.stop()
        self.step_losses.read()  # in every process, so that all end if one of them is not finite
        if self.engine.is_main:
            checkpoints.save(self.checkpoint())

    def _log(self, line: str) -> None:
        if self.engine.is_main:
            click.echo(line, err=True)

    def checkpoint(self) -> Checkpoint:
        """Collect everything that the next step depends on."""
        tensors = to_tensors(self.unet, self.ema_models.models, self.optimizer, self.samples)
        tensors |= self.snapshots.to_tensors()
        return Checkpoint(self.steps_done, tensors, self.losses, self.curve, self.clock)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        self.steps_done, self.curve = checkpoint.step, list(checkpoint.curve)
        self.step_losses.values = list(checkpoint.losses)
        self.samples = load_tensors(checkpoint.tensors, self.unet, self.ema_models.models, self.optimizer)
        self.snapshots.load(checkpoint.tensors)
        self.clock.resume(checkpoint.clock)


def _set_dropout(unet: Denoiser, probability: float | None) -> None:
    if probability is None:
        return
    for module in unet.modules():
        if isinstance(module, DROPOUT):
            module.p = probability
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = probability
