"""Reference and models -> everything that is measured of them, under one protocol."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.evaluate.consistency import Pairs, images_to_mse, images_to_ssim
from stages.evaluate.quality import QualityMetrics
from stages.models.autoencoder import Codec
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
"""Images of a model, and its least alike pairs, that are kept to be looked at."""


@dataclass(frozen=True)
class MeasuredModel:
    """What one model was found to be."""

    params: int
    macs: int
    """Without the products inside attention, as in the paper's tables."""
    attention_macs: int
    size_bytes: int
    """Of the weights on disk."""
    weights_sha256: str
    """Of that file."""
    sets: dict[str, list[float]]
    """Metric -> its value on each set."""
    fid_pooled: float
    """FID of all sets as one, which has less bias and no interval."""
    pairs: Pairs
    """Against the dense model's images."""
    shown: NDArray[np.uint8]
    """[images, C, H, W], the first of the first set."""
    worst: NDArray[np.uint8]
    """[2, pairs, C, H, W]: the dense model's images and this one's, in the order of `pairs.worst`."""
    strip: NDArray[np.uint8]
    """[images, frames, C, H, W], from noise to picture."""

    def estimate(self, metric: str) -> Estimate:
        """Take a metric's mean over the sets, with its interval."""
        return estimate(self.sets[metric])

    def above(self, other: "MeasuredModel", metric: str) -> Estimate:
        """Estimate how much a metric is above that of another model."""
        return paired_difference(self.sets[metric], other.sets[metric])


@dataclass(frozen=True)
class Evaluation:
    """What the models were found to be, the dense one first."""

    protocol: Protocol
    dense_sha256: str
    """Of the dense model's weights, by `tensors_sha256`."""
    floor: float
    """FID of one half of the real images against the other."""
    models: dict[str, MeasuredModel]


def evaluate(
    models: Mapping[str, Denoiser],
    files: Mapping[str, Path],
    scheduler: DDPMScheduler,
    reference: Reference,
    extractor: Extractor,
    codec: Codec | None = None,
) -> Evaluation:
    """Measure the dense model, whose images the reference holds, and the others, whose images are drawn here.

    Args:
        models: By name; the dense model is called dense.
        files: The file of each model's weights.
        scheduler: The noise schedule.
        reference: What the dense model drew.
        extractor: The one that the reference was made with.
        codec: Of models that draw latents.

    Raises:
        InputError: The reference comes from another dense model, or images are not finite.
    """
    dense_sha256 = tensors_sha256(models[DENSE].state_dict())
    if dense_sha256 != reference.model_sha256:
        found = f"{dense_sha256[:8]}…, the reference was drawn by {reference.model_sha256[:8]}…"
        raise InputError(f"the dense model has weights of sha256 {found}; run the reference stage again")
    quality_metrics = QualityMetrics(reference.real_features, reference.protocol)
    context = SamplingContext(codec, reference.table, reference.protocol.guidance)
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
    """What is kept of one set after the other: numbers of all images, pictures of a few."""

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
        """Take the next set in."""
        if not self.ssim:
            self.shown = np.array(samples[:SHOWN])
        self.features.append(features)
        self.quality.append(quality)
        self.ssim.append(images_to_ssim(samples, dense_samples))
        self.mse.append(images_to_mse(samples, dense_samples))
        for index in np.argsort(self.ssim[-1], kind="stable")[:NUM_WORST]:
            self.pictures[len(self.ssim) - 1, int(index)] = np.stack([dense_samples[index], samples[index]])

    def pairs(self) -> Pairs:
        """Put the pairs of all sets together."""
        return Pairs(np.stack(self.ssim), np.stack(self.mse))

    def sets(self) -> dict[str, list[float]]:
        """Give every metric's value on each set."""
        found = {key: [row[key] for row in self.quality] for key in self.quality[0]}
        return {**found, "ssim": [float(s.mean()) for s in self.ssim], "mse": [float(s.mean()) for s in self.mse]}

    def worst(self, pairs: Pairs) -> NDArray[np.uint8]:
        """Give the pictures of the least alike pairs: [2, pairs, C, H, W]."""
        return np.stack([self.pictures[place] for place in pairs.worst(NUM_WORST)], axis=1)
