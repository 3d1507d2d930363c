"""Conversion of published checkpoints, and weights in pickles."""

import copy
import os
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, VQModel

from stages.fetch.class_embedding import read_class_embedding
from stages.fetch.convert import SYSTEMS, VQ_F4, SourceCheckpoint, convert_ddim, convert_ldm, tensor_shapes
from stages.fetch.model import fetch_model
from stages.fetch.names import ddim_name, ldm_name
from stages.fetch.params import CheckpointModel, FolderModel
from stages.fetch.pickles import BIN
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.samplers import make_sampler
from stages.models.sampling import SamplingContext, initial_noise, trajectory
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json, write_json
from stages.storage.tensors import read_tensors, tensors_sha256
from tests import originals

DDIM_WIDTHS, LDM_WIDTHS, VQ_WIDTHS = [8, 16, 24], [8, 16, 24], [8, 16, 16]
"""Neighbouring widths differ, so that a tensor taken from the wrong level does not fit; VQ_WIDTHS has both cases."""
CLASSES, CONTEXT = 5, 12


@pytest.fixture
def ddim_config():
    """A small config like those of the DDIM systems, with attention on the middle one of three levels."""
    return {
        **read_json(SYSTEMS / "cifar10.json"),
        "block_out_channels": DDIM_WIDTHS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "norm_num_groups": originals.GROUPS,
        "sample_size": 8,
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }


@pytest.fixture
def ldm_config():
    """A small config like ImageNet's LDM-4, with two heads and no attention on the first level."""
    return {
        **read_json(SYSTEMS / "imagenet-ldm.json"),
        "attention_head_dim": 2,
        "block_out_channels": LDM_WIDTHS,
        "cross_attention_dim": CONTEXT,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "norm_num_groups": originals.GROUPS,
        "sample_size": 8,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }


@pytest.fixture
def vq_config():
    """A small config like that of LDM-4's autoencoder."""
    return {
        **VQ_F4,
        "block_out_channels": VQ_WIDTHS,
        "norm_num_groups": originals.GROUPS,
        "num_vq_embeddings": 16,
        "sample_size": 32,
    }


def randomized(network, seed=0):
    """Add noise to every parameter, norms and biases included, and disable training."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=draws), alpha=0.1)
    return network.eval().requires_grad_(requires_grad=False)


@pytest.fixture
def ddim():
    """A UNet of the DDIM code."""
    return randomized(originals.DDIM(DDIM_WIDTHS, attended={1}))


class LatentDiffusion:
    """The three networks of a small LDM model, and the state dict that Lightning saves."""

    def __init__(self):
        self.unet = randomized(originals.LDM(LDM_WIDTHS, attended={1, 2}, context=CONTEXT, heads=2))
        self.vq = randomized(originals.VQ(VQ_WIDTHS, latent=3, codes=16))
        self.table = torch.randn(CLASSES + 1, CONTEXT)
        self.betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()

    def state(self):
        """The state dict of LatentDiffusion, unused tensors included."""
        return {
            "betas": self.betas,
            "alphas_cumprod": (1 - self.betas).cumprod(0),
            "posterior_mean_coef1": torch.zeros(1000),
            "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
            "log_one_minus_alphas_cumprod": torch.zeros(1000),
            "lvlb_weights": torch.zeros(1000),
            "scale_factor": torch.tensor(1.0),
            **{f"model.diffusion_model.{name}": tensor for name, tensor in self.unet.state_dict().items()},
            **{f"first_stage_model.{name}": tensor for name, tensor in self.vq.state_dict().items()},
            "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
            "cond_stage_model.embedding.weight": self.table,
        }

    def ema(self):
        """Randomize the UNet's weights and return them under the names of LitEma."""
        weights = randomized(self.unet, seed=1).state_dict()
        undotted = {f"diffusion_model.{name}".replace(".", ""): tensor.clone() for name, tensor in weights.items()}
        return {f"model_ema.{name}": tensor for name, tensor in undotted.items()} | {
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(7, dtype=torch.int),
        }


@pytest.fixture
def ldm():
    """A small LDM model."""
    torch.manual_seed(0)
    return LatentDiffusion()


@pytest.fixture
def converted(tmp_path, ddim_config, ldm_config, vq_config):
    """Save a checkpoint, convert it and return the diffusers folder."""

    def convert(content, layout="ddim", ema=None):
        path, folder = tmp_path / "model.ckpt", tmp_path / "converted"
        torch.save(content, path)
        if layout == "ddim":
            convert_ddim(path, ddim_config, folder, ema)
        else:
            convert_ldm(path, ldm_config, folder, ema, vq_config, CLASSES)
        return folder

    return convert


def relative_error(found, expected):
    """Largest absolute difference over the largest absolute value."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_ddim(folder, network):
    """Check that a converted UNet has the outputs of the original."""
    images, steps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 777])
    with torch.no_grad():
        error = relative_error(read_unet(folder)(images, steps).sample, network(images, steps))
    assert error < 1e-5


def check_ldm(folder, network):
    """Check that a converted conditional UNet has the outputs of the original."""
    draws = torch.Generator().manual_seed(2)
    latents, context = torch.randn(2, 3, 8, 8, generator=draws), torch.randn(2, 1, CONTEXT, generator=draws)
    steps = torch.tensor([3, 777])
    with torch.no_grad():
        error = relative_error(
            read_unet(folder)(latents, steps, encoder_hidden_states=context).sample, network(latents, steps, context)
        )
    assert error < 1e-5


def test_a_converted_ddim_unet_predicts_what_the_original_predicts(converted, ddim):
    """From a state dict, within 1e-5; the noise schedule is that of DDPM, and DDIM's own code never clips."""
    folder = converted(ddim.state_dict())

    check_ddim(folder, ddim)
    scheduler = read_scheduler(folder)
    assert torch.equal(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    assert not scheduler.config["clip_sample"]


def test_a_converted_ddim_model_draws_what_its_authors_draw(converted, ddim):
    """DDIM's rule: timesteps 0, c, 2c, …, no clipping, ᾱ = 1 at the end; `clip` is left to the model."""
    folder = converted(ddim.state_dict())
    unet, sampler = read_unet(folder), SamplerParams(steps=20)
    noise = initial_noise(unet, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    with torch.no_grad():
        expected = generalized_steps(ddim, noise, range(0, 1000, 50), alphas, 1.0)
        *_, found = trajectory(unet, make_sampler(read_scheduler(folder), sampler), [1, 2])
        *_, clipped = trajectory(unet, make_sampler(DDPMScheduler(), sampler), [1, 2])

    assert expected.abs().max() > 1  # so that clipping would be seen
    assert relative_error(found, expected) < 1e-4
    assert relative_error(clipped, expected) > 0.1


def generalized_steps(predict, images, timesteps, alphas, last):
    """DDIM steps (Song et al., 2021, eq. 12, σ = 0) in float64 from ᾱ of each timestep to that of the one before it."""
    images = images.double()
    before = [last, *(float(alphas[step]) for step in timesteps[:-1])]
    for timestep, following in reversed(list(zip(timesteps, before, strict=True))):
        alpha = float(alphas[timestep])
        epsilon = predict(images.float(), torch.full((len(images),), timestep)).double()
        clean = (images - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        images = following**0.5 * clean + (1 - following) ** 0.5 * epsilon
    return images.float()


def test_a_converted_ldm_model_draws_what_its_authors_draw(converted, ldm):
    """LDM's rule: timesteps 1, 1 + c, 1 + 2c, …, ᾱ_0 at the end, latents never clipped; within 1e-4 of the largest."""
    folder = converted({"state_dict": ldm.state()}, "ldm")
    unet, sampler, labels = read_unet(folder), SamplerParams(steps=20), [3, 1]
    context = SamplingContext(table=read_class_embedding(unet, folder))
    noise = initial_noise(unet, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alphas = (1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    with torch.no_grad():
        expected = generalized_steps(
            lambda latents, steps: ldm.unet(latents, steps, ldm.table[labels][:, None]),
            noise,
            range(1, 1001, 50),
            alphas,
            float(alphas[0]),
        )

    def error(scheduler):
        """Compare latents drawn under a scheduler with the expected ones."""
        with torch.no_grad():
            *_, found = trajectory(unet, make_sampler(scheduler, sampler), [1, 2], context=context, labels=labels)
        return relative_error(found, expected)

    scheduler = read_scheduler(folder)
    plain = DDPMScheduler.from_config({**scheduler.config, "steps_offset": 0, "set_alpha_to_one": True})
    assert expected.abs().max() > 1
    assert error(scheduler) < 1e-4
    assert error(plain) > 1e-2
    assert error(DDPMScheduler.from_config({**scheduler.config, "clip_sample": True})) > 0.1


@pytest.mark.parametrize("legacy", [False, True])
def test_the_ema_of_a_ddim_training_is_converted(tmp_path, ddim_config, ddim, legacy):
    """DDIM saves a list, with DataParallel's prefix in the model's names; both torch.save formats are read."""
    other = randomized(originals.DDIM(DDIM_WIDTHS, attended={1}), seed=5)
    model = OrderedDict((f"module.{name}", tensor) for name, tensor in other.state_dict().items())
    states = [model, {"state": {0: {"step": 3}}, "param_groups": [{"lr": 2e-4}]}, 12, 3400, ddim.state_dict()]
    torch.save(states, tmp_path / "with.pth", _use_new_zipfile_serialization=not legacy)
    torch.save(states[:4], tmp_path / "without.pth")
    convert_ddim(tmp_path / "with.pth", ddim_config, tmp_path / "averaged")
    convert_ddim(tmp_path / "with.pth", ddim_config, tmp_path / "chosen", ema=False)
    convert_ddim(tmp_path / "without.pth", ddim_config, tmp_path / "raw")

    check_ddim(tmp_path / "averaged", ddim)
    check_ddim(tmp_path / "chosen", other)
    check_ddim(tmp_path / "raw", other)
    refused(lambda: convert_ddim(tmp_path / "without.pth", ddim_config, tmp_path / "out", ema=True), "no EMA weights")


def test_a_latent_diffusion_model_is_converted_with_all_parts(converted, ldm):
    """UNet, autoencoder and class embedding equal the original's; diffusers opens the pipeline."""
    folder = converted({"state_dict": ldm.state(), "global_step": 7, "callbacks": {}}, "ldm")
    vqvae = VQModel.from_pretrained(folder / "vqvae")
    images, latents = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)

    check_ldm(folder, ldm.unet)
    with torch.no_grad():
        assert relative_error(vqvae.encode(images).latents, ldm.vq.encode(images)) < 1e-5
        assert relative_error(vqvae.decode(latents).sample, ldm.vq.decode(latents)) < 1e-5
    assert vqvae.config["scaling_factor"] == 1.0
    embedding = folder / CLASS_EMBEDDING
    assert read_json(embedding / "config.json") == {"num_classes": CLASSES, "width": CONTEXT, "unconditional": CLASSES}
    assert torch.equal(read_tensors(embedding / WEIGHTS)["weight"], ldm.table)
    scheduler = read_scheduler(folder)
    torch.testing.assert_close(scheduler.betas, ldm.betas)
    assert not scheduler.config["clip_sample"]
    assert set(DiffusionPipeline.from_pretrained(folder).components) == {"unet", "scheduler", "vqvae"}


@pytest.mark.parametrize("ema", [None, False, True])
def test_the_ema_of_latent_diffusion_is_converted_on_demand(converted, ldm, capsys, ema):
    """The authors' config has use_ema false, so the default takes the weights; LitEma's names have no dots."""
    state = {name: tensor.clone() for name, tensor in ldm.state().items()}
    before = copy.deepcopy(ldm.unet)
    folder = converted({"state_dict": {**state, **ldm.ema()}}, "ldm", ema)  # `ldm.ema` sets the weights to the EMA's
    count = len(before.state_dict())

    check_ldm(folder, ldm.unet if ema else before)
    taken, other = ("EMA weights", "weights") if ema else ("weights", "EMA weights")
    assert capsys.readouterr().out == (
        f"model.ckpt: {count} tensors of its {taken} are taken, not its {other} (fetch.model.ema)\n"
    )


def test_weights_that_the_checkpoint_lacks_are_refused(converted, ldm):
    """A checkpoint of one set gives it by default; the other cannot be chosen."""
    state = {name: tensor.clone() for name, tensor in ldm.state().items()}
    refused(lambda: converted({"state_dict": state}, "ldm", ema=True), "no EMA weights; set fetch.model.ema to false")
    only = {name: tensor for name, tensor in state.items() if not name.startswith("model.")} | ldm.ema()

    check_ldm(converted({"state_dict": only}, "ldm"), ldm.unet)
    refused(
        lambda: converted({"state_dict": only}, "ldm", ema=False), "no weights; set fetch.model.ema to true or null"
    )


@pytest.mark.parametrize("system", ["cifar10", "celeba-hq-64", "lsun-256", "imagenet-ldm"])
def test_every_system_has_the_names_and_shapes_of_the_original(system):
    """At full size, on the meta device: every tensor of both networks is matched."""
    config = read_json(SYSTEMS / f"{system}.json")
    attended = {level for level, kind in enumerate(config["down_block_types"]) if "Attn" in kind}
    with torch.device("meta"):
        if system == "imagenet-ldm":
            network = originals.LDM(config["block_out_channels"], attended, context=512, heads=1)
        else:
            network = originals.DDIM(config["block_out_channels"], attended)
    rename = ldm_name if system == "imagenet-ldm" else ddim_name
    checkpoint = SourceCheckpoint(network.state_dict(), SYSTEMS)
    checkpoint.take(tensor_shapes(config), lambda name: rename(name, config))
    checkpoint.check_empty()


def test_the_autoencoder_has_the_names_and_shapes_of_the_original():
    """LDM-4's autoencoder, at full size."""
    with torch.device("meta"):
        network = originals.VQ([128, 256, 512], latent=3, codes=8192)
    checkpoint = SourceCheckpoint(network.state_dict(), SYSTEMS)
    checkpoint.take(tensor_shapes(VQ_F4), lambda name: ddim_name(name, VQ_F4))
    checkpoint.check_empty()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("down.1.attn.0.q.weight", lambda _: None, "down.1.attn.0.q.weight is missing"),
        ("up.0.block.2.conv1.weight", lambda tensor: tensor[:, :3], r"up.0.block.2.conv1.weight has shape \[8, 3, 3"),
        ("up.3.block.0.conv1.bias", lambda _: torch.zeros(8), "an unexpected tensor up.3.block.0.conv1.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(converted, ddim, name, change, message):
    """The message names the first tensor that is missing, unexpected or has another shape."""
    state = ddim.state_dict()
    changed = {**state, name: change(state.get(name))}
    refused(lambda: converted({key: tensor for key, tensor in changed.items() if tensor is not None}), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cond_stage_model.embedding.weight": torch.zeros(9, CONTEXT)}, r"embedding.weight has shape \[9, 12\]"),
        (
            {"cond_stage_model.transformer.weight": torch.zeros(2)},
            "an unexpected tensor cond_stage_model.transformer.weight",
        ),
        (
            {"model_ema.diffusion_modelout2bias": torch.zeros(3)},
            "model_ema.diffusion_modelinput_blocks00weight is missing",
        ),
        ({"scale_factor": torch.tensor(0.18215)}, "scale_factor differs from that of the system"),
        ({"betas": torch.linspace(0.0015, 0.0195, 1000)}, "betas differs from that of the system"),
    ],
)
def test_another_latent_diffusion_model_is_refused(converted, ldm, changes, message):
    """Each part is checked, and so are the values of the noise schedule."""
    ema = any(name.startswith("model_ema") for name in changes) or None
    refused(lambda: converted({"state_dict": {**ldm.state(), **changes}}, "ldm", ema), message)


def refused(call, message):
    """Check that a call is refused with a one-line message."""
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in caught.value.message


class Code:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def source(path, layout="ddim", system="cifar10", **options):
    """The params of a checkpoint source."""
    return CheckpointModel(source="checkpoint", layout=layout, path=path, system=system, **options)


def test_code_in_a_checkpoint_is_not_run(tmp_path, ddim):
    """The message names the function, wherever in the file it is."""
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    for content in ({**ddim.state_dict(), "more": Code(trace)}, {"state_dict": {}, "callbacks": {"hook": Code(trace)}}):
        torch.save(content, path)
        refused(lambda: fetch_model(source(path), tmp_path / "out"), "holds posix.system, which might run code")
    assert not trace.exists()


def test_a_lightning_callback_is_read_without_lightning(tmp_path, monkeypatch, ldm, ldm_config, vq_config):
    """Many model.ckpt files have the class ModelCheckpoint as a key; Lightning need not be installed."""
    path, module = tmp_path / "model.ckpt", "pytorch_lightning.callbacks.model_checkpoint"
    named = type("ModelCheckpoint", (), {"__module__": module})
    with monkeypatch.context() as installed:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
            installed.setitem(sys.modules, name, SimpleNamespace(ModelCheckpoint=named))
        torch.save({"state_dict": ldm.state(), "callbacks": {named: {"best": 1.0}}}, path)
    convert_ldm(path, ldm_config, tmp_path / "converted", None, vq_config, CLASSES)

    check_ldm(tmp_path / "converted", ldm.unet)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_checkpoint_is_refused(tmp_path, ddim, share):
    """In both formats of torch.save."""
    for legacy in (False, True):
        torch.save(ddim.state_dict(), tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
        whole = (tmp_path / "whole").read_bytes()
        (tmp_path / "part").write_bytes(whole[: int(share * len(whole))])
        refused(lambda: fetch_model(source(tmp_path / "part"), tmp_path / "out"), "is not a complete torch.save file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "EOFError"), (b"no pickle", "Unsupported operand 110"), (b"\xad" * 500, "Unsupported operand 173")],
)
def test_a_damaged_checkpoint_is_refused_with_a_reason(tmp_path, content, reason):
    """PyTorch puts the reason on a line of its own, or raises an exception without a message."""
    (tmp_path / "random").write_bytes(content)
    message = rf"random is not a complete torch.save file \({reason}\); fetch it again"
    refused(lambda: fetch_model(source(tmp_path / "random"), tmp_path / "out"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is a list of 2; DDIM's training saves model, optimizer"),
        (7, "holds a int, expected a state dict"),
        ({}, "holds an empty dict, expected a state dict"),
        ({"a": 7}, "holds a int under 'a'; supported: dense tensors only"),
        pytest.param(
            {"a": torch.zeros(2, 2).to_sparse()},
            "holds a Tensor under 'a'",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
    ],
)
def test_a_file_that_is_not_a_state_dict_is_refused(tmp_path, content, message):
    """The message says what the file holds instead."""
    torch.save(content, tmp_path / "odd.ckpt")
    refused(lambda: fetch_model(source(tmp_path / "odd.ckpt"), tmp_path / "out"), message)


def test_a_wrong_checkpoint_source_is_refused_with_the_key_to_correct(tmp_path, monkeypatch, ddim):
    """A variable that is not set, a missing file, another hash, another system, another layout."""
    path = tmp_path / "model.ckpt"
    torch.save(ddim.state_dict(), path)
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))

    def fetch(*arguments, **options):
        return lambda: fetch_model(source(*arguments, **options), tmp_path / "out")

    refused(fetch("$NOWHERE/model.ckpt"), r"fetch\.model\.path is \$NOWHERE/model\.ckpt and \$NOWHERE is not set")
    refused(fetch("$SOMEWHERE/other.ckpt"), f"{tmp_path}/other.ckpt does not exist")
    refused(fetch("$SOMEWHERE/model.ckpt", sha256="0" * 64), f"has sha256 {file_sha256(path)}, expected 000")
    refused(
        fetch(path),
        r"model\.ckpt does not hold the system that it should: .*; correct fetch\.model\.path, \.layout or \.system",
    )
    refused(fetch(path, "ldm"), "cifar10 has no layout ldm; systems with it: imagenet-ldm")


def test_a_converted_model_is_fetched(tmp_path, monkeypatch, ddim_config, ddim, content):
    """By the name of its system; no temporary file is left."""
    monkeypatch.setattr("stages.fetch.convert.SYSTEMS", tmp_path / "systems")
    write_json(tmp_path / "systems" / "lsun-256.json", ddim_config)
    (tmp_path / "place").mkdir()
    torch.save(ddim.state_dict(), tmp_path / "model.ckpt")
    options = {"system": "lsun-256", "sha256": file_sha256(tmp_path / "model.ckpt")}
    fetch_model(source(tmp_path / "model.ckpt", **options), tmp_path / "place" / "out")

    check_ddim(tmp_path / "place" / "out", ddim)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]
    assert set(content(tmp_path / "place" / "out")) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    }


@pytest.fixture
def pickled(model_folder):
    """Replace the safetensors of a component by a .bin and return its path."""

    def write(name="unet", rename=str):
        folder = model_folder / name
        tensors = read_tensors(folder / WEIGHTS)
        torch.save({rename(key): tensor for key, tensor in tensors.items()}, folder / BIN)
        (folder / WEIGHTS).unlink()
        return folder / BIN

    return write


def test_a_bin_is_read_if_there_are_no_safetensors(tmp_path, model_folder, unet, pickled, content):
    """sha256 is that of the .bin; the output has safetensors only, and the model card."""
    path = pickled(rename=lambda name: name.replace(".to_q.", ".query."))
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    fetched = fetch_model(FolderModel(source="folder", path=model_folder, sha256=file_sha256(path)), out)

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert tensors_sha256(read_unet(out).state_dict()) == tensors_sha256(unet.state_dict())
    assert "README.md" in content(out)
    assert not [name for name in content(out) if name.endswith(".bin")]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_bin_beside_safetensors_is_not_opened(tmp_path, model_folder, unet):
    """Code in it is not run, and the weights are those of the safetensors."""
    torch.save({"code": Code(tmp_path / "trace")}, model_folder / "unet" / BIN)
    fetched = fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert not (tmp_path / "trace").exists()


def test_a_bin_with_more_than_tensors_is_refused(tmp_path, model_folder, unet, pickled):
    """The message names the file in the given folder, not a temporary one."""
    path = pickled()
    fetch = lambda: fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")  # noqa: E731
    torch.save({**unet.state_dict(), "code": Code(tmp_path / "trace")}, path)
    refused(fetch, f"{path} holds posix.system, which might run code")
    torch.save({**unet.state_dict(), "step": 7}, path)
    refused(fetch, f"{path} holds a int under 'step'")
    torch.save({}, path)
    refused(fetch, f"{path} holds an empty dict")
    path.write_bytes(b"no pickle")
    refused(fetch, f"{path} is not a complete torch.save file")
    torch.save({"conv_in.weight": torch.zeros(1)}, path)
    refused(fetch, f"{model_folder}/unet: the weights do not fit the config")
    assert not (tmp_path / "trace").exists()
