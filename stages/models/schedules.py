"""scheduler_config.json of any diffusers class with DDPM's noise schedule -> the values that this class means by it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.models.checks import is_number
from stages.models.families import config_defaults
from stages.runtime.errors import InputError, first_line

Config = Mapping[str, Any]

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Classes whose noise schedule is DDPM's. How they step does not matter: params.yaml chooses the sampler."""
MAX_TIMESTEPS = 100_000
ABSENT = {"clip_sample": False, "thresholding": False}
"""What a class does that has no such key: it neither clips nor thresholds."""


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (lambda value: _is_whole(value) and 0 < value <= MAX_TIMESTEPS, f"1 to {MAX_TIMESTEPS}"),
    "clip_sample": (_is_flag, "true or false"),
    "clip_sample_range": (lambda value: is_number(value) and value > 0, "a positive number"),
    "thresholding": (_is_flag, "true or false"),
    "dynamic_thresholding_ratio": (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "sample_max_value": (lambda value: is_number(value) and value >= 1, "a number of at least 1"),
    "set_alpha_to_one": (_is_flag, "true or false"),
    "steps_offset": (_is_whole, "an integer of at least 0"),
    "timestep_spacing": (lambda value: value in ("leading", "linspace", "trailing"), "leading, linspace or trailing"),
    "rescale_betas_zero_snr": (_is_flag, "true or false"),
    "variance_type": (
        lambda value: value in (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
        "fixed_small, fixed_small_log, fixed_large or learned_range",
    ),
    "timestep_type": (lambda value: value == "discrete", "discrete"),
    "use_flow_sigmas": (lambda value: value is False, "false (no flow matching)"),
    "predict_epsilon": (lambda value: value is True, "true, or prediction_type in its place"),
}
"""Key of a scheduler's config -> whether a value can be honoured, and what can."""


def make_schedule(config: Config, origin: Path) -> DDPMScheduler:
    """Build the noise schedule that a scheduler's config describes.

    A key that the config lacks has the default of the class that wrote it, which is not always DDPM's: PNDM, LMS and
    the other solvers never clip, and Heun has other betas.

    Raises:
        InputError: The class has another noise schedule, a value is not allowed or cannot be honoured, or the betas
            are not valid; the key is named.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise InputError(f"{origin} describes a {name}; supported: {', '.join(SCHEDULERS)}")
    complete = _complete(config)
    for key, (is_allowed, allowed) in ALLOWED.items():
        if key in complete and not is_allowed(complete[key]):
            raise InputError(
                f"{origin} is not a valid noise schedule: it has {key} {complete[key]!r}; supported: {allowed}"
            )
    _check_ends(complete, origin)
    _check_length(complete, origin)
    try:
        schedule: DDPMScheduler = DDPMScheduler.from_config(complete)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{origin} is not a valid noise schedule ({first_line(error)})") from None
    _check_betas(schedule, origin)
    return schedule


def _complete(config: Config) -> dict[str, Any]:
    """Fill the keys that DDPMScheduler knows with the defaults of the class that wrote the config."""
    own = config_defaults(getattr(diffusers, config["_class_name"]))
    defaults = {key: own.get(key, ABSENT.get(key, value)) for key, value in config_defaults(DDPMScheduler).items()}
    if betas := config.get("trained_betas"):
        defaults["num_train_timesteps"] = len(betas) if isinstance(betas, list) else None
    complete = {**{key: value for key, value in defaults.items() if value is not None}, **config}
    if "prediction_type" in config:  # which replaced predict_epsilon
        complete.pop("predict_epsilon", None)
    return complete


def _check_ends(config: Config, origin: Path) -> None:
    """Check that the first and the last beta are numbers, unless the betas are listed or those of a cosine.

    Raises:
        InputError: One of them is no number; its key is named.
    """
    if config.get("trained_betas") is not None or config["beta_schedule"] == "squaredcos_cap_v2":
        return
    for key in ("beta_start", "beta_end"):
        if not is_number(config[key]):
            found = f"it has {key} {config[key]!r}"
            raise InputError(f"{origin} is not a valid noise schedule: {found}; supported: a number between 0 and 1")


def _check_length(config: Config, origin: Path) -> None:
    """Check that there are as many trained betas as timesteps.

    Raises:
        InputError: The numbers differ, or trained_betas is not a list of numbers.
    """
    betas, num_timesteps = config.get("trained_betas"), config.get("num_train_timesteps")
    if betas is None:
        return
    if not isinstance(betas, list) or not betas or not all(is_number(beta) for beta in betas):
        raise InputError(f"{origin} is not a valid noise schedule: trained_betas is not a list of numbers; correct it")
    if len(betas) != num_timesteps:
        found = f"num_train_timesteps is {num_timesteps}, but trained_betas holds {len(betas)} numbers"
        raise InputError(f"{origin} is not a valid noise schedule: {found}; correct num_train_timesteps")


def _check_betas(schedule: DDPMScheduler, origin: Path) -> None:
    """Check that every timestep adds noise and, if the model predicts ε, leaves some of the image.

    Raises:
        InputError: A beta is not between 0 and 1, or ᾱ is 0 at the last timestep of a model that predicts ε.
    """
    inside = (schedule.betas > 0) & (schedule.betas <= 1)
    if not inside.all():
        step = int((~inside).nonzero()[0])
        found = f"the beta of timestep {step} is {float(schedule.betas[step]):g}"
        raise InputError(f"{origin} is not a valid noise schedule: {found}; supported: numbers between 0 and 1")
    if schedule.config["prediction_type"] == "epsilon" and not schedule.alphas_cumprod[-1] > 0:
        key = "rescale_betas_zero_snr" if schedule.config["rescale_betas_zero_snr"] else "trained_betas or beta_end"
        found = f"with {key}, nothing of the image is left at the last timestep, where ε says nothing about it"
        raise InputError(f"{origin} has prediction_type epsilon, and {found}; use the schedule of its training")
