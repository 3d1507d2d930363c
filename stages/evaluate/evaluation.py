"""Reference and models -> quality and consistency of each model, under one protocol."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.evaluate.consistency import Pairs, images_to_mse, images_to_ssim
from stages.evaluate.quality import QualityMetrics
from stages.models.autoencoder import Autoencoder
from stages.models.complexity import count_attention_macs, count_macs, count_params
from stages.models.families import Denoiser
from stages.models.sampling import SamplingContext, draw_strip, image_seeds
from stages.protocol.evaluation import DENSE
from stages.protocol.extractors import Extractor
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference, draw_set
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256
from stages.storage.tensors import tensors_sha256

STRIP_IMAGES, STRIP_FRAMES = 3, 10
SHOWN, NUM_WORST = 48, 8
"""Number of images, and of least similar pairs, that are kept for the pictures."""


@dataclass(frozen=True)
class MeasuredModel:
    """The measurements of one model."""

    params: int
    macs: int
    """Without the matrix products inside attention, as in the paper's tables."""
    attention_macs: int
    size_bytes: int
    """Size of the weights' file."""
    weights_sha256: str
    """Hash of the weights' file."""
    sets: dict[str, list[float]]
    """Metric -> value of each set."""
    fid_pooled: float
    """FID of all sets together, which is less biased and has no interval."""
    pairs: Pairs
    """Compared with the dense model's images."""
    shown: NDArray[np.uint8]
    """First images of the first set: [images, C, H, W]."""
    worst: NDArray[np.uint8]
    """Dense and own images of the least similar pairs, in the order of `pairs.worst`: [2, pairs, C, H, W]."""
    strip: NDArray[np.uint8]
    """Denoising from noise to image: [images, frames, C, H, W]."""

    def estimate(self, metric: str) -> Estimate:
        """Mean of a metric over the sets, with its interval."""
        return estimate(self.sets[metric])

    def above(self, other: "MeasuredModel", metric: str) -> Estimate:
        """Difference of a metric from that of another model, with its interval."""
        return paired_difference(self.sets[metric], other.sets[metric])


@dataclass(frozen=True)
class Evaluation:
    """The measurements of all models, the dense one first."""

    protocol: Protocol
    dense_sha256: str
    """Hash of the dense model's weights, by `tensors_sha256`."""
    floor: float
    """FID of one half of the real images against the other."""
    models: dict[str, MeasuredModel]


def evaluate(
    models: Mapping[str, Denoiser],
    files: Mapping[str, Path],
    scheduler: DDPMScheduler,
    reference: Reference,
    extractor: Extractor,
    autoencoder: Autoencoder | None = None,
) -> Evaluation:
    """Measure the dense model on the images in the reference, and the other models on images that are drawn now.

    Args:
        models: By name; the dense model is called dense.
        files: The file of each model's weights.
        scheduler: The noise schedule.
        reference: Images and features of the dense model.
        extractor: The extractor of the reference.
        autoencoder: Of models that draw latents.

    Raises:
        InputError: The reference comes from another dense model, or images are not finite.
    """
    dense_sha256 = tensors_sha256(models[DENSE].state_dict())
    if dense_sha256 != reference.model_sha256:
        found = f"{dense_sha256[:8]}…, the reference was drawn by {reference.model_sha256[:8]}…"
        raise InputError(f"the dense model has weights of sha256 {found}; run the reference stage again")
    quality_metrics = QualityMetrics(reference.real_features, reference.protocol)
    context = SamplingContext(autoencoder, reference.table, reference.protocol.guidance)
    measured = {
        name: _measure(name, unet, files[name], scheduler, reference, extractor, quality_metrics, context)
        for name, unet in models.items()
    }
    return Evaluation(reference.protocol, dense_sha256, quality_metrics.floor(), measured)


def _measure(
    name: str,
    unet: Denoiser,
    file: Path,
    scheduler: DDPMScheduler,
    reference: Reference,
    extractor: Extractor,
    quality_metrics: QualityMetrics,
    context: SamplingContext,
) -> MeasuredModel:
    protocol = reference.protocol
    gathered = _Gathered()
    for index, dense_samples in enumerate(reference.samples):
        if name == DENSE:
            samples, features = dense_samples, reference.features[index]
        else:
            samples = draw_set(unet, scheduler, protocol, index, extractor.batch_size, name, context)
            features = extractor.features(samples)
        gathered.add(samples, dense_samples, features, asdict(quality_metrics(features, index)))
    pairs = gathered.pairs()
    seeds, labels = image_seeds(protocol.seed, STRIP_IMAGES), context.labels(protocol.seed, STRIP_IMAGES)
    return MeasuredModel(
        params=count_params(unet),
        macs=count_macs(unet),
        attention_macs=count_attention_macs(unet),
        size_bytes=file.stat().st_size,
        weights_sha256=file_sha256(file),
        sets=gathered.sets(),
        fid_pooled=quality_metrics.fid(torch.cat(gathered.features)),
        pairs=pairs,
        shown=gathered.shown,
        worst=gathered.worst(pairs),
        strip=draw_strip(unet, scheduler, seeds, protocol.sampler, STRIP_FRAMES, protocol.precision, context, labels),
    )


class _Gathered:
    """Measurements of the sets so far: numbers of all images, pictures of a few."""

    def __init__(self) -> None:
        self.shown: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.features: list[torch.Tensor] = []
        self.quality: list[dict[str, float]] = []
        self.ssim: list[NDArray[np.float64]] = []
        self.mse: list[NDArray[np.float64]] = []
        self.pictures: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def add(
        self,
        samples: NDArray[np.uint8],
        dense_samples: NDArray[np.uint8],
        features: torch.Tensor,
        quality: dict[str, float],
    ) -> None:
        """Add the next set."""
        if not self.ssim:
            self.shown = np.array(samples[:SHOWN])
        self.features.append(features)
        self.quality.append(quality)
        self.ssim.append(images_to_ssim(samples, dense_samples))
        self.mse.append(images_to_mse(samples, dense_samples))
        for index in np.argsort(self.ssim[-1], kind="stable")[:NUM_WORST]:
            self.pictures[len(self.ssim) - 1, int(index)] = np.stack([dense_samples[index], samples[index]])

    def pairs(self) -> Pairs:
        """Pairs of all sets."""
        return Pairs(np.stack(self.ssim), np.stack(self.mse))

    def sets(self) -> dict[str, list[float]]:
        """Value of each metric on each set."""
        found = {key: [row[key] for row in self.quality] for key in self.quality[0]}
        return {**found, "ssim": [float(s.mean()) for s in self.ssim], "mse": [float(s.mean()) for s in self.mse]}

    def worst(self, pairs: Pairs) -> NDArray[np.uint8]:
        """Pictures of the least similar pairs: [2, pairs, C, H, W]."""
        return np.stack([self.pictures[place] for place in pairs.worst(NUM_WORST)], axis=1)
