"""A noisy batch -> the predictions of the pruned model and its teacher, and the features of their blocks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import Conditions, to_condition
from stages.finetune.batches import Batch
from stages.finetune.engine import Engine
from stages.finetune.loss import Prediction
from stages.models.families import Denoiser, family_name, family_of, has_features, prediction
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet
from stages.models.plan import Plan, read_plan
from stages.models.prediction_types import training_target
from stages.models.trust import WAY
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256

Channels = Mapping[str, list[int] | None]
"""Block -> indices of its kept output channels in the dense model; None for all."""

WITHOUT_TEACHER = "set finetune.loss.output and .feature to 0 and .jacobian to null"
"""Advice that ends the messages about the dense model."""


def read_teacher(folder: Path, student: Path, device: torch.device) -> tuple[Denoiser, Channels]:
    """Load the dense model that a pruned one was cut from, and the channels that were kept.

    Raises:
        InputError: The pruned model has no plan, or it was cut from another model.
    """
    if not (student / PLAN).is_file():
        raise InputError(f"{student} has no {PLAN}, so its kept channels are unknown; distil into a pruned model")
    teacher, plan = read_unet(folder, device), read_plan(student / PLAN)
    found = tensors_sha256(teacher.state_dict())
    if found != plan.base.weights_sha256:
        wrong = f"{student} was cut from a model with sha256 {plan.base.weights_sha256[:12]}, {folder} has {found[:12]}"
        raise InputError(f"{wrong}; give the model it was cut from, or {WITHOUT_TEACHER}")
    return teacher.requires_grad_(requires_grad=False), kept_channels(teacher, plan)


def check_features(unet: Denoiser, weight: float) -> None:
    """Check that features can be distilled, if the loss of features has a weight.

    Raises:
        InputError: The description of a model's own class names none.
    """
    if weight and not has_features(unet):
        found = f"finetune.loss.feature is {weight:g}, and the description of {family_name(unet)} names no features"
        raise InputError(f"{found}; set it to 0, or describe features ({WAY})")


def kept_channels(teacher: Denoiser, plan: Plan) -> Channels:
    """List the blocks of the dense model that the plan keeps, and the output channels of each that it keeps."""
    removed = tuple(f"{branch.name}." for branch in plan.removed)
    blocks = {
        name: layer
        for name, layer in family_of(teacher).feature_blocks(teacher).items()
        if not f"{name}.".startswith(removed)
    }
    layers = {name: plan.layers.get(layer) if layer else None for name, layer in blocks.items()}
    return {name: layer.outputs if layer else None for name, layer in layers.items()}


class FeatureHooks:
    """Records the outputs of blocks between `start` and `stop`.

    Recording must stop before the backward pass, in which gradient checkpointing runs the blocks a second time.

    Args:
        unet: The model, on its device; it must not be compiled yet.
        channels: The blocks, and which channels of each are recorded; None for all.
    """

    def __init__(self, unet: nn.Module, channels: Channels) -> None:
        self.names, self.is_recording = list(channels), False
        self.features: dict[str, torch.Tensor] = {}
        device = next(unet.parameters()).device  # a list would be copied to it at every step
        for name, chosen in channels.items():
            kept = None if chosen is None else torch.tensor(chosen, device=device)
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name, kept=kept: self._record(name, kept, output)
            )

    def _record(self, name: str, kept: torch.Tensor | None, output: torch.Tensor) -> None:
        if self.is_recording:
            if not isinstance(output, torch.Tensor):
                found = f"features of {name} are a {type(output).__name__}, no tensor"
                raise InputError(f"{found}; name a module in denoiser.json that returns one")
            is_image = output.ndim == 4  # noqa: PLR2004  # [B, C, H, W], else [B, N, C]
            self.features[name] = output if kept is None else output[:, kept] if is_image else output[..., kept]

    def start(self) -> None:
        """Start to record."""
        self.features, self.is_recording = {}, True

    def stop(self) -> list[torch.Tensor]:
        """Stop to record and return the features of each block: [B, K, H, W] or [B, N, K]."""
        features = [self.features[name] for name in self.names]
        self.features, self.is_recording = {}, False
        return features


class Distillation:
    """Runs the student and the optional teacher on one noisy batch.

    Args:
        student: The pruned model as `Engine.wrap` returned it.
        unet: The pruned model itself, which the hooks are registered on.
        scheduler: The noise schedule.
        engine: Device and precision.
        teacher: The dense model and the kept channels of its blocks; None without distillation.
        conditions: Table of conditions; None for unconditional models.
        with_features: Whether features of the blocks are recorded.
    """

    def __init__(
        self,
        student: nn.Module,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        engine: Engine,
        teacher: tuple[Denoiser, Channels] | None,
        conditions: Conditions | None,
        *,
        with_features: bool,
    ) -> None:
        self.student, self.unet, self.scheduler, self.engine = student, unet, scheduler, engine
        self.table = torch.from_numpy(np.array(conditions.table)).to(engine.device) if conditions else None
        self.teacher = teacher[0] if teacher else None
        channels = teacher[1] if teacher and with_features else {}
        self.hooks = [FeatureHooks(unet, dict.fromkeys(channels))]
        if self.teacher is not None:
            self.hooks.append(FeatureHooks(self.teacher, channels))

    def noisy(self, batch: Batch) -> torch.Tensor:
        """x_t = √ᾱ x₀ + √(1 − ᾱ) ε (Ho et al., 2020, eq. 4): [B, C, H, W]."""
        return self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)  # type: ignore[arg-type]  # integers

    def predict(self, model: Callable[..., Any], batch: Batch, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Predict ε, v or x₀ of x_t, or of `noisy` instead: [B, C, H, W], without a learned variance."""
        noisy = self.noisy(batch) if noisy is None else noisy
        condition = {} if self.table is None else to_condition(self.table, batch.labels)
        return prediction(model(noisy, batch.timesteps, **condition, return_dict=False)[0], self.unet)

    def target(self, batch: Batch) -> torch.Tensor:
        """Compute what the models should predict: [B, C, H, W]."""
        return training_target(self.scheduler, batch.images, batch.noise, batch.timesteps)

    def forward(self, batch: Batch) -> Prediction:
        """Run both models on a batch, and record their features."""
        for hooks in self.hooks:
            hooks.start()
        with self.engine.autocast():
            student = self.predict(self.student, batch)
            with torch.no_grad():
                teacher = self.predict(self.teacher, batch) if self.teacher else None
        features = tuple(zip(*(hooks.stop() for hooks in self.hooks), strict=True)) if self.teacher else ()
        return Prediction(self.target(batch), student, teacher, features)
