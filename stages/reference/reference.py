"""Dense model, real images and protocol -> samples of the model, and features of both."""

from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Conditions, PixelArray
from stages.models.autoencoder import read_autoencoder
from stages.models.checks import check_conditions
from stages.models.families import Denoiser
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext, check_guidance
from stages.protocol.extractors import Extractor
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference, draw_set
from stages.storage.tensors import tensors_sha256


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
    context: SamplingContext = DEFAULT_CONTEXT,
) -> Reference:
    """Draw the sets of samples with the dense model, and extract features of them and of the real images."""
    real_features = extractor.features(real)
    samples = np.empty((protocol.sets, protocol.num_images, *real.shape[1:]), np.uint8)
    for index in range(protocol.sets):
        samples[index] = draw_set(unet, scheduler, protocol, index, extractor.batch_size, "dense", context)
    features = torch.stack([extractor.features(drawn) for drawn in samples])
    return Reference(protocol, tensors_sha256(unet.state_dict()), samples, features, real_features, context.table)
