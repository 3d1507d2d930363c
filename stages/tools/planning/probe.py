"""A dense and a pruned model on this device -> seconds and memory of each kind of pass, from a few timed ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import Conditions, Images
from stages.evaluate.consistency import images_to_mse, images_to_ssim
from stages.finetune.distillation import kept_channels
from stages.finetune.forecast import elapsed_s
from stages.finetune.trainer import Trainer
from stages.models.autoencoder import Autoencoder, image_shape
from stages.models.complexity import measure_peak_bytes, weights_bytes
from stages.models.families import Denoiser, example_inputs, family_of, forward, sample_shape
from stages.models.latency import forward_pass
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.plan import Plan
from stages.models.sampling import cast_model
from stages.params import Params
from stages.protocol.extractors import Extractor
from stages.runtime.device import computing
from stages.storage.tensors import tensors_sha256
from stages.tools.planning.forecast import Rates
from stages.tools.planning.workload import ModelSize, Pass, training_bytes

SECONDS = 1.5
"""A batch is doubled until it takes as long, or is as large as the stage's."""
PAIRS = 8
"""Pairs of images that are compared."""


@dataclass(frozen=True)
class Subject:
    """What is probed."""

    dense: Denoiser
    pruned: Denoiser
    plan: Plan
    scheduler: DDPMScheduler
    autoencoder: Autoencoder | None = None


def measure_rates(
    subject: Subject,
    params: Params,
    size: ModelSize,
    *,
    startup_s: float,
    cut_s: float,
    extractor: Extractor | None = None,
    pack_s: float | None = None,
) -> Rates:
    """Time every kind of pass in batches as large as the stages', or smaller ones where those take long.

    Args:
        subject: The models; their weights do not change.
        params: All of params.yaml.
        size: Sizes of the models.
        startup_s: Seconds that a stage takes before it computes.
        cut_s: Seconds that planning and cutting took.
        extractor: The extractor of the protocol; None where its weights are not there yet.
        pack_s: Seconds to pack one image; None where it is not known.
    """
    base_bytes = float(psutil.Process().memory_info().rss) if subject.dense.device.type == "cpu" else 0.0
    seconds: dict[Pass, float] = {} if pack_s is None else {"pack": pack_s}
    seconds |= {"cut": cut_s, **_weights_seconds(subject, size)}
    seconds |= _drawing_seconds(subject, params)
    seconds["gradient"] = seconds_each(lambda batch: _gradient(subject.dense, batch), _calibration_batch(params))
    seconds |= _step_seconds(subject, params, seconds)
    seconds["heldout"] = seconds["pruned"]  # the teacher predicts the held-out images once
    seconds |= _image_seconds(subject, extractor)
    memory = {name: base_bytes + value for name, value in _memory(subject, params, size).items()}
    return Rates(seconds, startup_s, memory)


def seconds_each(make: Callable[[int], Callable[[], object]], largest: int) -> float:
    """Time a function on batches of 1, 2, 4, … images up to the largest, until one takes long; returns s per image.

    Args:
        make: Batch size -> the function to time.
        largest: The batch size that the stage has.
    """
    batch = 1
    while True:
        run = make(batch)
        first = elapsed_s(run)
        best = first if first > SECONDS else min(elapsed_s(run) for _ in range(2))
        if batch == largest or first > SECONDS:
            return best / batch
        batch = min(2 * batch, largest)


def _drawing_seconds(subject: Subject, params: Params) -> dict[Pass, float]:
    """Time predictions of both models as the protocol draws: in its precision and batches."""
    precision = params.reference.precision
    models: dict[Pass, Denoiser] = {"dense": subject.dense, "pruned": subject.pruned}
    found: dict[Pass, float] = {}
    with torch.inference_mode(), computing(precision):
        for name, unet in models.items():
            passes = partial(forward_pass, cast_model(unet, precision))
            found[name] = seconds_each(passes, params.reference.batch_size)
    return found


def _weights_seconds(subject: Subject, size: ModelSize) -> dict[Pass, float]:
    """Time one parameter's way to the disk and back, by those of the pruned model."""
    with TemporaryDirectory(prefix="espalier-") as place:
        folder = Path(place) / "model"
        write_s = elapsed_s(lambda: write_pipeline(folder, subject.pruned, subject.scheduler))
        read_s = elapsed_s(lambda: tensors_sha256(read_unet(folder, subject.pruned.device).state_dict()))
    return {"read": read_s / size.pruned_params, "write": write_s / size.pruned_params}


def _calibration_batch(params: Params) -> int:
    return params.importance.num_images * params.importance.timesteps_per_pass


def _gradient(unet: Denoiser, batch: int) -> Callable[[], object]:
    """Return a function that computes the gradients of all weights on a batch, and clears them."""
    inputs = example_inputs(unet, batch)

    def run() -> None:
        """Run one forward and one backward pass."""
        unet.requires_grad_().zero_grad(set_to_none=True)
        forward(unet, inputs).square().mean().backward()
        unet.zero_grad(set_to_none=True)

    return run


def _step_seconds(subject: Subject, params: Params, known: dict[Pass, float]) -> dict[Pass, float]:
    """Time a training step without the Jacobian loss and, if there is one, a step with it."""
    batch = _affordable_batch(params, known)
    loss = params.finetune.loss
    plain = loss.model_copy(update={"jacobian": None})
    found: dict[Pass, float] = {"step": _trainer(subject, params, batch, plain).mean_step_s() / batch}
    if loss.jacobian:
        images = loss.jacobian.images and loss.jacobian.images * batch // params.finetune.batch_size
        each = loss.jacobian.model_copy(update={"every": 1, "images": images, "ramp_steps": 0})
        trainer = _trainer(subject, params, batch, loss.model_copy(update={"jacobian": each}))
        found["jacobian step"] = trainer.mean_step_s() / batch
    return found


def _affordable_batch(params: Params, known: dict[Pass, float]) -> int:
    """Halve the batch of training while a step of it would take long and the parts of a step stay whole."""
    finetune = params.finetune
    _, divided = finetune.divided
    batch, parts = finetune.batch_size, finetune.engine.accumulate
    while batch * known["gradient"] > SECONDS and batch % 2 == 0 and divided % 2 == 0 and divided // 2 % parts == 0:
        batch, divided = batch // 2, divided // 2
    return batch


def _trainer(subject: Subject, params: Params, batch: int, loss: object) -> Trainer:
    """Build the trainer of the stage finetune, on random images and with everything but its steps made small."""
    changes = {"steps": 1, "batch_size": batch, "loss": loss, "heldout_images": 1, "snapshots": (), "samples": None}
    finetune = params.finetune.model_copy(update={**changes, "warmup_steps": 0})
    rng = np.random.default_rng(0)
    shape = sample_shape(subject.dense)
    is_latent = subject.autoencoder is not None
    train = (
        rng.standard_normal((batch, *shape)).astype(np.float16)
        if is_latent
        else rng.integers(0, 256, (batch, *shape), np.uint8)
    )
    conditions = None
    for rows in family_of(subject.dense).example_condition(subject.dense, 2).values():
        conditions = Conditions(rows.cpu().numpy(), np.zeros(batch, np.int64), np.zeros(1, np.int64))
    teacher = (subject.dense, kept_channels(subject.dense, subject.plan)) if finetune.loss.needs_teacher else None
    subject.dense.requires_grad_(requires_grad=False)
    images = Images(train, train[:1], conditions)
    return Trainer(subject.pruned, subject.scheduler, images, finetune, 0, teacher)


def _image_seconds(subject: Subject, extractor: Extractor | None) -> dict[Pass, float]:
    """Time what is done with finished images: decoding, encoding, features and similarity."""
    shape = image_shape(subject.dense, subject.autoencoder)
    pixels = np.random.default_rng(0).integers(0, 256, (PAIRS, *shape), np.uint8)
    found: dict[Pass, float] = {}
    if coder := subject.autoencoder:
        latents = torch.zeros(1, *sample_shape(subject.dense), device=subject.dense.device)
        found["decode"], found["encode"] = (
            elapsed_s(lambda: coder.decode(latents)),
            elapsed_s(lambda: coder.encode(pixels[:1])),
        )
    if min(shape[1:]) >= 11:  # noqa: PLR2004  # SSIM's window; the protocol refuses smaller images
        found["similarity"] = elapsed_s(lambda: (images_to_ssim(pixels, pixels), images_to_mse(pixels, pixels))) / PAIRS
    if extractor:
        extractor.features(pixels)
        found["features"] = elapsed_s(lambda: extractor.features(pixels)) / PAIRS
    return found


def _memory(subject: Subject, params: Params, size: ModelSize) -> dict[str, float]:
    """Estimate the peak memory of the stages that take much, without that of Python and its packages."""
    dense, pruned = subject.dense, subject.pruned
    finetune, protocol = params.finetune, params.reference
    part = finetune.batch_size // finetune.engine.accumulate
    stored = activation_bytes(pruned)
    dense.requires_grad_()  # what counts the memory registers hooks on the gradients
    peaks = {unet: measure_peak_bytes(unet, 1) - weights_bytes(unet) for unet in (dense, pruned)}
    drawing = {unet: weights_bytes(unet) + protocol.batch_size * peak for unet, peak in peaks.items()}
    return {
        "reference": drawing[dense],
        "importance": 2 * weights_bytes(dense) + _calibration_batch(params) * activation_bytes(dense),
        "finetune": training_bytes(params, size) + part * stored,
        "evaluate": weights_bytes(dense) + 2 * drawing[pruned],
    }


def activation_bytes(unet: Denoiser) -> int:
    """Count the bytes that one image's forward pass stores for the backward pass; weights do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    stored: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Note a stored tensor once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive: list[nn.Module | torch.Tensor] = []  # so that no address is used twice
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet.requires_grad_()
        alive.append(forward(unet, example_inputs(unet)))
    return sum(stored.values())
