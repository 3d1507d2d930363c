"""The default name of a version, and the samples of a class-conditional latent version."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import mlflow
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, VQModel
from PIL import Image

from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import read_autoencoder
from stages.models.params import SamplerParams
from stages.models.pipeline import CPU, write_pipeline
from stages.models.sampling import SamplingContext, draw
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.register.canary import draw_expected
from stages.register.register import _default_name, register
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.storage.tensors import write_tensors
from tests.register.conftest import write


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"source": "bundled", "name": "digits"}, "espalier-digits"),
        ({"source": "hub", "repo": "google/ddpm-cifar10-32"}, "espalier-ddpm-cifar10-32"),
        ({"source": "folder", "path": "/models/mine/"}, "espalier-mine"),
        ({"source": "checkpoint", "system": "celeba-hq-64", "path": "$DATA/ckpt.pth"}, "espalier-celeba-hq-64"),
        ({"source": "registry", "uri": "models:/espalier-digits/3"}, "espalier-digits"),
        ({"source": "registry", "uri": "models:/faces/3"}, "espalier-faces"),
    ],
)
def test_the_default_name_is_that_of_the_base_model(source, name):
    """The last part of its repository, folder or registered name, after `espalier-`."""
    lineage = SimpleNamespace(runs={"fetch": {"params": {"fetch": {"model": source}}}})

    assert _default_name(lineage) == name


@pytest.mark.usefixtures("registry")
def test_no_model_has_the_name_of_a_ledger(monkeypatch):
    """Its versions would be read as promotions."""
    for name in ("read_workspace_lineage", "read_evaluation"):
        monkeypatch.setattr(f"stages.register.register.{name}", Mock())

    with pytest.raises(
        InputError, match=r"^mine\.promotions is the name of a ledger; give a name that does not end in"
    ):
        register(MagicMock(), Path("unsent"), "mine.promotions")


def test_a_class_conditional_latent_version_draws_the_images_of_draw(
    tmp_path, conditional, scheduler, magnitude_of, protocol
):
    """With guidance and decoded; the label is given or is the seed modulo the number of classes."""
    released, package = tmp_path / "released", tmp_path / "package"
    plan = plan_pruning(conditional, magnitude_of(conditional), PruneParams(target={"ratio": 0.25}))
    pruned, clear = cut(conditional, plan), protocol.sampler.model_copy(update={"clip": False})
    dense = tmp_path / "dense"
    write_pipeline(dense, conditional, scheduler)
    torch.manual_seed(0)
    network = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=32,
        scaling_factor=0.5,
    )
    network.save_pretrained(dense / "vqvae")
    write_json(dense / "class_embedding" / "config.json", {"num_classes": 4, "width": 12, "unconditional": 4})
    write_tensors(dense / "class_embedding" / "diffusion_pytorch_model.safetensors", {"weight": torch.randn(5, 12)})
    write_pipeline(released, pruned, scheduler, dense)
    guided = protocol.model_copy(update={"sampler": clear, "guidance": 2.0, "sets": 3})
    write(package, tmp_path, pruned, scheduler, guided, released)
    model = mlflow.pyfunc.load_model(str(package))
    default, given = model.predict({"seed": [5, 6]}), model.predict({"seed": [5, 6], "label": [3, 0]})
    context = SamplingContext(read_autoencoder(released, CPU), read_class_embedding(pruned, released), 2.0)

    for row, expected in zip(default, draw_expected(package, [5, 6]), strict=True):
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(row["png"]))), expected)
    for rows, labels in ((default, [1, 2]), (given, [3, 0])):
        ours = draw(pruned, scheduler, [5, 6], clear, batch_size=2, label="ours", context=context, labels=labels)
        theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in rows]
        assert np.abs(np.stack(theirs).transpose(0, 3, 1, 2).astype(int) - ours).max() <= 1
    with pytest.raises(ValueError, match="label 4 is out of range; give 0 to 3"):
        model.predict({"seed": [5], "label": [4]})


def test_requests_at_once_draw_what_each_draws_alone(tmp_path, unet, scheduler, protocol, monkeypatch):
    """A server answers each in a thread of its own; PNDM keeps earlier predictions between its steps."""
    package, sampler = tmp_path / "package", SamplerParams(scheduler="PNDM", steps=4)
    released = tmp_path / "released"
    write_pipeline(released, unet, scheduler)
    write(package, tmp_path, unet, scheduler, protocol.model_copy(update={"sampler": sampler, "sets": 3}), released)
    model = mlflow.pyfunc.load_model(str(package))
    seeds = [5, 6]
    alone = [model.predict({"seed": [seed]}) for seed in seeds]
    version = model.unwrap_python_model()
    barrier, predict = Barrier(len(seeds)), version._predict

    def predict_in_turn(*arguments):
        barrier.wait(60)
        return predict(*arguments)

    monkeypatch.setattr(version, "_predict", predict_in_turn)
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda seed: model.predict({"seed": [seed]}), seeds))

    assert together == alone


def test_a_version_with_labels_and_learned_variance_draws_the_images_of_draw(
    tmp_path, make_unet, scheduler, magnitude_of, protocol
):
    """By DDPM with the learned variance of the label, and guided towards it from the empty class."""
    dense, released, package = tmp_path / "dense", tmp_path / "released", tmp_path / "package"
    unet = make_unet(num_class_embeds=5, out_channels=2, resnet_time_scale_shift="scale_shift")
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25})))
    learned = DDPMScheduler.from_config({**scheduler.config, "variance_type": "learned_range"})
    write_pipeline(dense, unet, learned)
    write_json(dense / "class_embedding" / "config.json", {"num_classes": 4, "unconditional": 4})
    write_pipeline(released, pruned, learned, dense)
    ancestral = SamplerParams(scheduler="DDPM", steps=2)
    guided = protocol.model_copy(update={"sampler": ancestral, "guidance": 2.0, "sets": 3})
    write(package, tmp_path, pruned, learned, guided, released)
    model = mlflow.pyfunc.load_model(str(package))
    context = SamplingContext(None, read_class_embedding(pruned, released), 2.0)

    for rows, labels in (
        (model.predict({"seed": [5, 6]}), [1, 2]),
        (model.predict({"seed": [5, 6], "label": [3, 0]}), [3, 0]),
    ):
        ours = draw(pruned, learned, [5, 6], ancestral, batch_size=2, label="ours", context=context, labels=labels)
        theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in rows]
        assert np.abs(np.stack(theirs)[:, None].astype(int) - ours).max() <= 1
    for row, expected in zip(model.predict({"seed": [5, 6]}), draw_expected(package, [5, 6]), strict=True):
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(row["png"]))), expected)
