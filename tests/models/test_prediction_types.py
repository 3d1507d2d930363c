"""Models that predict ε, v or x₀: one denoiser gives the same samples, losses and weights in every form."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from pydantic import ValidationError
from torch import nn

from stages.finetune.loss import Objective, Prediction
from stages.finetune.params import LossParams
from stages.models.params import STEP_EVENLY, SamplerParams, SchedulerName
from stages.models.pipeline import read_scheduler, write_pipeline
from stages.models.prediction_types import PREDICTION_TYPES, min_snr_weights, training_target
from stages.models.samplers import check_sampler, make_sampler
from stages.models.sampling import SamplingContext, draw, predictor
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json

TIMESTEPS = torch.tensor([0, 1, 250, 600, 999])
DRAWS = torch.Generator().manual_seed(0)
CLEAN, NOISE = torch.randn(2, 5, 1, 8, 8, generator=DRAWS)
UNIMPLEMENTED = {("EulerAncestralDiscrete", "sample"), ("PNDM", "sample")}
"""Pairs that diffusers does not implement."""
ZERO_SNR = {"DDIM", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "UniPCMultistep"}
"""Samplers that know rescale_betas_zero_snr."""


def schedule(kind, **changes):
    """The noise schedule of a model of one type."""
    return DDPMScheduler(prediction_type=kind, **changes)


def scales(timesteps, scheduler=None):
    """α and σ, [B, 1, 1, 1] each."""
    signal = (scheduler or schedule("epsilon")).alphas_cumprod[timesteps.long()].view(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()


class Denoiser(UNet2DModel):
    """One denoiser in the form of any type: its network predicts v, from which the others follow."""

    def __init__(self, unet, scheduler):
        nn.Module.__init__(self)
        self.unet, self.scheduler, self._internal_dict = unet, scheduler, unet.config

    def forward(self, noisy, timestep):
        """Predict what the scheduler's prediction_type says, with x₀ = α·x − σ·v and ε = σ·x + α·v."""
        alpha, sigma = scales(timestep, self.scheduler)
        velocity = self.unet(noisy, timestep).sample
        outputs = {
            "epsilon": sigma * noisy + alpha * velocity,
            "v_prediction": velocity,
            "sample": alpha * noisy - sigma * velocity,
        }
        return SimpleNamespace(sample=outputs[self.scheduler.config["prediction_type"]])


@pytest.fixture
def drawn(unet):
    """Draw four images from the denoiser in the form of one type."""

    def run(sampler, kind, **changes):
        scheduler = schedule(kind, **changes)
        return draw(Denoiser(unet, scheduler), scheduler, range(4), sampler, batch_size=4, label="").astype(int)

    return run


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_perfect_output_gives_the_clean_image_and_the_noise_back(kind):
    """At every noise level, within the rounding that the division by α or σ enlarges."""
    formulas, (alpha, sigma) = PREDICTION_TYPES[kind], scales(TIMESTEPS)
    noisy = alpha * CLEAN + sigma * NOISE
    output = formulas.target(CLEAN, NOISE, alpha, sigma)

    torch.testing.assert_close(formulas.clean(output, noisy, alpha, sigma), CLEAN, atol=2e-4, rtol=0)
    torch.testing.assert_close(formulas.noise(output, noisy, alpha, sigma), NOISE, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_error_of_the_output_is_that_of_the_clean_image_times_a_ratio(kind):
    """‖δ output‖² = ratio(SNR) · ‖δ x₀‖² for any output and noise level, in float64."""
    formulas, (alpha, sigma) = PREDICTION_TYPES[kind], (scale.double() for scale in scales(TIMESTEPS))
    output, other, noisy = torch.randn(3, 5, 1, 8, 8, generator=DRAWS, dtype=torch.float64)
    cleans = [formulas.clean(value, noisy, alpha, sigma) for value in (output, other)]
    ratio = (output - other).square().sum((1, 2, 3)) / (cleans[0] - cleans[1]).square().sum((1, 2, 3))

    torch.testing.assert_close(ratio, formulas.error_ratio((alpha / sigma).square()).flatten(), rtol=1e-6, atol=0)


def test_the_target_of_v_is_that_of_diffusers():
    """`get_velocity` is the reference; for the others it is the noise and the clean image themselves."""
    targets = {kind: training_target(schedule(kind), CLEAN, NOISE, TIMESTEPS) for kind in PREDICTION_TYPES}

    torch.testing.assert_close(targets["v_prediction"], schedule("epsilon").get_velocity(CLEAN, NOISE, TIMESTEPS))
    assert torch.equal(targets["epsilon"], NOISE)
    assert torch.equal(targets["sample"], CLEAN)


def test_min_snr_weights_by_type():
    """min(SNR, γ) over SNR, SNR + 1 and 1; v at SNR 0 has weight 0, not NaN."""
    signal = schedule("epsilon").alphas_cumprod
    snr = signal / (1 - signal)
    capped = torch.minimum(snr, torch.tensor(5.0))
    found = {kind: min_snr_weights(schedule(kind), 5) for kind in PREDICTION_TYPES}

    torch.testing.assert_close(found["epsilon"], capped / snr)
    torch.testing.assert_close(found["v_prediction"], capped / (snr + 1))
    torch.testing.assert_close(found["sample"], capped)
    for kind in ("v_prediction", "sample"):
        assert min_snr_weights(schedule(kind, rescale_betas_zero_snr=True), 5)[-1] == 0


def test_min_snr_is_refused_where_a_schedule_ends_without_image():
    """The timestep where sampling begins would have no weight."""
    ends = schedule("v_prediction", rescale_betas_zero_snr=True)
    Objective(ends, LossParams())

    with pytest.raises(InputError, match=r"^finetune\.loss\.min_snr is 5, and the model's schedule ends without any"):
        Objective(ends, LossParams(min_snr=5))


@pytest.mark.parametrize("weights", [{"noise": 1.0}, {"noise": 0.0, "output": 1.0}, {"noise": 0.5, "output": 2.0}])
def test_the_weighted_loss_of_a_denoiser_does_not_depend_on_its_type(unet, make_unet, weights):
    """With γ, student and teacher have the same loss in all forms: min(SNR, γ) times the error of x₀."""
    losses = {}
    for kind in PREDICTION_TYPES:
        scheduler = schedule(kind)
        noisy = scheduler.add_noise(CLEAN, NOISE, TIMESTEPS)
        with torch.no_grad():
            outputs = [Denoiser(model, scheduler)(noisy, TIMESTEPS).sample for model in (unet, make_unet(seed=1))]
        prediction = Prediction(training_target(scheduler, CLEAN, NOISE, TIMESTEPS), *outputs)
        losses[kind] = Objective(scheduler, LossParams(**weights, min_snr=5))(prediction, TIMESTEPS)

    for kind in PREDICTION_TYPES:
        torch.testing.assert_close(losses[kind], losses["v_prediction"], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("scheduler_name", get_args(SchedulerName))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "quadratic"])
def test_samples_of_a_denoiser_do_not_depend_on_its_type(drawn, scheduler_name, spacing):
    """One level of 255 apart at most, for every sampler but PNDM and every spacing, with the noise of steps."""
    is_missed = scheduler_name in STEP_EVENLY and spacing == "linspace"
    if (spacing == "quadratic") > (scheduler_name == "DDIM") or is_missed:
        with pytest.raises((ValidationError, InputError), match=f"linspace|has neither eta nor spacing {spacing}"):
            make_sampler(schedule("epsilon"), SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4))
        return
    eta = 0.5 if scheduler_name == "DDIM" else 0.0
    sampler = SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4, eta=eta)
    expected = drawn(sampler, "v_prediction")

    assert expected.std() > 1
    for kind in ("epsilon", "sample"):
        if (scheduler_name, kind) in UNIMPLEMENTED:
            with pytest.raises(InputError, match=f"of {scheduler_name} do not work .*prediction_type"):
                check_sampler(schedule(kind), sampler)
        else:
            same = np.abs(drawn(sampler, kind) - expected).max() <= 1
            assert same or scheduler_name == "PNDM"  # it combines the outputs of several noise levels, as they are


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("scheduler_name", "spacing"),
    [("DDIM", "leading"), ("DDIM", "trailing"), ("DDPM", "leading"), ("DDPM", "linspace"), ("DDPM", "trailing")],
)
def test_a_released_model_draws_the_same_with_diffusers(unet, tmp_path, kind, scheduler_name, spacing):
    """Its folder holds the prediction type: the pipelines of diffusers give the same pixels up to one level."""
    write_pipeline(tmp_path / "model", unet, schedule(kind))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model", low_cpu_mem_usage=False)
    cls = DDIMScheduler if scheduler_name == "DDIM" else DDPMScheduler
    pipeline.scheduler = cls.from_config({**pipeline.scheduler.config, "timestep_spacing": spacing})
    if scheduler_name == "DDIM":
        pipeline = DDIMPipeline(pipeline.unet, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    (expected,) = pipeline(2, generators, num_inference_steps=4, output_type="np", return_dict=False)
    sampler = SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4)
    found = draw(unet, read_scheduler(tmp_path / "model"), [1, 2], sampler, batch_size=2, label="")

    assert np.abs(found.transpose(0, 2, 3, 1) - (expected * 255).round()).max() <= 1


@pytest.mark.parametrize("scheduler_name", get_args(SchedulerName))
def test_a_schedule_that_ends_at_snr_0_is_drawn_or_refused(drawn, scheduler_name):
    """From timestep 999, v and x₀ of one denoiser give the same samples; a sampler that cannot rescale is named."""
    sampler = SamplerParams(scheduler=scheduler_name, spacing="trailing", steps=4)
    rescaled = schedule("v_prediction", rescale_betas_zero_snr=True)
    if scheduler_name not in ZERO_SNR:
        with pytest.raises(InputError, match=f"{scheduler_name} do not work with .* .it assumes other noise levels"):
            make_sampler(rescaled, sampler)
        return
    found = drawn(sampler, "v_prediction", rescale_betas_zero_snr=True)

    assert rescaled.alphas_cumprod[-1] == 0
    assert make_sampler(rescaled, sampler).alphas_cumprod[-1] <= 2**-24
    assert make_sampler(rescaled, sampler).timesteps[0] == 999
    assert found.std() > 1
    if (scheduler_name, "sample") not in UNIMPLEMENTED:
        assert np.abs(found - drawn(sampler, "sample", rescale_betas_zero_snr=True)).max() <= 1


def test_guidance_of_a_denoiser_does_not_depend_on_its_type(conditional):
    """ε, v and x₀ extrapolated alike describe one guided denoiser."""
    table = np.random.default_rng(0).normal(size=(3, 1, 12)).astype(np.float32)
    noisy, timestep = torch.randn(2, 3, 8, 8, generator=DRAWS), torch.tensor(600)
    alpha, sigma = scales(timestep)
    with torch.no_grad():
        velocity, noise = (
            predictor(model, SamplingContext(None, table, 3.0), [0, 1])(noisy, timestep)
            for model in (conditional, _AsNoise(conditional))
        )

    torch.testing.assert_close(noise, sigma * noisy + alpha * velocity, rtol=1e-4, atol=1e-5)


class _AsNoise(nn.Module):
    """A conditional model of v in the form that predicts ε."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

    def forward(self, noisy, timestep, encoder_hidden_states):
        """ε = σ·x + α·v."""
        alpha, sigma = scales(timestep)
        velocity = self.unet(noisy, timestep, encoder_hidden_states=encoder_hidden_states).sample
        return SimpleNamespace(sample=sigma * noisy + alpha * velocity)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_type_is_read_and_written(model_folder, unet, tmp_path, kind):
    """From a scheduler's config to that of the next stage."""
    path = model_folder / "scheduler/scheduler_config.json"
    write_json(path, {**read_json(path), "prediction_type": kind})
    write_pipeline(tmp_path / "next", unet, read_scheduler(model_folder))

    assert read_json(tmp_path / "next/scheduler/scheduler_config.json")["prediction_type"] == kind
