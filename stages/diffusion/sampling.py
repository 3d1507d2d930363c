"""A UNet and one seed an image -> images, by any of diffusers' samplers."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.diffusion.families import Denoiser
from stages.errors import InputError, first_line
from stages.params import SamplerParams
from stages.progress import track
from stages.seeds import derive_seed

REACH = 0.8
"""Share of the timesteps that quadratic spacing covers, as in the original."""


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


def draw(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    seeds: Sequence[int],
    sampler: SamplerParams,
    *,
    precision: str = "float32",
    batch_size: int,
    label: str,
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

    Returns:
        [N, C, H, W] uint8.

    Raises:
        InputError: The sampler does not fit the schedule, or an image is not finite.
    """
    make_sampler(scheduler, sampler)
    model = _lay_out(cast_model(unet, precision))
    starts = range(0, len(seeds), batch_size)
    side = unet.config["sample_size"]
    drawn = np.empty((len(seeds), unet.config["in_channels"], side, side), np.uint8)
    for start in track(starts, f"draw {label}, batch", len(starts)):
        part = seeds[start : start + batch_size]
        drawn[start : start + len(part)] = _draw_batch(
            model, make_sampler(scheduler, sampler), part, sampler.eta, label
        )
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
    shape = (unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def trajectory(
    unet: Denoiser, sampler: Sampler, generators: Sequence[torch.Generator], eta: float = 0.0
) -> Iterator[torch.Tensor]:
    """Denoise a batch step by step: what the model sees before each step, then the images, float32 [N, C, H, W]."""
    images = (initial_noise(unet, generators) * sampler.init_noise_sigma).to(unet.device)
    accepted = inspect.signature(sampler.step).parameters
    options = {"generator": list(generators), "eta": eta}
    given = {name: value for name, value in options.items() if name in accepted}
    for timestep in sampler.timesteps:
        seen = sampler.scale_model_input(images, timestep)
        yield seen
        epsilon = unet(seen.to(unet.dtype), timestep).sample.float()
        (images, *_) = sampler.step(epsilon, timestep, images, **given, return_dict=False)
    yield images


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
) -> NDArray[np.uint8]:
    """Show images becoming: [N, frames, C, H, W] uint8 from noise to picture, closer together towards the end."""
    sampler = make_sampler(scheduler, params)
    model = _lay_out(cast_model(unet, precision))
    states = [to_pixels(state) for state in trajectory(model, sampler, _generators(seeds), params.eta)]
    chosen = ((1 - np.linspace(1, 0, num_frames) ** 2) * (len(states) - 1)).round().astype(int)
    return np.stack([states[index] for index in chosen], axis=1)


@torch.inference_mode()
def _draw_batch(unet: Denoiser, sampler: Sampler, seeds: Sequence[int], eta: float, label: str) -> NDArray[np.uint8]:
    *_, images = trajectory(unet, sampler, _generators(seeds), eta)
    broken = [seed for seed, image in zip(seeds, images, strict=True) if not image.isfinite().all()]
    if broken:
        found = f"{label} draws {len(broken)} of {len(seeds)} images with values that are not finite"
        raise InputError(f"{found} (first: seed {broken[0]}); use other weights or reference.precision float32")
    return to_pixels(images)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _noise_like(images: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.stack([torch.randn(images.shape[1:], generator=one) for one in generators]).to(images)
