"""Dense model, real images and protocol -> samples and features."""

import numpy as np
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.artifacts import tensors_sha256
from stages.diffusion.families import Denoiser
from stages.protocol.extractors import Extractor
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference, draw_sets, sets_to_features


def make_reference(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    real: NDArray[np.uint8],
    protocol: Protocol,
    extractor: Extractor,
) -> Reference:
    """Draw with the dense model, and look at that and at the real images, once."""
    real_features = extractor.features(real)
    samples = draw_sets(unet, scheduler, protocol, extractor.batch_size, "dense")
    features = sets_to_features(samples, extractor)
    return Reference(protocol, tensors_sha256(unet.state_dict()), samples, features, real_features)
