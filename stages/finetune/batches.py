"""Packed images and a step's number -> its batch, noise and timesteps, the same on every machine."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from stages.data.images import Images, check_num_images, evenly_spaced, has_empty, to_model_range
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator


@dataclass(frozen=True)
class Batch:
    """Inputs of one training step, or of the part of it that one process computes."""

    images: torch.Tensor
    """[B, C, H, W] in [-1, 1]."""
    noise: torch.Tensor
    """[B, C, H, W]."""
    timesteps: torch.Tensor
    """[B]."""
    labels: torch.Tensor
    """[B]: rows of the table of conditions; 0 for an unconditional model."""

    def __len__(self) -> int:
        return len(self.images)

    def split(self, size: int) -> list["Batch"]:
        """Split the batch into parts of `size` images; the last may be smaller."""
        parts = (tensor.split(size) for tensor in vars(self).values())
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def every(self, stride: int) -> "Batch":
        """Return each `stride`-th image, from the first."""
        return Batch(*(tensor[::stride] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on a device; where this batch is pinned, a GPU copies it without the host waiting."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def pinned(self) -> "Batch":
        """Return a copy in memory that a GPU reads by itself."""
        return Batch(*(tensor.pin_memory() for tensor in vars(self).values()))


class Batches:
    """Batches of an endless series of epochs, each in a new random order; every step has its own seed.

    Args:
        images: Packed images; of a memory-mapped array only the rows of a step are read.
        num_timesteps: T of the noise schedule.
        seed: Root seed of all draws.
        batch_size: Images per step, over all processes.
        flip: Whether each image is mirrored left to right with probability 1/2.
        antithetic: Whether nearly half of the timesteps mirror others, see `draw_timesteps`.
        label_dropout: Probability that an image gets the empty condition.

    Raises:
        InputError: The batch is larger than the data.
    """

    def __init__(
        self,
        images: Images,
        num_timesteps: int,
        seed: int,
        *,
        batch_size: int,
        flip: bool,
        antithetic: bool,
        label_dropout: float,
    ) -> None:
        check_num_images("finetune.batch_size", batch_size, len(images.train))
        check_flip(flip=flip, is_latent=images.source_pixels is not None)
        self.pixels, self.conditions = images.train, images.conditions
        self.num_timesteps, self.seed, self.batch_size = num_timesteps, seed, batch_size
        self.flip, self.antithetic, self.label_dropout = flip, antithetic, label_dropout
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int, rows: slice) -> Batch:
        """Return some rows of the batch of a step; they do not depend on which other rows are requested."""
        size, draws = self.batch_size, generator(self.seed, "finetune", step)
        chosen = self.choose(step)
        flipped = (torch.rand(size, generator=draws)[rows] < 0.5).numpy() if self.flip else None  # noqa: PLR2004
        noise = torch.randn((size, *self.pixels.shape[1:]), generator=draws)
        timesteps = draw_timesteps(size, self.num_timesteps, draws, antithetic=self.antithetic)
        labels = self._labels(chosen, draws)[rows]
        pixels = self.pixels[chosen[rows]]
        if flipped is not None:
            pixels[flipped] = pixels[flipped][..., ::-1]
        return Batch(to_model_range(pixels), noise[rows], timesteps[rows], labels)

    def _labels(self, chosen: list[int], draws: torch.Generator) -> torch.Tensor:
        """Return each image's row of the table of conditions: [B]; some are replaced by the empty condition.

        A model may have no empty condition; then no row is replaced.
        """
        if self.conditions is None:
            return torch.zeros(len(chosen), dtype=torch.long)
        labels, empty = torch.from_numpy(self.conditions.train[chosen]), len(self.conditions.table) - 1
        if not has_empty(self.conditions.table):
            return labels
        is_dropped = torch.rand(len(chosen), generator=draws) < self.label_dropout
        return torch.where(is_dropped, empty, labels)

    def choose(self, step: int) -> list[int]:
        """Return the indices of the images of a step; each epoch uses every image once, in its own order."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._index(*divmod(position, len(self.pixels))) for position in positions]

    def _index(self, epoch: int, position: int) -> int:
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(len(self.pixels), generator=generator(self.seed, "shuffle", epoch))
        return int(self.order[position])


def check_flip(*, flip: bool, is_latent: bool) -> None:
    """Check that no latents are mirrored: mirrored ones are not those of a mirrored image.

    Raises:
        InputError: They are.
    """
    if flip and is_latent:
        found = "finetune.flip is true, and mirrored latents are not those of a mirrored image"
        raise InputError(f"{found}; set it to false, and add mirrored images to the data if they help")


class Prefetcher:
    """Reads the next step's batch in a thread while the current step is computed.

    Args:
        batches: Source of the batches; a batch depends on its step alone, so threads and order change no bit.
        rows: Rows of each batch that this process computes.
    """

    def __init__(self, batches: Batches, rows: slice) -> None:
        self.batches, self.rows = batches, rows
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.pending: dict[int, Future[Batch]] = {}

    def get(self, step: int) -> Batch:
        """Return the batch of a step and start to read the next one."""
        batch = self.pending.pop(step, None) or self._submit(step)
        self.pending = {step + 1: self._submit(step + 1)}
        return batch.result()

    def _submit(self, step: int) -> "Future[Batch]":
        return self.pool.submit(self._read, step)

    def _read(self, step: int) -> Batch:
        batch = self.batches.at(step, self.rows)
        return batch.pinned() if torch.cuda.is_available() else batch


def draw_timesteps(size: int, num_timesteps: int, draws: torch.Generator, *, antithetic: bool) -> torch.Tensor:
    """Draw the timesteps of a batch: [size].

    If antithetic, size // 2 + 1 are drawn, and the rest are T - 1 - t of the first of them, as in the original
    (ddpm_exp/runners/diffusion.py of VainF/Diff-Pruning).
    """
    if not antithetic:
        return torch.randint(num_timesteps, (size,), generator=draws)
    drawn = torch.randint(num_timesteps, (size // 2 + 1,), generator=draws)
    return torch.cat([drawn, num_timesteps - 1 - drawn])[:size]


def heldout_batch(images: Images, limit: int, num_timesteps: int) -> Batch:
    """Build a batch of at most `limit` held-out images, with noise and timesteps that no seed changes."""
    draws = generator(0, "heldout loss")
    chosen = evenly_spaced(len(images.heldout), limit)
    clean = to_model_range(images.heldout[chosen])
    noise = torch.randn(clean.shape, generator=draws)
    labels = np.array(images.conditions.heldout[chosen]) if images.conditions else np.zeros(len(clean), np.int64)
    timesteps = draw_timesteps(len(clean), num_timesteps, draws, antithetic=False)
    return Batch(clean, noise, timesteps, torch.from_numpy(labels))
