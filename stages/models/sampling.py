"""A UNet and one seed an image -> images, by any of diffusers' samplers."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.models.autoencoder import Codec, picture_shape
from stages.models.families import Denoiser, sample_shape
from stages.models.params import SamplerParams
from stages.runtime.errors import InputError, first_line
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed, generator

REACH = 0.8
"""Share of the timesteps that quadratic spacing covers, as in the original."""


@dataclass(frozen=True)
class SamplingContext:
    """What some models need beside themselves and their noise schedule to draw pictures."""

    codec: Codec | None = None
    """Of a model that draws latents."""
    table: NDArray[np.float32] | None = None
    """[K, S, D], of a conditional model: its encoder_hidden_states for each class; the last row says nothing."""
    guidance: float | None = None
    """How far to go from what is predicted under no condition to what is under that of the image, and beyond.

    None stays at the latter, as 1 does.
    """

    def labels(self, seed: int, num_images: int, set_index: int = 0) -> list[int]:
        """Give every image of a set a class, all equally often in an order of the set's own; none without a table."""
        if self.table is None:
            return []
        draws, num_classes = generator(seed, "classes", set_index), len(self.table) - 1
        rounds = [torch.randperm(num_classes, generator=draws) for _ in range(-(-num_images // num_classes))]
        return [int(label) for label in torch.cat(rounds)[:num_images]]


PLAIN_CONTEXT = SamplingContext()
"""For a model that draws pixels and is told nothing."""
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Noisy images and a timestep -> their noise, float32."""


class Sampler(Protocol):
    """What the samplers of diffusers have in common."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor
    init_noise_sigma: float
    step: Callable[..., tuple[torch.Tensor, ...]]
    set_timesteps: Callable[[int], None]

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Give the images the scale that the model was trained with."""
        ...


class QuadraticDdim(DDIMScheduler):
    """DDIM on steps that lie the closer together the less noise is left, as the original draws CIFAR-10."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = "cpu") -> None:
        """Take the squares of evenly spaced roots from 0 to √(.8·T), rounded down; the first few may be equal."""
        super().set_timesteps(num_inference_steps, device)
        roots = np.linspace(0, np.sqrt(REACH * self.config["num_train_timesteps"]), num_inference_steps)
        self.timesteps = torch.from_numpy((roots**2).astype(np.int64)[::-1].copy()).to(device)
        self.following = iter([*self.timesteps.tolist()[1:], -1])

    def step(  # type: ignore[override]  # one tensor a call, as all samplers here are called
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: Sequence[torch.Generator] | None = None,
        *,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """One DDIM step to the next of our timesteps (Song et al., 2021, eq. 12, with the σ of eq. 16)."""
        del return_dict
        there = next(self.following)
        alpha, alpha_next = self.alphas_cumprod[timestep], self.alphas_cumprod[there] if there >= 0 else torch.ones(())
        clean = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        if self.config["clip_sample"]:
            clean = clean.clamp(-1, 1)
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).clamp(min=0).sqrt()
        result = alpha_next.sqrt() * clean + (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * model_output
        if eta:
            result = result + sigma * _noise_like(sample, generator or ())
        return (result,)


def image_seeds(seed: int, num_images: int, set_index: int = 0) -> list[int]:
    """Give every image of a set a seed of its own, so that batching cannot change a picture."""
    return [derive_seed(seed, "sample", set_index, index) for index in range(num_images)]


@torch.inference_mode()
def draw(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    seeds: Sequence[int],
    sampler: SamplerParams,
    *,
    precision: str = "float32",
    batch_size: int,
    label: str,
    context: SamplingContext = PLAIN_CONTEXT,
    labels: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Draw one image from each seed.

    Args:
        unet: The model; with bfloat16 a copy of it computes.
        scheduler: The noise schedule that it was trained with.
        seeds: One an image; initial noise and the noise of every step come from it alone.
        sampler: How to draw.
        precision: float32 or bfloat16, of weights and activations; the sampler computes in float32.
        batch_size: Images at once.
        label: Whose images they are, for the progress.
        context: What the model needs beside itself.
        labels: The class of each image, for a conditional model.

    Returns:
        [N, C, H, W] uint8.

    Raises:
        InputError: The sampler does not fit the schedule, or an image is not finite.
    """
    make_sampler(scheduler, sampler)
    model = _lay_out(cast_model(unet, precision))
    starts = range(0, len(seeds), batch_size)
    drawn = np.empty((len(seeds), *picture_shape(unet, context.codec)), np.uint8)
    for start in track(starts, f"draw {label}, batch", len(starts)):
        part = slice(start, start + batch_size)
        steps = make_sampler(scheduler, sampler)  # anew, since some count their steps
        *_, images = trajectory(model, steps, seeds[part], sampler.eta, context, labels[part])
        drawn[part] = to_pixels(_checked(decoded(images, context.codec), seeds[part], label))
    return drawn


def make_sampler(scheduler: DDPMScheduler, params: SamplerParams) -> Sampler:
    """Build the sampler over the noise schedule of the model.

    Raises:
        InputError: It cannot be had with so many steps.
    """
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    if params.spacing == "leading" and num_timesteps % params.steps:
        found = f"reference.sampler.steps {params.steps} does not divide the {num_timesteps} timesteps of the model"
        raise InputError(f"{found}, so drawing would not begin at full noise; choose a divisor or another spacing")
    if params.steps > num_timesteps:
        raise InputError(f"reference.sampler.steps {params.steps} is more than the model's {num_timesteps} timesteps")
    quadratic = params.spacing == "quadratic"
    cls = QuadraticDdim if quadratic else getattr(diffusers, f"{params.scheduler}Scheduler")
    changes: dict[str, object] = {} if quadratic else {"timestep_spacing": params.spacing}
    if params.clip is not None:
        changes["clip_sample"] = params.clip
    # diffusers keeps a list of the keys that were left at their defaults, and ignores them when given here.
    known = {key: value for key, value in scheduler.config.items() if key[0] != "_" and key != "timestep_spacing"}
    try:
        sampler: Sampler = cls.from_config({**known, **changes})
        sampler.set_timesteps(params.steps)
    except Exception as error:  # noqa: BLE001  # they fail in many ways
        raise _unfit(params, error) from None
    if float(sampler.timesteps[0]) < num_timesteps / 2:
        found = f"{params.steps} {params.spacing} steps of {params.scheduler} begin at {float(sampler.timesteps[0]):g}"
        raise InputError(f"{found} of {num_timesteps} timesteps, far below full noise; take more or trailing ones")
    return sampler


def check_sampler(scheduler: DDPMScheduler, params: SamplerParams) -> None:
    """Go through all steps without a model: some samplers fail with few steps, or with many, in the middle of drawing.

    Raises:
        InputError: The sampler cannot be had so, or fails.
    """
    sampler, state = make_sampler(scheduler, params), torch.zeros(1, 1, 2, 2)
    try:
        for timestep in sampler.timesteps:
            sampler.scale_model_input(state, timestep)
            state, *_ = sampler.step(torch.zeros_like(state), timestep, state, return_dict=False)
    except Exception as error:  # noqa: BLE001  # they fail in many ways
        raise _unfit(params, error) from None


def _unfit(params: SamplerParams, error: Exception) -> InputError:
    found = f"{params.steps} {params.spacing} steps of {params.scheduler} do not work with this model's schedule"
    return InputError(f"reference.sampler: {found} ({first_line(error)}); choose others")


def cast_model(unet: Denoiser, precision: str) -> Denoiser:
    """Give the model itself in float32, and a copy of it in any other precision."""
    dtype: torch.dtype = getattr(torch, precision)
    if unet.dtype == dtype:
        return unet.eval()
    cast = copy.deepcopy(unet)
    nn.Module.to(cast, dtype)  # diffusers' own warns, of nothing that these models have
    return cast.eval()


def _lay_out(unet: Denoiser) -> Denoiser:
    """Give a copy whose weights lie channels last where that is faster: in float32 on a CPU, by some 8 %."""
    if unet.device.type != "cpu" or unet.dtype != torch.float32:
        return unet
    laid_out = copy.deepcopy(unet)
    nn.Module.to(laid_out, memory_format=torch.channels_last)
    return laid_out


def initial_noise(unet: Denoiser, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw the noise that each image begins with: [N, C, H, W] float32."""
    return torch.stack([torch.randn(sample_shape(unet), generator=generator) for generator in generators])


def predictor(unet: Denoiser, context: SamplingContext, labels: Sequence[int]) -> Predict:
    """Let a model predict noise, under the condition of each image and guided where there are conditions.

    ε = ε(∅) + s · (ε(c) − ε(∅)) (Ho and Salimans, 2022, eq. 6, with s = 1 + w).
    """
    if context.table is None:
        return lambda seen, timestep: unet(seen.to(unet.dtype), timestep).sample.float()
    table = torch.from_numpy(context.table).to(unet.device, unet.dtype)
    told, blank = table[list(labels)], table[-1:].expand(len(labels), -1, -1)

    def predict(seen: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen = seen.to(unet.dtype)
        if context.guidance in (None, 1):
            return unet(seen, timestep, encoder_hidden_states=told).sample.float()  # type: ignore[no-any-return]
        both = unet(seen.repeat(2, 1, 1, 1), timestep, encoder_hidden_states=torch.cat([blank, told])).sample.float()
        freely, guided = both.chunk(2)
        return freely + context.guidance * (guided - freely)  # type: ignore[no-any-return]

    return predict


def trajectory(
    unet: Denoiser,
    sampler: Sampler,
    seeds: Sequence[int],
    eta: float = 0.0,
    context: SamplingContext = PLAIN_CONTEXT,
    labels: Sequence[int] = (),
) -> Iterator[torch.Tensor]:
    """Denoise a batch step by step: what the model sees before each step, then the images, float32 [N, C, H, W]."""
    predict = predictor(unet, context, labels)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = (initial_noise(unet, generators) * sampler.init_noise_sigma).to(unet.device)
    accepted = inspect.signature(sampler.step).parameters
    options = {"generator": generators, "eta": eta}
    given = {name: value for name, value in options.items() if name in accepted}
    for timestep in sampler.timesteps:
        seen = sampler.scale_model_input(images, timestep)
        yield seen
        (images, *_) = sampler.step(predict(seen, timestep), timestep, images, **given, return_dict=False)
    yield images


def decoded(images: torch.Tensor, codec: Codec | None) -> torch.Tensor:
    """Give the images themselves, or what latents stand for."""
    return images if codec is None else codec.decode(images)


def to_pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """Round images in [-1, 1] to uint8."""
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
    context: SamplingContext = PLAIN_CONTEXT,
    labels: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Show images becoming: [N, frames, C, H, W] uint8 from noise to picture, closer together towards the end."""
    sampler = make_sampler(scheduler, params)
    model = _lay_out(cast_model(unet, precision))
    states = list(trajectory(model, sampler, seeds, params.eta, context, labels))
    chosen = ((1 - np.linspace(1, 0, num_frames) ** 2) * (len(states) - 1)).round().astype(int)
    return np.stack([to_pixels(decoded(states[index], context.codec)) for index in chosen], axis=1)


def _checked(images: torch.Tensor, seeds: Sequence[int], label: str) -> torch.Tensor:
    broken = [seed for seed, image in zip(seeds, images, strict=True) if not image.isfinite().all()]
    if broken:
        found = f"{label} draws {len(broken)} of {len(seeds)} images with values that are not finite"
        raise InputError(f"{found} (first: seed {broken[0]}); use other weights or reference.precision float32")
    return images


def _noise_like(images: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.stack([torch.randn(images.shape[1:], generator=one) for one in generators]).to(images)
