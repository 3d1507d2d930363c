"""Noise schedule and sampler params -> one of diffusers' samplers, or DDIM on quadratically spaced timesteps."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.models.params import STEP_EVENLY, SamplerParams
from stages.models.prediction_types import PREDICTION_TYPES
from stages.runtime.errors import InputError, first_line

QUADRATIC_SHARE = 0.8
"""Share of the training timesteps that quadratic spacing covers, as in DDIM's published code."""
BLOCK = "reference.sampler"
"""The block of params.yaml that chooses the sampler of all measurements."""
DDPM_ONLY = ("laplace", "sigmoid")
"""Values of beta_schedule that only DDPMScheduler knows; other samplers get the betas themselves."""


LEARNED_RANGE = "learned_range"
"""The variance_type of a model that predicts where between β̃ and β its variance lies (Nichol and Dhariwal, 2021)."""
NOISY_VARIANCES = {
    LEARNED_RANGE: "a learned variance",
    "fixed_large": "the variance fixed_large",
    "fixed_large_log": "the variance fixed_large_log",
}
"""Variances by which DDPM's step to the clean image adds noise unless it begins at timestep 0 -> how to call them."""


class Sampler(Protocol):
    """The common interface of diffusers' samplers."""

    config: Mapping[str, Any]
    alphas_cumprod: torch.Tensor
    timesteps: torch.Tensor
    init_noise_sigma: float
    step: Callable[..., tuple[torch.Tensor, ...]]
    set_timesteps: Callable[[int], None]

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Scale noisy images to the range that the model was trained on."""
        ...


class QuadraticDdim(DDIMScheduler):
    """DDIM on quadratically spaced timesteps, denser towards low noise (Song et al., 2021, appendix D.2)."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = "cpu") -> None:
        """Set the timesteps to ⌊r²⌋ for evenly spaced r from √(0.8·T) down to 0; the last ones may be equal.

        As in the code of latent diffusion, `steps_offset` is added to each.
        """
        super().set_timesteps(num_inference_steps, device)
        roots = np.linspace(0, np.sqrt(QUADRATIC_SHARE * self.config["num_train_timesteps"]), num_inference_steps)
        self.timesteps = torch.from_numpy((roots**2).astype(np.int64)[::-1].copy()).to(device)
        self.timesteps += self.config["steps_offset"]
        self.next_timesteps = iter([*self.timesteps.tolist()[1:], -1])

    def step(  # type: ignore[override]  # returns a tuple, as all samplers are called here
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: Sequence[torch.Generator] | None = None,
        *,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """One DDIM step to the next timestep (Song et al., 2021, eq. 12, with the σ of eq. 16)."""
        del return_dict
        following = next(self.next_timesteps)
        alpha = self.alphas_cumprod[timestep]
        alpha_next = self.alphas_cumprod[following] if following >= 0 else self.final_alpha_cumprod
        scales = alpha.sqrt(), (1 - alpha).sqrt()
        predicted = PREDICTION_TYPES[self.config["prediction_type"]]
        clean, noise = (formula(model_output, sample, *scales) for formula in (predicted.clean, predicted.noise))
        if self.config["thresholding"]:
            clean = self._threshold_sample(clean)
        elif self.config["clip_sample"]:
            clean = clean.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).clamp(min=0).sqrt()
        result = alpha_next.sqrt() * clean + (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * noise
        if eta:
            result = result + sigma * _noise_like(sample, generator or ())
        return (result,)


def _noise_like(images: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.stack([torch.randn(images.shape[1:], generator=one) for one in generators]).to(images)


def make_sampler(scheduler: DDPMScheduler, params: SamplerParams, block: str = BLOCK) -> Sampler:
    """Build the sampler on the noise schedule of the model.

    Args:
        scheduler: The noise schedule, with the model's own rules of clipping and of the last step.
        params: The sampler; an explicit `clip` replaces the model's clipping and thresholding.
        block: The block of params.yaml that error messages name.

    Raises:
        InputError: The schedule does not allow this number of steps, or the sampler does not know this schedule.
    """
    _check_steps(scheduler, params, block)
    try:
        sampler = _build(scheduler, params)
        sampler.set_timesteps(params.steps)
    except Exception as error:  # noqa: BLE001  # samplers fail in many ways
        raise _misfit(params, block, first_line(error)) from None
    _check_noise(sampler, scheduler, params, block)
    return sampler


def _build(scheduler: DDPMScheduler, params: SamplerParams) -> Sampler:
    quadratic = params.spacing == "quadratic"
    cls = QuadraticDdim if quadratic else getattr(diffusers, f"{params.scheduler}Scheduler")
    changes: dict[str, object] = {} if quadratic else {"timestep_spacing": params.spacing}
    if params.clip is not None:  # a sampler that cannot clip would keep the key, and have another hash for it
        clipping = {"clip_sample": params.clip, "thresholding": False}
        taken = inspect.signature(cls.__init__).parameters
        changes |= {key: value for key, value in clipping.items() if key in taken}
    if cls is not DDPMScheduler and scheduler.config["beta_schedule"] in DDPM_ONLY:
        changes["trained_betas"] = scheduler.betas.tolist()
    if cls is not DDPMScheduler and scheduler.config["variance_type"] == LEARNED_RANGE:
        changes["variance_type"] = None  # DPMSolverMultistep would take three channels, whatever the model has
    # diffusers keeps a list of the keys that were left at their defaults, and ignores them when they are passed.
    known = {
        key: value for key, value in scheduler.config.items() if not key.startswith("_") and key != "timestep_spacing"
    }
    sampler: Sampler = cls.from_config({**known, **changes})
    return sampler


def takes_variance(sampler: Sampler) -> bool:
    """Whether a sampler takes the learned variance beside the prediction: DDPM with variance_type learned_range."""
    return sampler.config.get("variance_type") == LEARNED_RANGE


def _check_steps(scheduler: DDPMScheduler, params: SamplerParams, block: str) -> None:
    """Check the number of steps against the number of timesteps T.

    Raises:
        InputError: There are more steps than timesteps; or they do not divide T, and are leading; or the sampler goes
            from t to t − T // steps, where the next timestep is not.
    """
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    if params.spacing == "leading" and num_timesteps % params.steps:
        found = f"{block}.steps {params.steps} does not divide the {num_timesteps} timesteps of the model"
        other = " or another spacing" if block == BLOCK else ""
        raise InputError(f"{found}, so sampling would not begin at full noise; use a divisor{other}")
    if params.spacing == "trailing" and params.scheduler in STEP_EVENLY and num_timesteps % params.steps:
        found = f"{block}.steps {params.steps} does not divide the {num_timesteps} timesteps of the model"
        raise InputError(f"{found}, and {params.scheduler} would miss trailing ones; use a divisor")
    if params.spacing == "linspace" and params.scheduler in STEP_EVENLY:
        found = f"{block}: {params.scheduler} steps by T / steps and misses the timesteps of linspace"
        raise InputError(f"{found}; use leading or trailing")
    if params.steps > num_timesteps:
        found = f"{block}.steps {params.steps} is more than the model's {num_timesteps} timesteps"
        raise InputError(f"{found}; lower it")


def _check_noise(sampler: Sampler, scheduler: DDPMScheduler, params: SamplerParams, block: str) -> None:
    """Check that the sampler begins near full noise, ends without, and assumes the noise of the model's training.

    Raises:
        InputError: The first timestep is too early or beyond the last one, the sampler has another ᾱ, or its last step
            would add noise, which diffusers leaves out at timestep 0 alone.
    """
    num_timesteps, first = int(scheduler.config["num_train_timesteps"]), float(sampler.timesteps[0])
    begin = f"{block}: {params.steps} {params.spacing} steps of {params.scheduler} begin at {first:g}"
    if first < num_timesteps / 2:
        raise InputError(f"{begin} of {num_timesteps} timesteps, far below full noise; use more or trailing steps")
    if first > num_timesteps - 1:
        offset = f"with steps_offset {scheduler.config['steps_offset']} of the model's scheduler"
        raise InputError(f"{begin} {offset}, and its last timestep is {num_timesteps - 1}; use fewer steps")
    variance = NOISY_VARIANCES.get(sampler.config["variance_type"]) if isinstance(sampler, DDPMScheduler) else None
    if variance and (last := int(sampler.timesteps[-1])):
        found = f"{params.steps} {params.spacing} steps of {params.scheduler} end at timestep {last}"
        raise InputError(f"{block}: {found}, where {variance} adds noise to the images; use spacing linspace")
    known = scheduler.alphas_cumprod  # on the GPU once add_noise has moved it there
    if not torch.allclose(sampler.alphas_cumprod.to(known.device), known, rtol=1e-3, atol=1e-6):
        raise _misfit(params, block, "it assumes other noise levels, since it ignores rescale_betas_zero_snr")


def check_sampler(scheduler: DDPMScheduler, params: SamplerParams, block: str = BLOCK) -> None:
    """Run all steps without a model, since some samplers fail only in the middle with few or with many steps.

    Raises:
        InputError: The schedule does not allow this number of steps, a step fails, or its result is not finite.
    """
    sampler, state = make_sampler(scheduler, params, block), torch.zeros(1, 1, 2, 2)
    is_random = "generator" in inspect.signature(sampler.step).parameters
    options = {"generator": [torch.Generator().manual_seed(0)]} if is_random else {}
    output = torch.zeros(1, 2 if takes_variance(sampler) else 1, 2, 2)
    try:
        for timestep in sampler.timesteps:
            sampler.scale_model_input(state, timestep)
            state, *_ = sampler.step(output, timestep, state, **options, return_dict=False)
    except Exception as error:  # noqa: BLE001  # samplers fail in many ways
        raise _misfit(params, block, first_line(error)) from None
    if not state.isfinite().all():
        raise _misfit(params, block, "a step gives values that are not finite")


def _misfit(params: SamplerParams, block: str, reason: str) -> InputError:
    found = f"{params.steps} {params.spacing} steps of {params.scheduler} do not work with this model's schedule"
    change = "scheduler, spacing or steps" if block == BLOCK else "steps"
    return InputError(f"{block}: {found} ({reason}); change {change}")
