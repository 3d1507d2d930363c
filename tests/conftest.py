"""Small models, images and params shared by many tests."""

import gc
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from filelock import FileLock

from stages.data.images import Conditions, Images
from stages.importance.measure import measure_importance
from stages.models.families import family_of
from stages.models.pipeline import write_pipeline
from stages.params import Params, load_params
from stages.protocol.protocol import Protocol

ROOT = Path(__file__).parents[1]
pytest_plugins = ["tests.workers", "tests.swift", "tests.servers", "tests.orchestra"]

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
}
TINY_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "num_embeds_ada_norm": 2,
}
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
"""A small autoencoder of two blocks."""


def pytest_addoption(parser):
    """Accept the timeout of pyproject.toml also where the plugin that sets it is absent."""
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds for a test; nothing ends it without pytest-timeout")


def pytest_configure():
    """Let Ctrl-C's signal reach what the tests start, also where a shell started pytest in the background.

    Programs inherit that it is ignored; Prefect's worker, which ends itself by it on SIGTERM, would live on. No DVC of
    the tests reports its use.
    """
    os.environ["DVC_NO_ANALYTICS"] = "1"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path, config):
    """With -m gpu import only files that have such tests: the others need packages that a GPU machine may lack."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any("pytest.mark.gpu" in file.read_text() for file in files if file.suffix == ".py") or None


def pytest_runtest_setup(item):
    """Skip the tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")


def pytest_collection():
    """Import the tests without collecting garbage."""
    gc.disable()


def pytest_collection_finish():
    """Leave what is imported by now, a million objects, out of every later garbage collection, and collect seldom.

    Each collection frees next to nothing: most of what a test makes goes without one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure():
    """Let the interpreter free everything at its end; nanobind reports what it cannot."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Make a file or folder once for all workers, which only read it; returns its path."""
    base = tmp_path_factory.getbasetemp()
    parent = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    parent.mkdir(exist_ok=True)

    def make_one(name, make):
        done = parent / f"{name}.done"
        with FileLock(f"{done}.lock"):
            if not done.exists():
                make(parent / name)
                done.touch()
        return parent / name

    return make_one


@pytest.fixture
def mlflow_database(make_once, tmp_path, monkeypatch):
    """An MLflow database of the test's own without any run, which the environment names; returns its address.

    MLflow takes two seconds to create one, so each test has a copy.
    """
    from mlflow import MlflowClient

    empty = make_once("mlflow.db", lambda path: MlflowClient(f"sqlite:///{path}").search_experiments())
    shutil.copyfile(empty, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(autouse=True)
def _without_mlflows_stand_in():
    """Remove the module that MLflow puts in place of Databricks' own while it loads a model, and sometimes leaves.

    It answers for any attribute, also for `__file__`, which hypothesis reads of every module.
    """
    if not isinstance(sys.modules.get("dbutils", os), ModuleType):
        del sys.modules["dbutils"]


@pytest.fixture(autouse=True, scope="module")
def _without_prefects_connection():
    """Close the connection on which flows of this process send events.

    Its thread asks every twenty seconds whether the server is alive, with a number of Python's global `random`, which
    hypothesis refuses to see change while it draws.
    """
    yield
    if "prefect.events.worker" in sys.modules:
        sys.modules["prefect.events.worker"].EventsWorker.drain_all(timeout=10)


@pytest.fixture(autouse=True)
def _without_the_default_database(monkeypatch):
    """Forget the database that a command of an earlier test chose, since no variable named one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def _accelerate_starts_anew():
    """Let each test choose the precision of trainings, which accelerate sets once per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def make_unet():
    """Build a UNet with seeded weights; keywords change its config."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return UNet2DModel(**{**TINY, **changes}).eval()

    return make


@pytest.fixture
def unet(make_unet) -> UNet2DModel:
    """A UNet that computes in milliseconds."""
    return make_unet()


@pytest.fixture
def conditional() -> UNet2DConditionModel:
    """A small latent-diffusion UNet: cross-attention, GEGLU, several heads."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    ).eval()


@pytest.fixture
def make_dit():
    """Build a DiT with seeded weights, two classes and a learned variance; keywords change its config."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(**{**TINY_DIT, **changes}).eval()
        family_of(model).prepare(model)
        return model

    return make


@pytest.fixture
def dit(make_dit) -> DiTTransformer2DModel:
    """A DiT that computes in milliseconds."""
    return make_dit()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    """The DDPM schedule of all the paper's UNets."""
    return DDPMScheduler()


@pytest.fixture
def images() -> Images:
    """Random 8×8 images of 2×2 blocks, 24 for training and 8 held out."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (32, 1, 4, 4)).repeat(2, axis=2).repeat(2, axis=3).astype(np.uint8)
    return Images(train=pixels[:24], heldout=pixels[24:])


@pytest.fixture
def latents():
    """Constant latents of four classes, each class with its own value, and a table with the empty condition."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, 32)
    values = np.stack([np.full((3, 8, 8), label - 1.5) for label in labels]).astype(np.float16)
    table = draws.normal(size=(5, 2, 12)).astype(np.float32)
    return Images(
        values[:24], values[24:], Conditions(table, labels[:24], labels[24:]), np.zeros((24, 3, 16, 16), np.uint8)
    )


@pytest.fixture(scope="session")
def params() -> Params:
    """The default params."""
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def protocol() -> Protocol:
    """A protocol of two sets of four images in two steps."""
    return Protocol(
        sampler={"steps": 2, "clip": True},
        precision="float32",
        schedule_sha256="d" * 64,
        num_images=4,
        sets=2,
        seed=3,
        extractor="digits",
        layer="64",
        extractor_sha256="a" * 64,
        num_real_images=10,
        real_sha256="b" * 64,
        kid_subsets=2,
        kid_subset_size=4,
        neighbours=2,
    )


@pytest.fixture
def model_folder(tmp_path, unet, scheduler) -> Path:
    """The tiny UNet as a diffusers folder."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def magnitude_of():
    """Measure the magnitude importance of a UNet, which needs no data."""

    def measure(unet):
        return measure_importance(unet, DDPMScheduler(), [], [], criterion="magnitude", formula="paper")

    return measure


@pytest.fixture
def magnitude(unet, magnitude_of):
    """The magnitude importance of the tiny UNet."""
    return magnitude_of(unet)
