"""Dense model, real images and protocol -> the reference: samples of the model, and features of both."""

from pathlib import Path

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Conditions, PixelArray
from stages.models.autoencoder import read_autoencoder
from stages.models.checks import check_conditions
from stages.models.families import Denoiser
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext, check_guidance
from stages.protocol.extractors import Extractor
from stages.protocol.protocol import Protocol
from stages.protocol.reference import dense_sha256, draw_set, reference_files, write_about
from stages.runtime.processes import Processes
from stages.storage.rows import create_together


def load_context(unet: Denoiser, model: Path, conditions: Conditions | None, guidance: float | None) -> SamplingContext:
    """Load the codec and the table of conditions that the dense model needs for sampling.

    Raises:
        InputError: The conditions do not fit the model, or guidance is set and the model or its table does not
            support it.
    """
    check_conditions(unet, conditions, model)
    table = conditions.table if conditions else None
    check_guidance(table, guidance, "reference", model)
    return SamplingContext(read_autoencoder(model, unet.device), table, guidance)


def make_reference(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    real: PixelArray,
    protocol: Protocol,
    extractor: Extractor,
    folder: Path,
    context: SamplingContext = DEFAULT_CONTEXT,
    processes: Processes | None = None,
) -> int:
    """Draw the sets of samples with the dense model, and extract features of them and of the real images.

    Each process draws some batches and writes them to the same files as they come; the main one writes the rest.

    Returns:
        The number of features of an image.
    """
    processes = processes or Processes(unet.device)
    num_features = extractor.features(real[:1]).shape[1]
    files = reference_files(folder, protocol, real.shape[1:], num_features)
    create_together(files.row_files(), processes)
    if processes.is_main:
        write_about(folder, protocol, dense_sha256(unet, context), context.table)
    size = extractor.batch_size
    for start in processes.share(range(0, len(real), size)):
        files.real_features.write(start, extractor.features(real[start : start + size]).numpy())
    starts = range(0, protocol.num_images, size)
    for index in range(protocol.sets):
        own = processes.share(starts, before=index * len(starts))
        first = index * protocol.num_images
        for start, pixels in draw_set(unet, scheduler, protocol, index, size, "dense", context, own):
            files.samples.write(first + start, pixels)
            files.features.write(first + start, extractor.features(pixels).numpy())
    processes.wait()
    return num_features
