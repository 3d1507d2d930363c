"""Model sources."""

import pytest
import torch

from stages.artifacts import WEIGHTS, file_sha256, read_json, tensors_sha256, write_json
from stages.diffusion.models import read_unet, write_pipeline
from stages.errors import InputError
from stages.fetch.model import BUNDLED, fetch_model
from stages.sources import BundledSource, FolderModel, HubModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, model_folder):
    """A cache of the Hub that holds one small model, and no way out to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    model_folder.rename(snapshot)


def test_the_bundled_model_is_small_and_loads(tmp_path):
    """At most 5 MB in the repository, and what comes out is what ships."""
    unet = fetch_model(BundledSource(source="bundled", name="digits"), tmp_path / "out")
    shipped = BUNDLED / "digits" / "unet" / WEIGHTS

    assert shipped.stat().st_size <= 5_000_000
    assert file_sha256(tmp_path / "out" / "unet" / WEIGHTS) == file_sha256(shipped)
    assert unet.config["block_out_channels"] == [32, 64, 64]


def test_a_folder_is_checked_against_its_hash(tmp_path, model_folder, unet):
    """The right hash passes; with a wrong one nothing is loaded, and both hashes are told."""
    found = file_sha256(model_folder / "unet" / WEIGHTS)
    fetched = fetch_model(FolderModel(source="folder", path=model_folder, sha256=found), tmp_path / "out")
    assert tensors_sha256(fetched.state_dict()) == tensors_sha256(unet.state_dict())

    with pytest.raises(InputError, match=f"has sha256 {found}, expected {'0' * 64}"):
        fetch_model(FolderModel(source="folder", path=model_folder, sha256="0" * 64), tmp_path / "out")


def test_a_missing_folder_is_named(tmp_path):
    """One line with the path."""
    with pytest.raises(InputError, match="nowhere does not exist"):
        fetch_model(FolderModel(source="folder", path=tmp_path / "nowhere"), tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"norm_num_groups": 0}, "the weights do not fit the config"),
        ("unet", {"layers_per_block": "two"}, "the weights do not fit the config"),
        ("unet", {"sample_size": 0}, "sample_size 0; supported: one number"),
        ("unet", {"freq_shift": "x"}, "the model does not run"),
        ("scheduler", {"beta_schedule": "foo"}, "is no noise schedule"),
        ("scheduler", {"num_train_timesteps": 0}, "is no noise schedule"),
    ],
)
def test_a_model_that_cannot_run_is_refused_at_the_door(tmp_path, model_folder, part, change, words):
    """A config that diffusers chokes on never reaches a later stage."""
    path = model_folder / part / ("config.json" if part == "unet" else "scheduler_config.json")
    write_json(path, {**read_json(path), **change})

    with pytest.raises(InputError, match=words) as caught:
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")
    assert "\n" not in caught.value.message


def test_weights_that_are_no_numbers_are_refused(tmp_path, model_folder, unet, scheduler):
    """NaN in, NaN out."""
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    write_pipeline(model_folder, unet, scheduler)

    with pytest.raises(InputError, match="holds values that are not finite"):
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")


def test_latent_diffusion_is_refused(tmp_path, model_folder):
    """Its UNet draws what only a decoder makes visible."""
    write_json(model_folder / "model_index.json", {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]})

    with pytest.raises(InputError, match="names a vqvae: latent diffusion; supported: models that draw pixels"):
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_comes_from_the_cache_when_offline(tmp_path, unet):
    """The revision that was asked for, through huggingface_hub itself."""
    fetched = fetch_model(HubModel(source="hub", repo="someone/small", revision=COMMIT), tmp_path / "out")

    assert tensors_sha256(fetched.state_dict()) == tensors_sha256(unet.state_dict())
    assert tensors_sha256(read_unet(tmp_path / "out").state_dict()) == tensors_sha256(unet.state_dict())


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_cannot_be_had_says_what_would_provide_it(tmp_path):
    """Another revision is another model; the message names the variable and the param that help."""
    source = HubModel(source="hub", repo="someone/small", revision="f" * 40)

    with pytest.raises(InputError, match=r"neither in the Hub's cache nor.*HF_HOME.*fetch\.model") as caught:
        fetch_model(source, tmp_path / "out")
    assert "\n" not in caught.value.message
