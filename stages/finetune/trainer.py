"""A model, a loss and images -> a recovered model and its curve, resumable at any step."""

import copy
from statistics import fmean

import click
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.artifacts import Images, to_model_range
from stages.diffusion.families import Denoiser
from stages.errors import InputError
from stages.finetune.checkpoint import Checkpoint, Checkpoints, CurvePoint
from stages.finetune.loss import NoiseLoss
from stages.params import FinetuneParams
from stages.progress import track
from stages.seeds import derive_seed, generator

EMA_RAMP = 10


class Trainer:
    """Adam on the noise loss with gradient clipping and an exponential moving average of the weights.

    Every draw of step k comes from a seed of its own, so a training that stops and goes on takes the same steps as one
    that never stopped.
    """

    def __init__(
        self, unet: Denoiser, scheduler: DDPMScheduler, images: Images, params: FinetuneParams, seed: int
    ) -> None:
        if params.batch_size > len(images.train):
            found = f"finetune.batch_size {params.batch_size} is more than the {len(images.train)} training images"
            raise InputError(f"{found}; lower it in params.yaml")
        self.unet, self.ema = unet.train(), copy.deepcopy(unet).eval().requires_grad_(requires_grad=False)
        self.loss = NoiseLoss(scheduler)
        self.images = images
        self.params = params
        self.seed = seed
        self.optimizer = torch.optim.Adam(unet.parameters(), lr=params.learning_rate)
        self.done = 0
        self.losses: list[float] = []
        self.curve: list[CurvePoint] = []

    def run(self, checkpoints: Checkpoints) -> None:
        """Train to the last step, going on from the newest checkpoint where there is one."""
        if (checkpoint := checkpoints.newest()) is not None:
            self.restore(checkpoint)
            click.echo(f"finetune goes on from step {self.done}", err=True)
        if not self.curve:
            self.curve.append(CurvePoint(0, None, self.heldout_loss()))
        steps = range(self.done, self.params.steps)
        for _ in track(steps, "finetune, step", self.params.steps, done=self.done):
            self.step()
            if self.done % self.params.heldout_every == 0 or self.done == self.params.steps:
                self.note()
            if self.done % self.params.checkpoint_every == 0 and self.done < self.params.steps:
                checkpoints.save(self.checkpoint())

    def step(self) -> None:
        """Take one optimiser step.

        Raises:
            InputError: The loss is not finite.
        """
        draws = generator(self.seed, "finetune", self.done)
        torch.manual_seed(derive_seed(self.seed, "dropout", self.done))
        images = self._batch(draws)
        noise, timesteps = (tensor.to(self.unet.device) for tensor in self.loss.draw(images, draws))
        loss = self.loss(self.unet, images.to(self.unet.device), noise, timesteps).mean()
        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} at step {self.done}; lower finetune.learning_rate")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), self.params.clip_norm)
        self.optimizer.step()
        self.done += 1
        self.losses.append(loss.item())
        self._follow()

    def _batch(self, draws: torch.Generator) -> torch.Tensor:
        """Take the next images of an endless series of shuffles: [B, C, H, W] in [-1, 1]."""
        num_images, first = len(self.images.train), self.done * self.params.batch_size
        positions = range(first, first + self.params.batch_size)
        shuffles = {epoch: self._shuffle(epoch) for epoch in {position // num_images for position in positions}}
        chosen = [int(shuffles[position // num_images][position % num_images]) for position in positions]
        images = to_model_range(self.images.train[chosen])
        if self.params.flip:
            mirrored = torch.rand(len(images), generator=draws) < 0.5  # noqa: PLR2004
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def _shuffle(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.images.train), generator=generator(self.seed, "shuffle", epoch))

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights, faster in the first steps."""
        decay = min(self.params.ema_decay, (1 + self.done) / (EMA_RAMP + self.done))
        for kept, current in zip(self.ema.parameters(), self.unet.parameters(), strict=True):
            kept.lerp_(current, 1 - decay)

    def note(self) -> None:
        """Add a row to the curve."""
        self.curve.append(CurvePoint(self.done, fmean(self.losses), self.heldout_loss()))
        self.losses = []

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Measure the EMA weights on the held-out images, each under noise and a timestep that never change."""
        images, draws = to_model_range(self.images.heldout[: self.params.heldout_images]), generator(0, "heldout loss")
        noise, timesteps = self.loss.draw(images, draws)
        parts = [tensor.to(self.ema.device).split(self.params.batch_size) for tensor in (images, noise, timesteps)]
        return float(torch.cat([self.loss(self.ema, *part) for part in zip(*parts, strict=True)]).mean())

    def checkpoint(self) -> Checkpoint:
        """Collect everything that the next step depends on."""
        tensors = {f"unet.{name}": tensor for name, tensor in self.unet.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        return Checkpoint(self.done, tensors, self.losses, self.curve)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the training that wrote `checkpoint`."""
        self.done, self.losses, self.curve = checkpoint.step, list(checkpoint.losses), list(checkpoint.curve)
        self.unet.load_state_dict(_below("unet.", checkpoint.tensors))
        self.ema.load_state_dict(_below("ema.", checkpoint.tensors))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below("optimizer.", checkpoint.tensors).items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
