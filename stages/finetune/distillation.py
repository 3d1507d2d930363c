"""The dense model and the plan -> what it predicts and, of the channels that were kept, what it computes on the way."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import Conditions
from stages.finetune.batches import Batch
from stages.finetune.engine import Engine
from stages.finetune.loss import Prediction
from stages.models.families import Denoiser
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet
from stages.models.plan import Plan, read_plan
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256

Channels = Mapping[str, list[int] | None]
"""Block -> its kept channels, in dense numbering; None where all are."""


def read_teacher(folder: Path, student: Path, device: torch.device) -> tuple[Denoiser, Channels]:
    """Load the dense model that a pruned one was cut from, and the channels of its blocks that were kept.

    Raises:
        InputError: The pruned model has no plan, or it was cut from another model.
    """
    if not (student / PLAN).is_file():
        raise InputError(f"{student} has no {PLAN}, so nothing says which channels it kept; distil from a pruned model")
    teacher, plan = read_unet(folder, device), read_plan(student / PLAN)
    found = tensors_sha256(teacher.state_dict())
    if found != plan.base.weights_sha256:
        wrong = f"{student} was cut from a model with sha256 {plan.base.weights_sha256[:12]}, {folder} has {found[:12]}"
        raise InputError(f"{wrong}; give the model it was cut from, or set the weights of finetune.loss but noise to 0")
    return teacher.requires_grad_(requires_grad=False), kept_channels(teacher, plan)


def kept_channels(teacher: nn.Module, plan: Plan) -> Channels:
    """List the residual blocks, and which of their output channels were kept."""
    blocks = [name for name, module in teacher.named_modules() if isinstance(module, ResnetBlock2D)]
    layers = {name: plan.layers.get(f"{name}.conv2") for name in blocks}
    return {name: layer.outputs if layer else None for name, layer in layers.items()}


class FeatureHooks:
    """Keeps what blocks compute between `listen` and `take`; gradient checkpointing computes it again afterwards.

    Args:
        unet: The model, which must not be compiled yet.
        channels: The blocks, and which channels of each; None takes all.
    """

    def __init__(self, unet: nn.Module, channels: Channels) -> None:
        self.names, self.is_open = list(channels), False
        self.found: dict[str, torch.Tensor] = {}
        for name, kept in channels.items():
            unet.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name, kept=kept: self._keep(name, kept, output)
            )

    def _keep(self, name: str, kept: list[int] | None, output: torch.Tensor) -> None:
        if self.is_open:
            self.found[name] = output if kept is None else output[:, kept]

    def listen(self) -> None:
        """Keep what comes from now on."""
        self.found, self.is_open = {}, True

    def take(self) -> list[torch.Tensor]:
        """Give the features of the last pass, block by block: [B, K, H, W] each."""
        features = [self.found[name] for name in self.names]
        self.found, self.is_open = {}, False
        return features


class Distillation:
    """Student and, where there is one, teacher, before the same noisy images.

    Args:
        student: As the engine prepared it.
        unet: The student's own modules, below what the engine wrapped around them.
        scheduler: The noise schedule.
        engine: Where they compute.
        teacher: The dense model and the channels that were kept of its blocks; None without distillation.
        conditions: What the models are told of each image; None for models that take nothing.
        with_features: Whether features are compared.
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
        self.student, self.scheduler, self.engine = student, scheduler, engine
        self.table = torch.from_numpy(np.array(conditions.table)).to(engine.device) if conditions else None
        self.teacher = teacher[0] if teacher else None
        hooked = teacher[1] if teacher and with_features else {}
        self.hooks = [FeatureHooks(unet, dict.fromkeys(hooked))]
        if self.teacher is not None:
            self.hooks.append(FeatureHooks(self.teacher, hooked))

    def predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Let a model predict the noise in x_t = √ᾱ x_0 + √(1 − ᾱ) ε (Ho et al., 2020, eq. 4)."""
        noisy = self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)  # type: ignore[arg-type]  # integers
        told = {} if self.table is None else {"encoder_hidden_states": self.table[batch.labels]}
        predicted: torch.Tensor = model(noisy, batch.timesteps, **told, return_dict=False)[0]
        return predicted

    def forward(self, batch: Batch) -> Prediction:
        """Let both predict the noise of a batch."""
        for hook in self.hooks:
            hook.listen()
        with self.engine.autocast():
            predicted = self.predict(self.student, batch)
            with torch.no_grad():
                taught = self.predict(self.teacher, batch) if self.teacher else None
        pairs = tuple(zip(*(hook.take() for hook in self.hooks), strict=True)) if self.teacher else ()
        return Prediction(batch.noise, predicted, taught, pairs)
