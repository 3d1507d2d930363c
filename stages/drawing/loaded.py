"""A folder and settings -> a model that was loaded and checked, ready to draw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.drawing.labels import Labels
from stages.drawing.source import Settings
from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import read_autoencoder
from stages.models.families import Denoiser
from stages.models.pipeline import read_scheduler
from stages.models.samplers import check_sampler
from stages.models.sampling import SamplingContext, check_guidance, check_variance
from stages.models.variants.cache import interval_of
from stages.models.variants.folder import read_model
from stages.models.variants.graph import runs_graph
from stages.models.variants.kinds import check_cache_sampler
from stages.runtime.device import check_precision, select_device
from stages.runtime.errors import InputError


@dataclass(frozen=True)
class Loaded:
    """A model, or a variant of one, on the device that draws."""

    unet: Denoiser
    scheduler: Any
    """The noise schedule."""
    context: SamplingContext


def load_model(folder: Path, settings: Settings, labels: Labels, name: str) -> Loaded:
    """Load a model, or a variant of one, and check that everything fits it.

    Args:
        folder: The folder of the pipeline or variant.
        settings: How images are drawn.
        labels: Where the classes come from.
        name: What the model is called, for messages.

    Raises:
        InputError: The folder is damaged, or sampler, guidance, precision, classes or cache do not fit.
    """
    device = select_device()
    check_precision(settings.precision, "reference.precision", device)
    unet, scheduler = read_model(folder, device), read_scheduler(folder)
    if runs_graph(unet) and settings.precision != "float32":
        found = f"{name} is a graph, which computes in float32, and its precision is {settings.precision}"
        raise InputError(f"{found}; draw with the model itself, or by a reference of float32")
    table = read_class_embedding(unet, folder)
    labels.check(table)
    check_guidance(table, settings.guidance, "reference", name)
    check_variance(unet, scheduler, name)
    check_sampler(scheduler, settings.sampler)
    interval = interval_of(unet)
    check_cache_sampler(interval, settings.sampler, f"{name} has cache-{interval}")
    return Loaded(unet, scheduler, SamplingContext(read_autoencoder(folder, device), table, settings.guidance))
