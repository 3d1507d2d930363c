"""Dense model, real images and protocol -> samples and features."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.artifacts import tensors_sha256
from stages.diffusion.families import Denoiser
from stages.protocol.extractors import Extractor
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference, draw_set


def make_reference(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    real: NDArray[np.uint8],
    protocol: Protocol,
    extractor: Extractor,
) -> Reference:
    """Draw with the dense model, and look at that and at the real images, once."""
    real_features = extractor.features(real)
    samples = np.empty((protocol.sets, protocol.num_images, *real.shape[1:]), np.uint8)
    for index in range(protocol.sets):
        samples[index] = draw_set(unet, scheduler, protocol, index, extractor.batch_size, "dense")
    features = torch.stack([extractor.features(drawn) for drawn in samples])
    return Reference(protocol, tensors_sha256(unet.state_dict()), samples, features, real_features)
