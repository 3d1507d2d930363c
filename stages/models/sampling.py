"""A denoiser and one seed per image -> images."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.data.images import Table, has_empty, to_condition
from stages.models.autoencoder import Autoencoder
from stages.models.channels_last import to_channels_last
from stages.models.families import Condition, Denoiser, family_of, learns_variance, prediction, sample_shape
from stages.models.params import SamplerParams
from stages.models.pruned_own import OwnDenoiser
from stages.models.samplers import LEARNED_RANGE, Sampler, make_sampler, takes_variance
from stages.runtime.device import computing
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed, generator


@dataclass(frozen=True)
class SamplingContext:
    """What sampling needs besides the denoiser and noise schedule: autoencoder, conditions and guidance scale."""

    autoencoder: Autoencoder | None = None
    """Decodes the samples of a latent model; None for a model in pixel space."""
    table: Table | None = None
    """The condition of each class, the empty one last; None for an unconditional model."""
    guidance: float | None = None
    """Classifier-free guidance scale; None or 1 disables it."""

    def labels(self, seed: int, num_images: int, set_index: int = 0) -> list[int]:
        """Assign classes to the images of a set, all equally often and shuffled for each set; empty without a table."""
        if self.table is None:
            return []
        draws, num_classes = generator(seed, "classes", set_index), len(self.table) - 1
        rounds = [torch.randperm(num_classes, generator=draws) for _ in range(-(-num_images // num_classes))]
        return [int(label) for label in torch.cat(rounds)[:num_images]]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Decode latents to images; samples of a model in pixel space are returned unchanged."""
        return samples if self.autoencoder is None else self.autoencoder.decode(samples)


DEFAULT_CONTEXT = SamplingContext()
"""Context of an unconditional model in pixel space."""
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
"""Precision -> type of weights and activations."""
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Noisy samples and a timestep -> the model's output, float32: the predicted ε, v or x₀, and a learned variance."""


def check_guidance(table: Table | None, guidance: float | None, block: str, model: Path | str) -> None:
    """Check that a model with this table of conditions can be guided.

    Args:
        table: The conditions, the empty one last; None for an unconditional model.
        guidance: The scale; None and 1 need no empty condition.
        block: The block of params.yaml that sets it.
        model: How to call the model in messages.

    Raises:
        InputError: Guidance is set, and the model has no conditions or no empty one.
    """
    if guidance is not None and table is None:
        raise InputError(f"{block}.guidance is {guidance}, and {model} takes no conditions; set it to null")
    if table is not None and guidance not in (None, 1) and not has_empty(table):
        raise InputError(f"{block}.guidance is {guidance}, and {model} has no empty condition; set it to null")


def check_variance(unet: Denoiser, scheduler: DDPMScheduler | Sampler, model: Path | str) -> None:
    """Check that a model learns the variance that its noise schedule, or a sampler, takes of its output.

    Raises:
        InputError: It does not.
    """
    if scheduler.config.get("variance_type") == LEARNED_RANGE and not learns_variance(unet):
        found = f"{model} has variance_type {LEARNED_RANGE}, and its out_channels hold no variance"
        raise InputError(f"{found}; set variance_type in its scheduler's config to fixed_small")


def image_seeds(seed: int, num_images: int, set_index: int = 0) -> list[int]:
    """Derive one seed per image of a set, so that the batch size cannot change an image."""
    return [derive_seed(seed, "sample", set_index, index) for index in range(num_images)]


def draw(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    seeds: Sequence[int],
    sampler: SamplerParams,
    *,
    precision: str = "float32",
    batch_size: int,
    label: str,
    context: SamplingContext = DEFAULT_CONTEXT,
    labels: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Draw one image from each seed, as `draw_batches` does: [N, C, H, W] uint8."""
    starts = range(0, len(seeds), batch_size)
    batches = draw_batches(
        unet,
        scheduler,
        seeds,
        sampler,
        starts,
        precision=precision,
        batch_size=batch_size,
        label=label,
        context=context,
        labels=labels,
    )
    return np.concatenate([pixels for _, pixels in batches])


@torch.inference_mode()
def draw_batches(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    seeds: Sequence[int],
    sampler: SamplerParams,
    starts: Sequence[int],
    *,
    precision: str = "float32",
    batch_size: int,
    label: str,
    context: SamplingContext = DEFAULT_CONTEXT,
    labels: Sequence[int] = (),
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Draw one image from each seed, batch by batch; yields the place of each batch and its images [B, C, H, W] uint8.

    Args:
        unet: The model; with bfloat16 a copy of it is used.
        scheduler: The noise schedule that the model was trained with.
        seeds: One per image; it determines the initial noise and the noise of every step.
        sampler: Type and settings of the sampler.
        starts: Places in `seeds` of the batches to draw, multiples of the batch size.
        precision: float32, tf32 or bfloat16, of the model; the sampler always computes in float32.
        batch_size: Images per batch.
        label: Name of the model in progress and error messages.
        context: Autoencoder, conditions and guidance scale.
        labels: The class of each image, for a conditional model.

    Raises:
        InputError: The sampler does not fit the schedule, or an image is not finite.
    """
    make_sampler(scheduler, sampler)  # fails before the first batch
    model = _channels_last(cast_model(unet, precision))
    for start in track(starts, f"draw {label}, batch", len(starts)):
        part = slice(start, start + batch_size)
        with computing(precision):
            *_, samples = trajectory(
                model, make_sampler(scheduler, sampler), seeds[part], sampler.eta, context, labels[part]
            )
        yield start, to_pixels(_check_finite(context.decode(samples), seeds[part], label))


def cast_model(unet: Denoiser, precision: str) -> Denoiser:
    """Return the model itself if its weights have the type of this precision, else a copy; `computing` sees to tf32."""
    dtype = DTYPES[precision]
    if unet.dtype == dtype:
        return unet.eval()
    cast = copy.deepcopy(unet)
    nn.Module.to(cast, dtype)  # diffusers' own `to` warns about layers that these models do not have
    return cast.eval()


def _channels_last(unet: Denoiser) -> Denoiser:
    """Return a copy in channels-last layout if that is faster: in float32 on a CPU, by about 8 %."""
    if unet.device.type != "cpu" or unet.dtype != torch.float32:
        return unet
    converted = copy.deepcopy(unet)
    to_channels_last(converted)
    return converted


def initial_noise(unet: Denoiser, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw the initial noise of each image: [N, C, H, W] float32."""
    return torch.stack([torch.randn(sample_shape(unet), generator=generator) for generator in generators])


def predictor(unet: Denoiser, context: SamplingContext, labels: Sequence[int]) -> Predict:
    """Return the prediction of a model, with the conditions of `labels` and guidance if the model is conditional.

    ε = ε(∅) + s · (ε(c) − ε(∅)) (Ho and Salimans, 2022, eq. 6, with s = 1 + w). The same holds for v and x₀, since for
    one noisy image both are affine functions of ε. A learned variance is not guided: it is that of the class.
    """
    dtype = unet.dtype  # diffusers walks through all modules for it
    if context.table is None:
        return lambda noisy, timestep: unet(noisy.to(dtype), timestep).sample.float()
    own, both = conditions_of(unet, context.table, labels)

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Predict under the conditions of the labels, guided if the context says so."""
        noisy = noisy.to(dtype)
        timestep = timestep.to(noisy.device).reshape(-1)  # a DiT takes no number
        if context.guidance in (None, 1):
            return unet(noisy, timestep, **own).sample.float()  # type: ignore[no-any-return]
        output = unet(noisy.repeat(2, 1, 1, 1), timestep, **both).sample.float()
        unconditional, conditional = prediction(output, unet).chunk(2)
        guided: torch.Tensor = unconditional + context.guidance * (conditional - unconditional)
        variance = output[len(labels) :, guided.shape[1] :]
        return torch.cat([guided, variance], dim=1) if learns_variance(unet) else guided

    return predict


def conditions_of(unet: Denoiser, table: Table, labels: Sequence[int]) -> tuple[Condition, Condition]:
    """Return what the model gets for classes, and for as many empty conditions with these classes after them."""
    rows = torch.from_numpy(table).to(unet.device)
    rows = rows.to(unet.dtype) if rows.is_floating_point() else rows
    last = len(table) - 1
    return to_condition(rows, list(labels)), to_condition(rows, [*[last] * len(labels), *labels])


def trajectory(
    unet: Denoiser,
    sampler: Sampler,
    seeds: Sequence[int],
    eta: float = 0.0,
    context: SamplingContext = DEFAULT_CONTEXT,
    labels: Sequence[int] = (),
) -> Iterator[torch.Tensor]:
    """Denoise a batch; yields the model's input before each step and the final samples, float32 [N, C, H, W] each.

    Args:
        unet: The model, in the precision and layout that it runs in.
        sampler: A new sampler, since some count their steps.
        seeds: One per image.
        eta: Noise of each DDIM step relative to DDPM's; other samplers ignore it.
        context: Conditions and guidance scale.
        labels: The class of each image, for a conditional model.
    """
    check_variance(unet, sampler, "the model")
    predict, takes_all = predictor(unet, context, labels), takes_variance(sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    samples = (initial_noise(unet, generators) * sampler.init_noise_sigma).to(unet.device)
    accepted = inspect.signature(sampler.step).parameters
    options = {name: value for name, value in {"generator": generators, "eta": eta}.items() if name in accepted}
    for timestep, seen in zip(sampler.timesteps, _timesteps_for(unet, sampler), strict=True):
        noisy = sampler.scale_model_input(samples, timestep)
        yield noisy
        output = predict(noisy, seen)
        output = output if takes_all else prediction(output, unet)
        (samples, *_) = sampler.step(output, timestep, samples, **options, return_dict=False)
    yield samples


def takes_whole_timesteps(unet: Denoiser) -> bool:
    """Whether a model may look its timesteps up in a table."""
    has_table = isinstance(unet, OwnDenoiser) and any(isinstance(it, nn.Embedding) for it in unet.modules())
    return has_table or family_of(unet).known_timesteps(unet) is not None


def _timesteps_for(unet: Denoiser, sampler: Sampler) -> torch.Tensor:
    """Return the timesteps of a sampler as a model takes them: integers, if it may look them up in a table.

    Raises:
        InputError: They are fractional, and the model takes integers.
    """
    timesteps = sampler.timesteps
    if not timesteps.is_floating_point() or not takes_whole_timesteps(unet):
        return timesteps
    if (timesteps != timesteps.round()).any():
        name = type(sampler).__name__.removesuffix("Scheduler")
        found = f"{name} steps to timesteps such as {float(timesteps[timesteps != timesteps.round()][0]):g}"
        raise InputError(f"{found}, and the model takes whole ones; choose another spacing or scheduler of the sampler")
    return timesteps.long()


def to_pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] -> uint8, rounded and clipped."""
    pixels: NDArray[np.uint8] = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


@torch.inference_mode()
def draw_strip(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    seeds: Sequence[int],
    params: SamplerParams,
    num_frames: int,
    precision: str = "float32",
    context: SamplingContext = DEFAULT_CONTEXT,
    labels: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Draw images with intermediate states: [N, frames, C, H, W] uint8 from noise to image, denser towards the end."""
    sampler = make_sampler(scheduler, params)
    model = _channels_last(cast_model(unet, precision))
    with computing(precision):
        states = list(trajectory(model, sampler, seeds, params.eta, context, labels))
    chosen = ((1 - np.linspace(1, 0, num_frames) ** 2) * (len(states) - 1)).round().astype(int)
    return np.stack([to_pixels(context.decode(states[index])) for index in chosen], axis=1)


def _check_finite(images: torch.Tensor, seeds: Sequence[int], label: str) -> torch.Tensor:
    """Return the images unchanged.

    Raises:
        InputError: An image holds an infinity or NaN.
    """
    broken = [seed for seed, image in zip(seeds, images, strict=True) if not image.isfinite().all()]
    if broken:
        found = f"{label} draws {len(broken)} of {len(seeds)} images with values that are not finite"
        raise InputError(f"{found} (first: seed {broken[0]}); use other weights or reference.precision float32")
    return images
