"""Models that draw latents and are told classes: what their pictures come from."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from stages.importance.calibration import calibrate, calibration_batches
from stages.models.autoencoder import Codec, picture_shape, read_codec
from stages.models.params import SamplerParams
from stages.models.sampling import SamplingContext, draw, initial_noise, predictor
from stages.prune.compensate import NoisyBatches, difference
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.reference.reference import load_context
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import tensors_sha256

CPU = torch.device("cpu")
BLOCKS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@pytest.fixture
def vq():
    """An autoencoder of 16×16 pictures and 8×8 latents with a codebook."""
    torch.manual_seed(1)
    return VQModel(**BLOCKS, num_vq_embeddings=32, scaling_factor=0.5).eval()


@pytest.fixture
def context(vq):
    """Four classes and nothing, and guidance."""
    table = np.random.default_rng(0).normal(size=(5, 1, 12)).astype(np.float32)
    return SamplingContext(Codec(vq), table, 2.0)


def test_an_unconditional_latent_model_draws_as_diffusers_does(make_unet, scheduler, vq, monkeypatch):
    """The same pictures as LDMPipeline from the same noise, scale and codebook included, but for rounding."""
    unet = make_unet(in_channels=3, out_channels=3)
    sampler = SamplerParams(steps=4, clip=False)
    drawn = draw(unet, scheduler, [5], sampler, batch_size=1, label="", context=SamplingContext(Codec(vq)))
    theirs = LDMPipeline(vq, unet, DDIMScheduler(clip_sample=False))
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise(unet, [torch.Generator().manual_seed(5)])
    monkeypatch.setattr(f"{LDMPipeline.__module__}.randn_tensor", lambda *_, **__: noise)
    expected = theirs(num_inference_steps=4, output_type="np").images

    assert drawn.shape == (1, *picture_shape(unet, Codec(vq))) == (1, 3, 16, 16)
    np.testing.assert_allclose(drawn[0].transpose(1, 2, 0) / 255, expected[0], atol=1.5 / 255)


def test_guidance_goes_from_nothing_to_the_class_and_beyond(conditional, context):
    """By the formula, from two passes of the model itself."""
    noisy, moment, labels = torch.randn(2, 3, 8, 8), torch.tensor(10), [3, 1]
    table = torch.from_numpy(context.table)
    with torch.no_grad():
        told = conditional(noisy, moment, encoder_hidden_states=table[labels]).sample
        freely = conditional(noisy, moment, encoder_hidden_states=table[[4, 4]]).sample
        found = {
            scale: predictor(conditional, SamplingContext(None, context.table, scale), labels)(noisy, moment)
            for scale in (0.0, 1.0, 2.0)
        }

    torch.testing.assert_close(found[2.0], freely + 2 * (told - freely))
    torch.testing.assert_close(found[1.0], told)
    torch.testing.assert_close(found[0.0], freely)


def test_a_picture_hangs_on_its_seed_and_class_alone(conditional, context, scheduler):
    """Not on the batch that it is drawn in; another class is another picture."""

    def pictures(labels, batch_size):
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

    whole, single, other = pictures([0, 1, 2], 3), pictures([0, 1, 2], 1), pictures([0, 1, 3], 3)
    assert np.abs(whole.astype(int) - single).max() <= 1
    assert np.array_equal(whole[:2], other[:2])
    assert not np.array_equal(whole[2], other[2])


def test_every_class_is_drawn_equally_often(context):
    """In an order of each set's own, and never the row that says nothing."""
    labels = [context.labels(0, 10, index) for index in (0, 1)]

    assert sorted(labels[0][:8]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert labels[0] != labels[1]
    assert SamplingContext().labels(0, 10) == []


@pytest.mark.parametrize("kind", ["vqvae", "vae"])
def test_an_autoencoder_comes_back_as_it_was(tmp_path, vq, kind):
    """Of both classes: its latents are those of diffusers times their scale, its pictures those of diffusers."""
    if kind == "vae":
        torch.manual_seed(1)
        vq = AutoencoderKL(**BLOCKS, scaling_factor=0.5).eval()
    vq.save_pretrained(tmp_path / kind)
    codec = read_codec(tmp_path, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    with torch.no_grad():
        encoded = vq.encode(images)
        latents = encoded.latents if kind == "vqvae" else encoded.latent_dist.mean
        expected = vq.decode(latents).sample

    found = torch.from_numpy(codec.encode(pixels)).float()
    torch.testing.assert_close(found, latents * 0.5, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(codec.decode(latents * 0.5), expected)


def test_an_autoencoder_of_another_kind_is_refused(tmp_path, vq):
    """As is one whose weights are not its own; a folder without one has none."""
    assert read_codec(tmp_path, CPU) is None
    vq.save_pretrained(tmp_path / "vqvae")
    config = tmp_path / "vqvae" / "config.json"
    text = config.read_text()
    for old, new, words in (
        ("VQModel", "AutoencoderDC", "holds a AutoencoderDC; supported: AutoencoderKL, VQModel"),
        ('"num_vq_embeddings": 32', '"num_vq_embeddings": 16', "the weights do not fit the config"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=words):
            read_codec(tmp_path, CPU)


def test_latents_with_a_codebook_are_not_scaled_unless_their_config_says_so(tmp_path, vq):
    """Diffusers would divide them by .18215, which is Stable Diffusion's."""
    vq.save_pretrained(tmp_path / "vqvae")
    config = read_json(tmp_path / "vqvae" / "config.json")
    del config["scaling_factor"]
    write_json(tmp_path / "vqvae" / "config.json", config)

    assert read_codec(tmp_path, CPU).scale == 1.0


def test_a_conditional_model_is_calibrated_under_the_classes_of_its_images(conditional, scheduler, latents, params):
    """Each draw tells the model the rows of its own latents, and the importance hangs on them."""
    chosen = params.importance.model_copy(update={"stride": 500, "num_images": 4})
    draw_of = next(calibration_batches(conditional, latents, chosen, 0))
    told = draw_of.condition["encoder_hidden_states"]
    others = dataclasses.replace(latents.conditions, train=(latents.conditions.train + 1) % 4)
    found, other = (
        calibrate(conditional, scheduler, dataclasses.replace(latents, conditions=conditions), chosen, 0).saliency
        for conditions in (latents.conditions, others)
    )

    for image, row in zip(draw_of.images, told, strict=True):
        expected = latents.conditions.table[round(image.mean().item() + 1.5)]
        assert torch.equal(row, torch.from_numpy(expected))
    assert tensors_sha256(found) != tensors_sha256(other)


def test_a_conditional_model_is_compensated_under_them_too(conditional, scheduler, latents, magnitude_of):
    """And comes closer to the dense prediction by it."""
    easy = CompensateParams(num_images=8, num_timesteps=4, damping=0.1)
    wanted = PruneParams(target={"ratio": 0.3}, compensate=easy)
    plan = plan_pruning(conditional, magnitude_of(conditional), wanted)
    images = NoisyBatches(conditional, scheduler, latents, easy, 0)
    noisy, moments, told = next(iter(images))
    cut, mended = (prune_unet(conditional, plan, noise) for noise in (None, images))

    assert (noisy.shape, moments.shape, told.shape) == ((8, 3, 8, 8), (8,), (8, 2, 12))
    assert difference(conditional, mended, images) < difference(conditional, cut, images)


def test_what_a_model_needs_to_draw_must_fit_it(conditional, unet, latents, tmp_path):
    """Conditions for a conditional model, no guidance for another; without guidance none is applied."""
    assert load_context(conditional, tmp_path, latents.conditions, None).guidance is None
    assert load_context(conditional, tmp_path, latents.conditions, 3).guidance == 3
    with pytest.raises(InputError, match=r"takes conditions of width 12, .* has none"):
        load_context(conditional, tmp_path, None, None)
    table = latents.conditions.table.copy()
    table[-1] = 0
    mute = dataclasses.replace(latents.conditions, table=table)
    assert load_context(conditional, tmp_path, mute, 1).guidance == 1
    with pytest.raises(InputError, match="knows no empty condition; set it to null"):
        load_context(conditional, tmp_path, mute, 3)
    with pytest.raises(InputError, match=r"reference\.guidance is 2\.0, and .* takes no conditions; set it to null"):
        load_context(unet, tmp_path, None, 2.0)
