"""A model, losses and images -> a recovered model and its curve, resumable at any step."""

import time
from collections.abc import Callable
from statistics import fmean

import click
import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.data.images import Images
from stages.finetune.batches import Batch, Batches, Prefetcher, heldout_batch
from stages.finetune.checkpoint import Checkpoint, Checkpoints
from stages.finetune.curve import CurvePoint, check_gate
from stages.finetune.distillation import Channels, Distillation
from stages.finetune.ema import EmaModels
from stages.finetune.engine import Engine
from stages.finetune.forecast import Cost, Forecast, timed
from stages.finetune.interrupt import Interrupts, StoppedError
from stages.finetune.loss import Objective, Prediction
from stages.finetune.params import FinetuneParams
from stages.models.families import Denoiser
from stages.models.params import SamplerParams
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext, draw, image_seeds
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed

Listener = Callable[[CurvePoint, NDArray[np.uint8] | None], None]
"""Hears of each row of the curve and of the pictures drawn with it, [N, C, H, W]."""
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""In diffusers' words."""


class Trainer:
    """Adam with gradient clipping on the losses of `params`, and moving averages of the weights.

    Every draw of step k comes from a seed of its own, so a training that stops and goes on takes the same steps as one
    that never stopped.

    Args:
        unet: The model; it is trained in place.
        scheduler: Its noise schedule.
        images: Packed images.
        params: The block finetune of params.yaml.
        seed: The root of every draw.
        teacher: The dense model and the channels that were kept of its blocks, where the losses need it.
        engine: Where it computes; the CPU and this process alone unless given.
        context: What the model needs beside itself to draw pictures.

    Raises:
        InputError: The batch is larger than the data, or cannot be shared out evenly.
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
        self.engine, self.context = engine or Engine(params.engine, unet.device), context
        self.share = self.engine.share(params.batch_size)
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        self.batches = Batches(images, num_timesteps, params, seed)
        self.prefetcher = Prefetcher(self.batches, self.share)
        self.unet, self.scheduler, self.params, self.seed = unet.train(), scheduler, params, seed
        for module in unet.modules():
            if isinstance(module, nn.Dropout) and params.dropout is not None:
                module.p = params.dropout
        for model in (unet, *([teacher[0]] if teacher else [])):
            self.engine.lay_out(model)
        self.ema_models = EmaModels(unet, params.ema_decays)
        self.objective = Objective(scheduler, params.loss)
        self.heldout_objective = Objective(scheduler, params.loss.without_features())
        with_features = bool(params.loss.feature)
        self.model = self.engine.wrap(unet)
        self.distillation = Distillation(
            self.model, unet, scheduler, self.engine, teacher, images.conditions, with_features=with_features
        )
        heldout = heldout_batch(images, params.heldout_images, num_timesteps)
        self.heldout = self._prepare_heldout(heldout, teacher[0] if teacher and params.loss.output else None)
        self.optimizer = torch.optim.Adam(unet.parameters(), lr=params.learning_rate, fused=True)
        rates = get_scheduler(
            SCHEDULES[params.schedule],
            self.optimizer,
            num_warmup_steps=params.warmup_steps,
            num_training_steps=params.steps,
        )
        self.rate = rates.lr_lambdas[0]
        self.done = 0
        self.losses: list[float] = []
        self.curve: list[CurvePoint] = []
        self.samples: dict[int, NDArray[np.uint8]] = {}
        self.draw_s = 0.0
        self.cost: Cost = {}

    @property
    def best_ema(self) -> Denoiser:
        """The average with the lowest held-out loss at the last measurement."""
        return self.ema_models.models[self.curve[-1].ema_decay if self.curve else self.params.ema_decays[0]]

    def run(self, checkpoints: Checkpoints, listener: Listener | None = None) -> None:
        """Train to the last step, going on from the newest checkpoint where there is one.

        Raises:
            StoppedError: A signal asked for it; a checkpoint is saved.
            InputError: The loss is not finite, or cannot reach its gate; the last checkpoint stays.
        """
        with self.engine.accelerator.main_process_first():  # who else brings it from the store
            checkpoint = checkpoints.newest()
        if checkpoint is not None:
            self.restore(checkpoint)
            self._log(f"finetune goes on from step {self.done}")
        forecast = self._forecast(listener)
        self._log(forecast.line())
        with Interrupts() as interrupts:
            begin = time.perf_counter()
            steps = range(self.done, self.params.steps)
            for _ in (
                track(steps, "finetune, step", self.params.steps, done=self.done) if self.engine.is_main else steps
            ):
                self._advance(checkpoints, listener)
                if self.engine.any(flag=bool(interrupts.number)):
                    self._save(checkpoints)
                    raise StoppedError(interrupts.number, self.done)
        self.cost = forecast.compare(time.perf_counter() - begin, self.params.batch_size)
        self._log(f"finetune took {self.cost['measured_s']} s, forecast {self.cost['forecast_s']} s")

    def _advance(self, checkpoints: Checkpoints, listener: Listener | None) -> None:
        """Take a step, and what is due after it."""
        self.step()
        is_last = self.done == self.params.steps
        if self.done % self.params.heldout_every == 0 or is_last or self._draws_at(self.done):
            self.note(listener)
        if self.done % self.params.checkpoint_every == 0 and not is_last:
            self._save(checkpoints)

    def step(self) -> None:
        """Take one optimiser step.

        Raises:
            InputError: The loss or its gradient is not finite.
        """
        loss = self._accumulate(self.done)
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), self.params.clip_norm)
        if not bool(loss.isfinite() & norm.isfinite()):
            found = f"the loss is {loss.item()} and its gradient's norm {norm.item()} at step {self.done}"
            raise InputError(f"{found}; lower finetune.learning_rate; the last checkpoint is kept")
        for group in self.optimizer.param_groups:
            group["lr"] = self.params.learning_rate * self.rate(self.done)
        self.optimizer.step()
        self.done += 1
        self.losses.append(loss.item())
        self.ema_models.update(self.unet, self.done)

    def _accumulate(self, step: int) -> torch.Tensor:
        """Compute the gradients of a step's batch: its loss."""
        torch.manual_seed(derive_seed(self.seed, "dropout", step, self.engine.index))
        batch = self.prefetcher.take(step)
        parts = batch.split(len(batch) // self.params.engine.accumulate)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.engine.device)
        for index, part in enumerate(parts, start=1):
            with self.engine.holding_back(self.model, is_last=index == len(parts)):
                here = part.to(self.engine.device)
                part_loss = self.objective(self.distillation.forward(here), here.timesteps).mean() / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
        return self.engine.mean(loss)

    def note(self, listener: Listener | None = None) -> None:
        """Add a row to the curve, and one to the pictures where it is due.

        Raises:
            InputError: The curve cannot reach its gate.
        """
        losses = tuple((decay, self.heldout_loss(model)) for decay, model in self.ema_models.models.items())
        self.curve.append(CurvePoint(self.done, fmean(self.losses) if self.losses else None, losses))
        self.losses = []
        if self._draws_at(self.done) and self.engine.is_main:
            self.draw_s = timed(lambda: self.samples.update({self.done: self._draw()}))
        if listener:
            listener(self.curve[-1], self.samples.get(self.done))
        check_gate(self.curve, self.params.steps, self.params.gate)

    @torch.no_grad()
    def heldout_loss(self, unet: Denoiser) -> float:
        """Take the loss on the held-out images, each under noise that never changes; features are left out of it."""
        found = []
        for part, taught in self.heldout:
            predicted = self.distillation.predict(unet, part)
            found.append(self.heldout_objective(Prediction(part.noise, predicted, taught), part.timesteps))
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def _prepare_heldout(self, batch: Batch, teacher: Denoiser | None) -> list[tuple[Batch, torch.Tensor | None]]:
        """Cut held-out images into parts that fit into memory, with what the teacher makes of each."""
        size = max(1, (self.share.stop - self.share.start) // self.params.engine.accumulate)
        parts = [part.to(self.engine.device) for part in batch.split(size)]
        return [(part, self.distillation.predict(teacher, part) if teacher else None) for part in parts]

    def _draws_at(self, step: int) -> bool:
        samples = self.params.samples
        return samples is not None and (step % samples.every == 0 or step == self.params.steps)

    def _draw(self) -> NDArray[np.uint8]:
        """Draw pictures with the best average."""
        assert self.params.samples is not None
        sampler, seeds = SamplerParams(steps=self.params.samples.steps), image_seeds(0, self.params.samples.num_images)
        return draw(
            self.best_ema,
            self.scheduler,
            seeds,
            sampler,
            batch_size=len(seeds),
            label="samples",
            context=self.context,
            labels=self.context.labels(0, len(seeds)),
        )

    def _forecast(self, listener: Listener | None) -> Forecast:
        """Time one of each: the first measurement, and a step that changes nothing, once it is warm."""
        if not self.curve:
            self.note(listener)
        heldout_s = timed(lambda: self.heldout_loss(self.best_ema)) * len(self.ema_models.models)
        step_s = min(timed(lambda: self._accumulate(self.done)) for _ in range(2))
        if self.params.samples and self.engine.is_main and not self.draw_s:
            self.draw_s = timed(self._draw)
        dues = range(self.done + 1, self.params.steps + 1)
        samples = sum(self._draws_at(step) for step in dues)
        heldouts = sum(step % self.params.heldout_every == 0 or step == self.params.steps for step in dues)
        return Forecast(len(dues), step_s, heldouts, heldout_s, samples, self.draw_s)

    def _save(self, checkpoints: Checkpoints) -> None:
        if self.engine.is_main:
            checkpoints.save(self.checkpoint())

    def _log(self, line: str) -> None:
        if self.engine.is_main:
            click.echo(line, err=True)

    def checkpoint(self) -> Checkpoint:
        """Collect everything that the next step depends on."""
        tensors = {f"unet.{name}": tensor for name, tensor in self.unet.state_dict().items()}
        for decay, model in self.ema_models.models.items():
            tensors |= {f"ema.{decay}.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        tensors |= {f"samples.{step}": torch.from_numpy(drawn) for step, drawn in self.samples.items()}
        return Checkpoint(self.done, tensors, self.losses, self.curve)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the training that wrote `checkpoint`."""
        self.done, self.losses, self.curve = checkpoint.step, list(checkpoint.losses), list(checkpoint.curve)
        self.unet.load_state_dict(_below("unet.", checkpoint.tensors))
        for decay, model in self.ema_models.models.items():
            model.load_state_dict(_below(f"ema.{decay}.", checkpoint.tensors))
        self.samples = {int(step): drawn.numpy() for step, drawn in _below("samples.", checkpoint.tensors).items()}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below("optimizer.", checkpoint.tensors).items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
