"""Models and a reference -> files of the drawn images, their features, and their similarity to the dense model's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.evaluate.consistency import Pairs, images_to_mse, images_to_ssim
from stages.evaluate.opened import OpenedReference
from stages.models.families import Denoiser
from stages.protocol.evaluation import DENSE
from stages.protocol.reference import Reference, draw_set
from stages.runtime.processes import Processes
from stages.storage.rows import RowFile, array_file, create_together


@dataclass(frozen=True)
class DrawnFiles:
    """What is measured on the images of one model, in files that the processes write as the images come."""

    samples: RowFile
    """[sets, N, C, H, W] uint8."""
    features: RowFile
    """[sets, N, D] float32."""
    ssim: RowFile
    """[sets, N] float64, with the dense model's image from the same noise."""
    mse: RowFile
    """[sets, N] float64."""

    def row_files(self) -> list[RowFile]:
        """Return the four."""
        return [self.samples, self.features, self.ssim, self.mse]

    def pairs(self) -> Pairs:
        """Return the similarity of all images."""
        return Pairs(np.array(self.ssim.read()), np.array(self.mse.read()))


@contextmanager
def on_device(unet: Denoiser, device: torch.device) -> Iterator[Denoiser]:
    """Move a model to a device, and back to its own in the end; an ONNX graph, which has no weights, stays there."""
    own = unet.device
    nn.Module.to(unet, device if any(True for _ in unet.parameters()) else own)
    try:
        yield unet
    finally:
        nn.Module.to(unet, own)


def drawn_files(folder: Path, name: str, reference: Reference) -> DrawnFiles:
    """Describe the files of one model."""
    sets, samples = reference.samples.shape[:2], reference.samples
    return DrawnFiles(
        array_file(folder / f"{name}-samples.npy", np.uint8, samples.shape),
        array_file(folder / f"{name}-features.npy", np.float32, tuple(reference.features.shape)),
        array_file(folder / f"{name}-ssim.npy", np.float64, sets),
        array_file(folder / f"{name}-mse.npy", np.float64, sets),
    )


def draw_models(
    models: Mapping[str, Denoiser],
    folder: Path,
    opened: OpenedReference,
    processes: Processes,
) -> dict[str, DrawnFiles]:
    """Draw images of all models but the dense one, and write what is measured on them; processes share the batches.

    Returns:
        The files of each model, once all processes have written.

    Raises:
        InputError: Images are not finite, or the disk is full.
    """
    reference, extractor = opened.reference, opened.extractor
    files = {name: drawn_files(folder, name, reference) for name in models if name != DENSE}
    create_together([file for drawn in files.values() for file in drawn.row_files()], processes)
    protocol, size, before = reference.protocol, extractor.batch_size, 0
    starts = range(0, protocol.num_images, size)
    for name, target in files.items():
        for index, dense in enumerate(reference.samples):
            own = processes.share(starts, before)
            before += len(starts)
            first = index * protocol.num_images
            with on_device(models[name], processes.device) as unet:
                batches = draw_set(unet, opened.scheduler, protocol, index, size, name, opened.sampling, own)
                for start, pixels in batches:
                    others = dense[start : start + len(pixels)]
                    target.samples.write(first + start, pixels)
                    target.features.write(first + start, extractor.features(pixels).numpy())
                    target.ssim.write(first + start, images_to_ssim(pixels, others))
                    target.mse.write(first + start, images_to_mse(pixels, others))
    processes.wait()
    return files
