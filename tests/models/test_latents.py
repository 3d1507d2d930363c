"""Latent and class-conditional models: autoencoder, conditions and guidance."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from stages.importance.calibration import calibrate, calibration_batches
from stages.models.autoencoder import Autoencoder, image_shape, read_autoencoder
from stages.models.layout import WEIGHTS
from stages.models.params import SamplerParams
from stages.models.pipeline import write_pipeline
from stages.models.sampling import SamplingContext, draw, initial_noise, predictor
from stages.prune.compensate import NoisyBatches, difference
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.reference.reference import load_context
from stages.register.draw import Draw
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import tensors_sha256, write_tensors
from tests.conftest import AUTOENCODER

CPU = torch.device("cpu")


@pytest.fixture
def vq():
    """An autoencoder with a codebook: 16×16 images, 8×8 latents."""
    torch.manual_seed(1)
    return VQModel(**AUTOENCODER, num_vq_embeddings=32, scaling_factor=0.5).eval()


@pytest.fixture
def context(vq):
    """Autoencoder, four classes with the empty condition, and guidance scale 2."""
    table = np.random.default_rng(0).normal(size=(5, 1, 12)).astype(np.float32)
    return SamplingContext(Autoencoder(vq), table, 2.0)


@pytest.mark.parametrize(("size", "shape"), [(8, (3, 16, 16)), ((6, 8), (3, 12, 16)), ((10, 6), (3, 20, 12))], ids=str)
def test_latent_sampling_matches_diffusers(make_unet, scheduler, vq, monkeypatch, size, shape):
    """From the same noise the images equal LDMPipeline's up to rounding, with scaling factor and codebook."""
    unet = make_unet(in_channels=3, out_channels=3, sample_size=size)
    sampler = SamplerParams(steps=4, clip=False)
    drawn = draw(unet, scheduler, [5], sampler, batch_size=1, label="", context=SamplingContext(Autoencoder(vq)))
    pipeline = LDMPipeline(vq, unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(unet, [torch.Generator().manual_seed(5)])
    monkeypatch.setattr(f"{LDMPipeline.__module__}.randn_tensor", lambda *_, **__: noise)
    expected = pipeline(num_inference_steps=4, output_type="np").images

    assert drawn.shape == (1, *image_shape(unet, Autoencoder(vq))) == (1, *shape)
    np.testing.assert_allclose(drawn[0].transpose(1, 2, 0) / 255, expected[0], atol=1.5 / 255)


def test_guidance_extrapolates_from_the_unconditional_prediction(conditional, context):
    """The guided prediction equals ε(∅) + s · (ε(c) − ε(∅)), from two separate passes of the model."""
    noisy, timestep, labels = torch.randn(2, 3, 8, 8), torch.tensor(10), [3, 1]
    table = torch.from_numpy(context.table)
    with torch.no_grad():
        with_class = conditional(noisy, timestep, encoder_hidden_states=table[labels]).sample
        without_class = conditional(noisy, timestep, encoder_hidden_states=table[[4, 4]]).sample
        found = {
            scale: predictor(conditional, SamplingContext(None, context.table, scale), labels)(noisy, timestep)
            for scale in (0.0, 1.0, 2.0)
        }

    torch.testing.assert_close(found[2.0], without_class + 2 * (with_class - without_class))
    torch.testing.assert_close(found[1.0], with_class)
    torch.testing.assert_close(found[0.0], without_class)


def test_an_image_depends_only_on_its_seed_and_class(conditional, context, scheduler):
    """The batch size does not change an image; another class does."""

    def draw_images(labels, batch_size):
        sampler = SamplerParams(steps=2, clip=False)
        seeds = range(len(labels))
        return draw(
            conditional,
            scheduler,
            seeds,
            sampler,
            batch_size=batch_size,
            label="",
            context=context,
            labels=labels,
        )

    whole, single, other = draw_images([0, 1, 2], 3), draw_images([0, 1, 2], 1), draw_images([0, 1, 3], 3)
    assert np.abs(whole.astype(int) - single).max() <= 1
    assert np.array_equal(whole[:2], other[:2])
    assert not np.array_equal(whole[2], other[2])


def test_every_class_is_drawn_equally_often(context):
    """Classes are shuffled for each set, and the empty condition is never drawn."""
    labels = [context.labels(0, 10, index) for index in (0, 1)]

    assert sorted(labels[0][:8]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert labels[0] != labels[1]
    assert SamplingContext().labels(0, 10) == []


@pytest.mark.parametrize("kind", ["vqvae", "vae"])
def test_a_loaded_autoencoder_computes_what_diffusers_does(tmp_path, vq, kind):
    """Latents are those of diffusers times the scaling factor, images are those of diffusers, for both classes."""
    if kind == "vae":
        torch.manual_seed(1)
        vq = AutoencoderKL(**AUTOENCODER, scaling_factor=0.5).eval()
    vq.save_pretrained(tmp_path / kind)
    autoencoder = read_autoencoder(tmp_path, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    with torch.no_grad():
        encoded = vq.encode(images)
        latents = encoded.latents if kind == "vqvae" else encoded.latent_dist.mean
        expected = vq.decode(latents).sample

    found = torch.from_numpy(autoencoder.encode(pixels)).float()
    torch.testing.assert_close(found, latents * 0.5, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(autoencoder.decode(latents * 0.5), expected)


LATENT_SCALES = {
    "Stable Diffusion 3": ({"shift_factor": 0.5, "scaling_factor": 1.5}, lambda z: (z - 0.5) * 1.5),
    "SDXL": (
        {"latents_mean": [0.5, -0.4, 0.3], "latents_std": [2.0, 1.5, 0.8], "scaling_factor": 0.5},
        lambda z: (
            (z - torch.tensor([0.5, -0.4, 0.3]).view(1, 3, 1, 1)) * 0.5 / torch.tensor([2.0, 1.5, 0.8]).view(1, 3, 1, 1)
        ),
    ),
}
"""Keys of an autoencoder's config, and how the pipelines of diffusers make the model's latents of its own."""


def test_latents_beyond_float16_are_refused(tmp_path):
    """They would be packed as infinite."""
    AutoencoderKL(**AUTOENCODER, scaling_factor=900_000).save_pretrained(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)

    with pytest.raises(InputError, match=r"a latent of the images is -?[\d.e+]+, beyond the range of float16; correct"):
        read_autoencoder(tmp_path, CPU).encode(pixels)


@pytest.mark.parametrize("kind", LATENT_SCALES)
def test_shift_mean_and_std_of_latents_are_those_of_diffusers(tmp_path, make_unet, scheduler, kind):
    """Encoded, decoded again to the same image, drawn by a version, and copied with the released model."""
    config, expected = LATENT_SCALES[kind]
    torch.manual_seed(1)
    network = AutoencoderKL(**AUTOENCODER, **config).eval()
    network.save_pretrained(tmp_path / "vae")
    autoencoder = read_autoencoder(tmp_path, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    with torch.no_grad():
        encoded = network.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist.mode()
        decoded = network.decode(encoded).sample

    found = torch.from_numpy(autoencoder.encode(pixels)).float()
    torch.testing.assert_close(found, expected(encoded), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(autoencoder.decode(expected(encoded)), decoded, rtol=1e-4, atol=1e-4)

    write_pipeline(tmp_path / "released", make_unet(in_channels=3, out_channels=3), scheduler, tmp_path)
    version = Draw()
    version.pipeline = DiffusionPipeline.from_pretrained(tmp_path / "released")
    version.settings = {"latent_scale": autoencoder.scale}
    with torch.no_grad():
        torch.testing.assert_close(version._decode(expected(encoded)), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vae", {"scaling_factor": 0}, "scaling_factor 0; supported: a positive number"),
        ("vae", {"scaling_factor": None}, "scaling_factor None; supported: a positive number"),
        ("vae", {"shift_factor": "0.1"}, "shift_factor '0.1'; supported: a number"),
        ("vae", {"latents_mean": [0, 0, 0]}, "latents_mean and no latents_std; supported: both or neither"),
        ("vae", {"latents_std": [1, 1, 1]}, "latents_std and no latents_mean; supported: both or neither"),
        ("vae", {"latents_mean": [0], "latents_std": [1, 1, 1]}, r"latents_mean \[0\]; supported: a list of 3 numbers"),
        (
            "vae",
            {"latents_mean": [0, 0, 0], "latents_std": [1, 0, 1]},
            r"latents_std \[1, 0, 1\]; .* 3 positive numbers",
        ),
        (
            "vae",
            {"latents_mean": [0] * 3, "latents_std": [1] * 3, "shift_factor": 0.1},
            "shift_factor and latents_mean",
        ),
        ("vqvae", {"shift_factor": 0.1}, "shift_factor, which VQModel does not have; supported: scaling_factor alone"),
        ("vqvae", {"latents_mean": [0] * 3, "latents_std": [1] * 3}, "latents_mean, which VQModel does not have"),
        ("vqvae", {"out_channels": 1}, "in_channels 3 and out_channels 1; supported: equal numbers"),
    ],
)
def test_a_scale_of_latents_that_cannot_be_honoured_is_refused(tmp_path, vq, kind, change, message):
    """In one line with the key, before the weights are read."""
    network = vq if kind == "vqvae" else AutoencoderKL(**AUTOENCODER)
    network.save_pretrained(tmp_path / kind)
    write_json(tmp_path / kind / "config.json", {**read_json(tmp_path / kind / "config.json"), **change})

    with pytest.raises(InputError, match=message) as caught:
        read_autoencoder(tmp_path, CPU)
    assert "\n" not in caught.value.message


def test_an_unsupported_or_damaged_autoencoder_is_refused(tmp_path, vq):
    """Another class and weights of another shape are refused; a folder without an autoencoder gives None."""
    assert read_autoencoder(tmp_path, CPU) is None
    vq.save_pretrained(tmp_path / "vqvae")
    config = tmp_path / "vqvae" / "config.json"
    text = config.read_text()
    for old, new, message in (
        ("VQModel", "AutoencoderDC", "holds a AutoencoderDC; supported: AutoencoderKL, VQModel"),
        ('"num_vq_embeddings": 32', '"num_vq_embeddings": 16', "the weights do not fit the config"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            read_autoencoder(tmp_path, CPU)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "module.", "_orig_mod.", "model.vae."])
@pytest.mark.parametrize("kind", ["vqvae", "vae"])
def test_a_prefix_of_an_autoencoders_weights_is_named(tmp_path, vq, kind, prefix):
    """In one short line, where PyTorch lists all names of both sides."""
    network = vq if kind == "vqvae" else AutoencoderKL(**AUTOENCODER)
    network.save_pretrained(tmp_path / kind)
    weights = tmp_path / kind / WEIGHTS
    write_tensors(weights, {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()})

    with pytest.raises(InputError) as caught:
        read_autoencoder(tmp_path, CPU)
    assert caught.value.message.startswith(f"{tmp_path / kind}: the weights do not fit the config (")
    assert caught.value.message.endswith(f"; remove the prefix {prefix} from every name")
    assert len(caught.value.message) < 300


def test_weights_of_another_autoencoder_are_named(tmp_path, vq):
    """By the first missing and the first unexpected name, or by the shape that differs."""
    network = AutoencoderKL(**AUTOENCODER)
    network.save_pretrained(tmp_path / "vae")
    for tensors, message in (
        (vq.state_dict(), "1 unexpected, first quantize.embedding.weight"),
        ({**network.state_dict(), "encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, "size mismatch for encoder.conv"),
    ):
        write_tensors(tmp_path / "vae" / WEIGHTS, tensors)
        with pytest.raises(InputError, match=message) as caught:
            read_autoencoder(tmp_path, CPU)
        assert "\n" not in caught.value.message


def test_a_vq_model_without_a_scaling_factor_is_not_scaled(tmp_path, vq):
    """The default of diffusers, 0.18215, belongs to Stable Diffusion."""
    vq.save_pretrained(tmp_path / "vqvae")
    config = read_json(tmp_path / "vqvae" / "config.json")
    del config["scaling_factor"]
    write_json(tmp_path / "vqvae" / "config.json", config)

    assert read_autoencoder(tmp_path, CPU).scale == 1.0


def test_calibration_uses_the_conditions_of_its_images(conditional, scheduler, latents, params):
    """Each draw holds the table rows of its own latents, and other rows give another importance."""
    chosen = params.importance.model_copy(update={"stride": 500, "num_images": 4})
    draw_of = next(calibration_batches(conditional, latents, chosen, 0))
    conditions = draw_of.condition["encoder_hidden_states"]
    others = dataclasses.replace(latents.conditions, train=(latents.conditions.train + 1) % 4)
    found, other = (
        calibrate(conditional, scheduler, dataclasses.replace(latents, conditions=used), chosen, 0).saliency
        for used in (latents.conditions, others)
    )

    for image, row in zip(draw_of.images, conditions, strict=True):
        expected = latents.conditions.table[round(image.mean().item() + 1.5)]
        assert torch.equal(row, torch.from_numpy(expected))
    assert tensors_sha256(found) != tensors_sha256(other)


def test_compensation_uses_the_conditions_of_its_images(conditional, scheduler, latents, magnitude_of):
    """The compensated model is closer to the dense prediction than the model that is only cut."""
    settings = CompensateParams(num_images=8, num_timesteps=4, damping=0.1)
    params = PruneParams(target={"ratio": 0.3}, compensate=settings)
    plan = plan_pruning(conditional, magnitude_of(conditional), params)
    images = NoisyBatches(conditional, scheduler, latents, settings, 0)
    noisy, timesteps, conditions = next(iter(images))
    cut, compensated = (prune_unet(conditional, plan, noise) for noise in (None, images))

    assert (noisy.shape, timesteps.shape, conditions.shape) == ((8, 3, 8, 8), (8,), (8, 2, 12))
    assert difference(conditional, compensated, images) < difference(conditional, cut, images)


def test_a_sampling_context_must_fit_the_model(conditional, unet, latents, tmp_path):
    """A conditional model needs conditions of its width; guidance needs conditions with an empty one."""
    assert load_context(conditional, tmp_path, latents.conditions, None).guidance is None
    assert load_context(conditional, tmp_path, latents.conditions, 3).guidance == 3
    with pytest.raises(InputError, match=r"takes conditions of width 12, .* has none"):
        load_context(conditional, tmp_path, None, None)
    table = latents.conditions.table.copy()
    table[-1] = 0
    without_empty = dataclasses.replace(latents.conditions, table=table)
    assert load_context(conditional, tmp_path, without_empty, 1).guidance == 1
    with pytest.raises(InputError, match="has no empty condition; set it to null"):
        load_context(conditional, tmp_path, without_empty, 3)
    with pytest.raises(InputError, match=r"reference\.guidance is 2\.0, and .* takes no conditions; set it to null"):
        load_context(unet, tmp_path, None, 2.0)
