"""Packed images and a step's number -> its batch, noise and timesteps, the same on every machine."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from stages.data.images import Images, evenly_spaced, to_model_range
from stages.finetune.params import FinetuneParams
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator


@dataclass(frozen=True)
class Batch:
    """What one step, or the part of it that a process computes, is taken on."""

    images: torch.Tensor
    """[B, C, H, W] in [-1, 1]."""
    noise: torch.Tensor
    """[B, C, H, W]."""
    timesteps: torch.Tensor
    """[B]."""
    labels: torch.Tensor
    """[B]: rows of the table of conditions; 0 for a model that takes none."""

    def __len__(self) -> int:
        return len(self.images)

    def split(self, size: int) -> list["Batch"]:
        """Cut it into parts of `size` images; the last may be smaller."""
        parts = (tensor.split(size) for tensor in vars(self).values())
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """Bring it to a device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


class Batches:
    """An endless series of shuffles of the images. Every draw of step k comes from a seed of its own.

    Args:
        images: Memory-mapped as may be: only what a step needs is read.
        num_timesteps: T of the noise schedule.
        params: Batch size, flip, antithetic timesteps.
        seed: The root of every draw.

    Raises:
        InputError: A batch is larger than the data.
    """

    def __init__(self, images: Images, num_timesteps: int, params: FinetuneParams, seed: int) -> None:
        if params.batch_size > len(images.train):
            found = f"finetune.batch_size {params.batch_size} is more than the {len(images.train)} training images"
            raise InputError(f"{found}; lower it in params.yaml")
        self.pixels, self.conditions = images.train, images.conditions
        self.num_timesteps, self.params, self.seed = num_timesteps, params, seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int, share: slice) -> Batch:
        """Give a share of the batch of a step; shares of one step, put together, are its batch."""
        size, draws = self.params.batch_size, generator(self.seed, "finetune", step)
        chosen = self.choose(step)
        mirrored = (torch.rand(size, generator=draws)[share] < 0.5).numpy() if self.params.flip else None  # noqa: PLR2004
        noise = torch.randn((size, *self.pixels.shape[1:]), generator=draws)
        timesteps = draw_timesteps(size, self.num_timesteps, draws, antithetic=self.params.antithetic)
        labels = self._labels(chosen, draws)[share]
        pixels = self.pixels[chosen[share]]
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return Batch(to_model_range(pixels), noise[share], timesteps[share], labels)

    def _labels(self, chosen: list[int], draws: torch.Generator) -> torch.Tensor:
        """Give each image's condition, or the empty one by chance."""
        if self.conditions is None:
            return torch.zeros(len(chosen), dtype=torch.long)
        labels, empty = torch.from_numpy(self.conditions.train[chosen]), len(self.conditions.table) - 1
        is_dropped = torch.rand(len(chosen), generator=draws) < self.params.label_dropout
        return torch.where(is_dropped, empty, labels)

    def choose(self, step: int) -> list[int]:
        """Say which images a step takes: every epoch takes each once, in an order of its own."""
        size, num_images = self.params.batch_size, len(self.pixels)
        return [self._place(position, num_images) for position in range(step * size, (step + 1) * size)]

    def _place(self, position: int, num_images: int) -> int:
        epoch, index = divmod(position, num_images)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(num_images, generator=generator(self.seed, "shuffle", epoch))
        return int(self.order[index])


class Prefetcher:
    """Draws the next step's share of a batch in a thread, while the model computes on this one.

    Args:
        batches: What is drawn depends on the step alone, so neither thread nor order changes a bit.
        share: Of this process.
    """

    def __init__(self, batches: Batches, share: slice) -> None:
        self.batches, self.share = batches, share
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.coming: dict[int, Future[Batch]] = {}

    def take(self, step: int) -> Batch:
        """Give the share of a step, drawn before if it follows the last one."""
        wanted = self.coming.pop(step, None) or self._draw(step)
        self.coming = {step + 1: self._draw(step + 1)}
        return wanted.result()

    def _draw(self, step: int) -> "Future[Batch]":
        return self.pool.submit(self.batches.at, step, self.share)


def draw_timesteps(size: int, num_timesteps: int, draws: torch.Generator, *, antithetic: bool) -> torch.Tensor:
    """Draw the timesteps of a batch: [size], of which the second half mirrors the first where antithetic."""
    if not antithetic:
        return torch.randint(num_timesteps, (size,), generator=draws)
    half = torch.randint(num_timesteps, (size // 2 + 1,), generator=draws)
    return torch.cat([half, num_timesteps - 1 - half])[:size]


def heldout_batch(images: Images, limit: int, num_timesteps: int) -> Batch:
    """Give held-out images, at most `limit`, under noise and timesteps that never change, whatever the seed."""
    draws = generator(0, "heldout loss")
    chosen = evenly_spaced(len(images.heldout), limit)
    clean = to_model_range(images.heldout[chosen])
    noise = torch.randn(clean.shape, generator=draws)
    rows = np.array(images.conditions.heldout[chosen]) if images.conditions else np.zeros(len(clean), np.int64)
    timesteps = draw_timesteps(len(clean), num_timesteps, draws, antithetic=False)
    return Batch(clean, noise, timesteps, torch.from_numpy(rows))
