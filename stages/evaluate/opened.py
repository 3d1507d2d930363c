"""A reference on disk -> all that models draw and are measured with under its protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.models.autoencoder import Autoencoder, image_shape, read_autoencoder
from stages.models.checks import check_images
from stages.models.families import Denoiser
from stages.models.pipeline import read_scheduler
from stages.models.sampling import SamplingContext
from stages.protocol.evaluation import DENSE
from stages.protocol.extractors import Extractor
from stages.protocol.params import ReferenceParams
from stages.protocol.reference import Reference, check_dense, read_reference
from stages.protocol.resolve import check_current


@dataclass(frozen=True)
class OpenedReference:
    """A reference, and what models draw and are measured with under its protocol."""

    reference: Reference
    extractor: Extractor
    scheduler: DDPMScheduler
    """The noise schedule of the dense model, and so of all."""
    autoencoder: Autoencoder | None = None
    """Of a dense model that draws latents."""

    @property
    def sampling(self) -> SamplingContext:
        """What sampling needs beside denoiser and noise schedule."""
        return SamplingContext(self.autoencoder, self.reference.table, self.reference.protocol.guidance)

    def check_models(self, models: Mapping[str, Denoiser], path: Path) -> None:
        """Check that the dense model among some drew the reference, and that all draw images of its size.

        Args:
            models: By name; the dense model is called dense.
            path: Where the reference is, for messages.

        Raises:
            InputError: The dense model is another one, or images have another size.
        """
        check_dense(models[DENSE], self.sampling, self.reference)
        for unet in models.values():
            check_images(self.reference.samples[0], image_shape(unet, self.autoencoder), path)


def open_reference(
    path: Path, dense: Path, params: ReferenceParams, seed: int, device: torch.device
) -> OpenedReference:
    """Read a reference, and the noise schedule and autoencoder of the dense model.

    Args:
        path: Output of the stage reference.
        dense: Folder of the dense model.
        params: The block reference.
        seed: The root seed.
        device: Where the autoencoder is put.

    Raises:
        InputError: A folder is damaged, or the reference has another protocol.
    """
    extractor = Extractor(params.extractor, params.batch_size)
    opened = OpenedReference(read_reference(path), extractor, read_scheduler(dense), read_autoencoder(dense, device))
    check_current(opened.reference.protocol, params, seed, opened.scheduler, extractor, path)
    return opened
