"""Reference and models -> everything that is measured of them, under one protocol."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.artifacts import tensors_sha256
from stages.diffusion.cost import count_attention_macs, count_macs, count_params
from stages.diffusion.families import Denoiser
from stages.diffusion.sampling import draw_strip, image_seeds
from stages.errors import InputError
from stages.evaluate.consistency import Pairs, compare_pairs
from stages.evaluate.costs import Cost, measure_costs
from stages.evaluate.intervals import Estimate, estimate, paired_difference
from stages.evaluate.quality import Judge
from stages.params import CostParams
from stages.protocol.extractors import Extractor
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference, draw_sets, sets_to_features

DENSE = "dense"
METRICS = ("fid", "kid", "precision", "recall", "ssim", "mse")
STRIP_IMAGES, STRIP_FRAMES = 3, 10


@dataclass(frozen=True)
class Measured:
    """What one model was found to be."""

    params: int
    macs: int
    """Without the products inside attention, as in the paper's tables."""
    attention_macs: int
    size_bytes: int
    """Of the weights on disk."""
    sets: dict[str, list[float]]
    """Metric -> its value on each set."""
    pairs: Pairs
    """Against the dense model's images."""
    samples: NDArray[np.uint8]
    """[sets, N, C, H, W]."""
    strip: NDArray[np.uint8]
    """[images, frames, C, H, W], from noise to picture."""

    def estimate(self, metric: str) -> Estimate:
        """Take a metric's mean over the sets, with its interval."""
        return estimate(self.sets[metric])

    def above(self, other: "Measured", metric: str) -> Estimate:
        """Estimate how much a metric is above that of another model."""
        return paired_difference(self.sets[metric], other.sets[metric])


@dataclass(frozen=True)
class Evaluation:
    """What the models were found to be, the dense one first."""

    protocol: Protocol
    dense_sha256: str
    floor: float
    """FID of one half of the real images against the other."""
    models: dict[str, Measured]
    costs: list[Cost]


def evaluate(
    models: Mapping[str, Denoiser],
    sizes_bytes: Mapping[str, int],
    scheduler: DDPMScheduler,
    reference: Reference,
    extractor: Extractor,
    costs: CostParams,
) -> Evaluation:
    """Measure the dense model, whose images the reference holds, and the others, whose images are drawn here.

    Args:
        models: By name; the dense model is called dense.
        sizes_bytes: Of each model's weights on disk.
        scheduler: The noise schedule.
        reference: What the dense model drew.
        extractor: The one that the reference was made with.
        costs: What the truth table covers.

    Raises:
        InputError: The reference comes from another dense model, or images are not finite.
    """
    dense_sha256 = tensors_sha256(models[DENSE].state_dict())
    if dense_sha256 != reference.model_sha256:
        found = f"{dense_sha256[:8]}…, the reference was drawn by {reference.model_sha256[:8]}…"
        raise InputError(f"the dense model has weights of sha256 {found}; run the reference stage again")
    judge = Judge(reference.real_features, reference.protocol)
    measured = {
        name: _measure(name, unet, sizes_bytes[name], scheduler, reference, extractor, judge)
        for name, unet in models.items()
    }
    return Evaluation(reference.protocol, dense_sha256, judge.floor(), measured, measure_costs(models, costs))


def _measure(
    name: str,
    unet: Denoiser,
    size_bytes: int,
    scheduler: DDPMScheduler,
    reference: Reference,
    extractor: Extractor,
    judge: Judge,
) -> Measured:
    protocol, samples, features = reference.protocol, reference.samples, reference.features
    if name != DENSE:
        samples = draw_sets(unet, scheduler, protocol, extractor.batch_size, name)
        features = sets_to_features(samples, extractor)
    pairs = compare_pairs(samples, reference.samples)
    quality = [asdict(judge(part, index)) for index, part in enumerate(features)]
    sets = {key: [row[key] for row in quality] for key in quality[0]}
    strip_seeds = image_seeds(protocol.seed, STRIP_IMAGES)
    return Measured(
        params=count_params(unet),
        macs=count_macs(unet),
        attention_macs=count_attention_macs(unet),
        size_bytes=size_bytes,
        sets={**sets, "ssim": pairs.ssim.mean(axis=1).tolist(), "mse": pairs.mse.mean(axis=1).tolist()},
        pairs=pairs,
        samples=samples,
        strip=draw_strip(unet, scheduler, strip_seeds, protocol.sampler, STRIP_FRAMES),
    )
