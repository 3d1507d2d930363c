"""Noise schedules: what the config of each diffusers class means, and what is refused."""

import inspect
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from stages.finetune.loss import Objective
from stages.finetune.params import LossParams
from stages.models.params import SamplerParams, SchedulerName
from stages.models.pipeline import read_scheduler, write_pipeline
from stages.models.samplers import QuadraticDdim, check_sampler, make_sampler
from stages.models.sampling import draw
from stages.models.schedules import SCHEDULERS
from stages.protocol.resolve import resolve_sampler
from stages.runtime.errors import InputError
from stages.storage.files import write_json

CLASSES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and not name.startswith(("Flax", "DPMSolverSDE", "CosineDPM", "KarrasVe"))
)
"""All but those that need another package or are deprecated."""
BETAS = np.linspace(1e-4, 0.03, 500).tolist()
HONOURED = [
    {},
    {"clip_sample": True},
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 2.0},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"thresholding": True, "clip_sample": False},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": True},
    {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True},
    {"num_train_timesteps": 500},
    {"num_train_timesteps": 4000, "beta_end": 0.005},
    {"trained_betas": BETAS},
    {"trained_betas": BETAS, "num_train_timesteps": 500},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"timestep_spacing": "trailing"},
    {"variance_type": "fixed_large"},
]
REFUSED = [
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr, nothing of the image is left"),
    ({"trained_betas": [0.5, 1.0]}, "trained_betas or beta_end, nothing of the image is left"),
    ({"trained_betas": BETAS, "num_train_timesteps": 1000}, "num_train_timesteps is 1000, but trained_betas holds 500"),
    ({"trained_betas": [0.1, -0.1]}, "the beta of timestep 1 is -0.1"),
    ({"trained_betas": "many"}, "trained_betas is not a list of numbers"),
    ({"beta_start": 0.0}, "the beta of timestep 0 is 0"),
    ({"beta_start": None}, "beta_start None"),
    ({"beta_end": "large", "beta_schedule": "sigmoid"}, "beta_end 'large'"),
    ({"beta_schedule": "quartic"}, "quartic is not implemented"),
    ({"num_train_timesteps": 1000.5}, "num_train_timesteps 1000.5"),
    ({"clip_sample": "false"}, "clip_sample 'false'; supported: true or false"),
    ({"clip_sample_range": 0}, "clip_sample_range 0"),
    ({"thresholding": 1}, "thresholding 1"),
    ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio 1.5"),
    ({"sample_max_value": 0.5}, "sample_max_value 0.5"),
    ({"steps_offset": -1}, "steps_offset -1"),
    ({"set_alpha_to_one": "no"}, "set_alpha_to_one 'no'"),
    ({"timestep_spacing": "cubic"}, "timestep_spacing 'cubic'"),
    ({"variance_type": "learned"}, "variance_type 'learned'"),
    ({"timestep_type": "continuous"}, "timestep_type 'continuous'"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
    ({"predict_epsilon": False}, "predict_epsilon False"),
    ({"prediction_type": "flow_prediction"}, "prediction_type flow_prediction"),
]


def read(folder, config):
    """Read a scheduler's config as a model folder holds it."""
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    return read_scheduler(folder)


def by_diffusers(name, config):
    """Arguments of the same schedule, from an instance of the class that wrote the config; others never clip.

    How the last step ends belongs to the sampler: `from_config` takes set_alpha_to_one over only if it was given.
    """
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    given = {"num_train_timesteps": len(config.get("trained_betas", range(1000))), **config}
    own = {
        key: value
        for key, value in cls(num_train_timesteps=10).config.items()
        if key[0] != "_" and key != "set_alpha_to_one"
    }
    clips = {} if "clip_sample" in accepted else {"clip_sample": False}
    return {**clips, **own, **given, "timestep_spacing": "leading"}


def build(cls, config):
    """Build one of diffusers' samplers from the keys that it knows."""
    accepted = inspect.signature(cls.__init__).parameters
    sampler = cls(**{key: value for key, value in config.items() if key in accepted and value is not None})
    sampler.set_timesteps(20)
    return sampler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_means_what_diffusers_means_by_it(tmp_path, name):
    """ᾱ, timesteps, and steps of DDIM, DDPM and our own DDIM equal those of diffusers for every class and key."""
    noisy, epsilon = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for config in HONOURED:
        scheduler, expected = read(tmp_path, {"_class_name": name, **config}), by_diffusers(name, config)
        ddpm = build(DDPMScheduler, expected)
        if expected.get("beta_schedule") == "sigmoid":
            expected["trained_betas"] = ddpm.betas.tolist()
        ddim = build(DDIMScheduler, expected)
        ours = {kind: make_sampler(scheduler, SamplerParams(scheduler=kind, steps=20)) for kind in ("DDIM", "DDPM")}
        own = build(QuadraticDdim, ours["DDIM"].config)
        own.next_timesteps = iter(int(step) for _ in range(2) for step in (ddim.timesteps[1], -1))

        assert torch.equal(scheduler.alphas_cumprod, ddpm.alphas_cumprod), config
        for kind, theirs in (("DDIM", ddim), ("DDPM", ddpm)):
            assert torch.equal(ours[kind].timesteps, theirs.timesteps), config
            for timestep in theirs.timesteps[[0, -1]]:
                found, *_ = ours[kind].step(
                    epsilon, timestep, noisy, generator=torch.Generator().manual_seed(1), return_dict=False
                )
                wanted, *_ = theirs.step(
                    epsilon, timestep, noisy, generator=torch.Generator().manual_seed(1), return_dict=False
                )
                torch.testing.assert_close(found, wanted, msg=str(config))
                if kind == "DDIM":
                    (found,) = own.step(epsilon, timestep, noisy)
                    torch.testing.assert_close(found, wanted, msg=str(config))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_cannot_be_honoured_is_refused_by_its_key(tmp_path, name):
    """In one line, for every class."""
    for change, message in REFUSED:
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path, {"_class_name": name, **change})
        assert "\n" not in caught.value.message


def test_classes_with_another_noise_schedule_are_refused_by_name(tmp_path):
    """Flow matching, EDM, distilled and discrete models, also under their own defaults."""
    others = [name for name in CLASSES if name not in SCHEDULERS]

    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler", "UnCLIPScheduler"} <= set(others)
    for name in others:
        with pytest.raises(InputError, match=f"describes a {name}; supported: DDIMScheduler, DDPMScheduler") as caught:
            read(tmp_path, {"_class_name": name})
        assert "\n" not in caught.value.message


def test_a_released_schedule_draws_what_the_original_draws(tmp_path, unet):
    """A PNDM config without clip_sample does not clip after it was read and written; nothing else changes."""
    config = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "steps_offset": 1}
    scheduler = read(tmp_path / "source", {"_class_name": "PNDMScheduler", **config, "skip_prk_steps": True})
    write_pipeline(tmp_path / "released", unet, scheduler)

    assert make_sampler(scheduler, SamplerParams(steps=50)).config["clip_sample"] is False
    for cls, change in ((DDIMScheduler, {"clip_sample": False}), (PNDMScheduler, {})):
        after = cls.from_pretrained(tmp_path / "released", subfolder="scheduler")
        before = cls.from_config({**PNDMScheduler(**config, skip_prk_steps=True).config, **change})
        keys = inspect.signature(cls.__init__).parameters.keys() & before.config.keys()
        assert {key: after.config[key] for key in keys} == {key: before.config[key] for key in keys}


@pytest.mark.parametrize("rule", [{"clip_sample": True, "clip_sample_range": 2.0}, {"thresholding": True}])
def test_quadratic_spacing_follows_the_models_rule_of_clipping(rule):
    """The next image is that of the rule, worked out by hand from a clean image of 51.5."""
    scheduler, images = DDPMScheduler(**rule), torch.full((1, 1, 2, 2), 1.0)
    sampler = make_sampler(scheduler, SamplerParams(scheduler="DDIM", spacing="quadratic", steps=2))
    now, then = sampler.timesteps.tolist()
    (found,) = sampler.step(-images, sampler.timesteps[0], images)
    alpha, following = scheduler.alphas_cumprod[now], scheduler.alphas_cumprod[then]
    clean = (1 + (1 - alpha).sqrt()) / alpha.sqrt()
    allowed = 2.0 if "clip_sample" in rule else 1.0  # the threshold of equal pixels is their value, at most 1

    assert clean > 50
    torch.testing.assert_close(found.max(), following.sqrt() * allowed - (1 - following).sqrt())


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_a_protocol_thresholds_as_the_model_does(name):
    """The sampler of the resolved protocol is the one whose settings were hashed."""
    scheduler = DDPMScheduler(thresholding=True, clip_sample=False)
    sampler = SamplerParams(scheduler=name, steps=10)
    resolved = resolve_sampler(scheduler, sampler)
    config = {key: value for key, value in make_sampler(scheduler, sampler).config.items() if not key.startswith("_")}
    again = make_sampler(scheduler, resolved["sampler"]).config

    assert {key: again[key] for key in config} == config
    assert resolve_sampler(scheduler, resolved["sampler"]) == resolved


def test_an_explicit_clip_replaces_thresholding():
    """Null keeps it; true and false are what params.yaml says."""
    scheduler = DDPMScheduler(thresholding=True, clip_sample=False)
    chosen = {clip: make_sampler(scheduler, SamplerParams(steps=4, clip=clip)).config for clip in (None, True, False)}

    assert {clip: (found["thresholding"], found["clip_sample"]) for clip, found in chosen.items()} == {
        None: (True, False),
        True: (False, True),
        False: (False, False),
    }


@pytest.mark.parametrize("count", [100, 4000])
def test_the_number_of_trained_betas_is_the_number_of_timesteps(tmp_path, count):
    """Drawing begins at the last of them, with next to nothing of the image left."""
    betas = np.linspace(1e-4, 20 / count, count).tolist()
    scheduler = read(tmp_path, {"_class_name": "DDPMScheduler", "trained_betas": betas})
    sampler = make_sampler(scheduler, SamplerParams(spacing="trailing", steps=10))

    assert scheduler.config["num_train_timesteps"] == len(scheduler.alphas_cumprod) == count
    assert int(sampler.timesteps[0]) == count - 1
    assert scheduler.alphas_cumprod[int(sampler.timesteps[0])] < 1e-4


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_no_image_at_the_last_timestep_is_refused_for_epsilon(tmp_path, name):
    """Min-SNR weights of all schedules that are accepted are finite."""
    with pytest.raises(InputError, match="prediction_type epsilon, and with rescale_betas_zero_snr"):
        read(tmp_path, {"_class_name": name, "rescale_betas_zero_snr": True})
    accepted = [read(tmp_path, {"_class_name": name, "beta_schedule": it}) for it in ("linear", "squaredcos_cap_v2")]
    assert all(Objective(each, LossParams(min_snr=5.0)).by_timestep.isfinite().all() for each in accepted)


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete"])
def test_schedules_that_only_ddpm_knows_are_drawn_by_every_sampler(unet, schedule, kind):
    """The other samplers get the betas themselves."""
    scheduler = DDPMScheduler(beta_schedule=schedule)
    sampler = make_sampler(scheduler, SamplerParams(scheduler=kind, steps=20))

    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    drawn = draw(unet, scheduler, [1], SamplerParams(scheduler=kind, steps=10), batch_size=1, label="")
    assert drawn.std() > 1


def test_a_sampler_with_other_noise_levels_is_refused():
    """LMS has no rescale_betas_zero_snr, so it would draw from another schedule than that of the training."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    make_sampler(scheduler, SamplerParams(spacing="trailing", steps=10))

    with pytest.raises(InputError, match=r"LMSDiscrete .* ignores rescale_betas_zero_snr"):
        make_sampler(scheduler, SamplerParams(scheduler="LMSDiscrete", spacing="trailing", steps=10))


def test_noise_levels_that_differ_by_a_few_percent_are_refused():
    """A sampler has those of the config, which may be others than those of the training."""
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod *= 0.95

    with pytest.raises(InputError, match="assumes other noise levels"):
        make_sampler(scheduler, SamplerParams(steps=10))


def test_a_step_to_values_that_are_not_finite_is_refused():
    """DDIM divides by √(1 − ᾱ), which float32 rounds to zero here."""
    with pytest.raises(InputError, match="a step gives values that are not finite"):
        check_sampler(DDPMScheduler(beta_start=1e-8, beta_end=1e-8), SamplerParams(steps=4))


def test_more_than_a_thousand_steps_can_be_drawn():
    """As many as the model has timesteps."""
    scheduler = DDPMScheduler(num_train_timesteps=4000, beta_end=0.005)
    check_sampler(scheduler, SamplerParams(steps=2000))

    assert len(make_sampler(scheduler, SamplerParams(steps=4000)).timesteps) == 4000
    with pytest.raises(InputError, match="steps 8000 does not divide the 4000 timesteps"):
        make_sampler(scheduler, SamplerParams(steps=8000))


def test_an_offset_beyond_the_last_timestep_is_refused():
    """With steps_offset 1 and as many steps as timesteps, drawing would begin at timestep T."""
    with pytest.raises(InputError, match=r"begin at 1000 with steps_offset 1 .* last timestep is 999; use fewer steps"):
        make_sampler(DDPMScheduler(steps_offset=1), SamplerParams(steps=1000))


def test_a_first_timestep_below_the_middle_is_refused():
    """One leading step begins at the offset."""
    assert make_sampler(DDPMScheduler(steps_offset=500), SamplerParams(steps=1)).timesteps.tolist() == [500]
    with pytest.raises(InputError, match="begin at 499 of 1000 timesteps, far below full noise"):
        make_sampler(DDPMScheduler(steps_offset=499), SamplerParams(steps=1))


def test_quadratic_spacing_has_the_models_offset_and_last_step():
    """Each timestep is one later, and the last step ends at ᾱ_0: LDM's own code adds 1 to both spacings."""
    scheduler = DDPMScheduler.from_config({"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False})
    sampler = make_sampler(scheduler, SamplerParams(spacing="quadratic", steps=5))
    assert sampler.timesteps.tolist() == [801, 451, 201, 51, 1]

    images = torch.ones(1, 1, 2, 2)
    for timestep in sampler.timesteps:
        (last,) = sampler.step(torch.zeros_like(images), timestep, images)
    alphas = scheduler.alphas_cumprod
    torch.testing.assert_close(last, (alphas[0] / alphas[1]).sqrt().expand_as(last))
