"""Reference and models -> quality and consistency of each model, under one protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluate.classes import classify_reference
from stages.evaluate.consistency import Pairs
from stages.evaluate.drawn import DrawnFiles, draw_models, on_device
from stages.evaluate.opened import OpenedReference
from stages.evaluate.scores import Measurer, by_set
from stages.models.complexity import count_attention_macs, count_macs, count_params
from stages.models.families import Denoiser
from stages.models.sampling import draw_strip, image_seeds
from stages.protocol.classifiers import predict
from stages.protocol.evaluation import DENSE, SHOWN, ClassChange
from stages.protocol.protocol import Protocol
from stages.runtime.processes import Processes
from stages.runtime.progress import track
from stages.storage.files import file_sha256

STRIP_IMAGES, STRIP_FRAMES = 3, 10
NUM_WORST = 8
"""Number of least similar pairs that are kept for the pictures."""


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
    classes: Sequence[ClassChange] = ()
    """The pairs by class of the dense model's image; empty for the dense model and where there are no classes."""


@dataclass(frozen=True)
class Evaluation:
    """The measurements of all models, the dense one first."""

    protocol: Protocol
    dense_sha256: str
    """Of the dense model, by `stages.protocol.reference.dense_sha256`."""
    floor: float
    """FID of one half of the real images against the other."""
    models: dict[str, MeasuredModel]
    classes_by: Literal["labels", "predictions"] | None = None
    """Where the classes of the images come from."""


def evaluate(
    models: Mapping[str, Denoiser],
    files: Mapping[str, Path],
    opened: OpenedReference,
    scratch: Path,
    processes: Processes | None = None,
) -> Evaluation | None:
    """Measure the dense model on the images in the reference, and the other models on images that are drawn now.

    Args:
        models: By name; the dense model is called dense.
        files: The file of each model's weights.
        opened: The reference, which has been checked against the models.
        scratch: An existing folder for the drawn images, which all processes see.
        processes: Share batches of images, and sets to measure.

    Returns:
        The measurements; None for all processes but the main one.

    Raises:
        InputError: Images are not finite, or the disk is full.
    """
    processes = processes or Processes(models[DENSE].device)
    reference = opened.reference
    drawn = draw_models(models, scratch, opened, processes)
    measurer = Measurer(reference, drawn, scratch, processes)
    scores = measurer.measure(list(models))
    if not processes.is_main:
        return None
    rows = dict(zip(models, scores, strict=True))
    measured = {}
    for name, row in track(rows.items(), "draw the steps of sampling, model", len(rows)):
        with on_device(models[name], processes.device) as unet:
            measured[name] = _describe(unet, files[name], opened, drawn.get(name), row)
    classes = classify_reference(opened)
    for name, images in drawn.items():  # all but the dense model
        predicted = predict(opened.extractor, torch.from_numpy(np.array(images.features.read())))
        changes = classes.changes(predicted, measured[name].pairs.ssim)
        measured[name] = replace(measured[name], classes=changes)
    floor = measurer.quality_metrics.floor()
    return Evaluation(reference.protocol, reference.model_sha256, floor, measured, classes.by)


def _describe(
    unet: Denoiser,
    file: Path,
    opened: OpenedReference,
    drawn: DrawnFiles | None,
    scores: NDArray[np.float64],
) -> MeasuredModel:
    """Collect the measurements of a model; the dense one, without files, has the images of the reference."""
    reference, context, protocol = opened.reference, opened.sampling, opened.reference.protocol
    samples = drawn.samples.read() if drawn else reference.samples
    pairs = drawn.pairs() if drawn else Pairs.of_equals(samples.shape[:2])
    worst = tuple(np.transpose(pairs.worst(NUM_WORST)))
    seeds, labels = image_seeds(protocol.seed, STRIP_IMAGES), context.labels(protocol.seed, STRIP_IMAGES)
    strip = draw_strip(
        unet, opened.scheduler, seeds, protocol.sampler, STRIP_FRAMES, protocol.precision, context, labels
    )
    return MeasuredModel(
        params=count_params(unet),
        macs=count_macs(unet),
        attention_macs=count_attention_macs(unet),
        size_bytes=file.stat().st_size,
        weights_sha256=file_sha256(file),
        sets={**by_set(scores), **pairs.means()},
        fid_pooled=float(scores[-1, 0]),
        pairs=pairs,
        shown=np.array(samples[0, :SHOWN]),
        worst=np.stack([reference.samples[worst], samples[worst]]),
        strip=strip,
    )
