"""Of a model folder, only known components and files inside it enter an output."""

import pytest
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel

from stages.fetch.model import fetch_model
from stages.fetch.params import FolderModel, HubModel
from stages.models.layout import WEIGHTS
from stages.models.pipeline import read_unet, write_pipeline
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "top secret"  # pragma: allowlist secret


def fetch(folder, out):
    """Fetch a model folder."""
    return fetch_model(FolderModel(source="folder", path=folder), out)


@pytest.fixture
def secrets(tmp_path):
    """A folder that belongs to the user and not to the model."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text(f'{{"auth": "{SECRET}"}}')
    return tmp_path / "home"


@pytest.mark.parametrize(
    "name",
    ["README.md", "model_index.json", "scheduler/extra.json", "scheduler", "vae", "vqvae", "class_embedding", "unet"],
)
def test_a_link_out_of_the_folder_is_refused_and_nothing_is_written(tmp_path, model_folder, secrets, name):
    """A card, an index, a file of a component and each component."""
    link = model_folder / name
    if link.exists():
        link.rename(tmp_path / "original")
    link.symlink_to(secrets if "." not in name else secrets / "config.json")

    with pytest.raises(InputError, match=f"{name} is a link out of the model folder"):
        fetch(model_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_are_followed(tmp_path, model_folder):
    """As between two variants of one model."""
    (model_folder / "unet").rename(model_folder / "unet-v2")
    (model_folder / "unet").symlink_to("unet-v2")
    fetch(model_folder, tmp_path / "out")

    assert file_sha256(tmp_path / "out" / "unet" / WEIGHTS) == file_sha256(model_folder / "unet" / WEIGHTS)


def test_the_links_of_the_hub_cache_are_followed(tmp_path, monkeypatch, model_folder):
    """Its snapshots hold links to blobs/ beside them, and one to elsewhere is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model_folder.rename(snapshot)
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    source = HubModel(source="hub", repo="someone/small", revision=COMMIT)
    fetch_model(source, tmp_path / "out")

    (tmp_path / "secret.md").write_text(SECRET)
    (snapshot / "README.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(InputError, match=r"README\.md is a link out of the model folder"):
        fetch_model(source, tmp_path / "second")


def test_unknown_components_are_left_out_and_named(tmp_path, model_folder, secrets, capsys):
    """Folders, links and entries of model_index.json; a name cannot forge a line."""
    (model_folder / "feature_extractor").symlink_to(secrets)
    entries = {"feature_extractor": ["os", "system"], "x\nOK": ["a", "B"], "safety_checker": [None, None]}
    index = read_json(model_folder / "model_index.json")
    write_json(model_folder / "model_index.json", {**index, **entries, "_class_name": ["evil", "Evil"]})
    fetch(model_folder, tmp_path / "out")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model_index.json", "scheduler", "unet"}
    assert read_json(tmp_path / "out" / "model_index.json") == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    told = capsys.readouterr().err.splitlines()
    found, known = (
        "feature_extractor, x\\nOK of model_index.json left out",
        "unet, transformer, scheduler, vqvae, vae, class_embedding",
    )
    assert told == [f"fetch.model: {found}; known components: {known}"]


@pytest.mark.parametrize(("name", "network"), [("vae", AutoencoderKL), ("vqvae", VQModel)])
def test_classes_and_modules_come_from_a_list(tmp_path, unet, scheduler, name, network):
    """Whatever the folder says of modules, the output names diffusers alone; other files and keys stay behind."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_pipeline(source, unet, scheduler)
    network(block_out_channels=(8,), norm_num_groups=4).save_pretrained(source / name)
    evil = {"auto_map": {"AutoModel": "evil.Evil"}, "quantization_config": {"quant_method": "evil"}}
    for path in (source / "unet" / "config.json", source / name / "config.json"):
        write_json(path, {**read_json(path), **evil})
    write_json(source / name / "tokens.json", {"auth": SECRET})
    index = {"_class_name": "EvilPipeline", name: ["evil", "Evil"], "unet": ["evil", "Evil"]}
    write_json(source / "model_index.json", index)
    write_pipeline(out, read_unet(source), scheduler, source)

    assert read_json(out / "model_index.json") == {
        "_class_name": "LDMPipeline",
        "vqvae": ["diffusers", network.__name__],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert {path.name for path in (out / "vqvae").iterdir()} == {"config.json", WEIGHTS}
    for part in ("unet", "vqvae"):
        assert not set(evil) & set(read_json(out / part / "config.json"))
    assert network.from_pretrained(out / "vqvae").config["block_out_channels"] == [8]
    assert set(DiffusionPipeline.from_pretrained(out).components) == {"unet", "scheduler", "vqvae"}


def test_a_class_of_an_autoencoder_that_is_not_known_is_refused(tmp_path, unet, scheduler):
    """Rather than written into the index."""
    write_pipeline(tmp_path / "source", unet, scheduler)
    write_json(tmp_path / "source" / "vae" / "config.json", {"_class_name": "Evil"})

    with pytest.raises(InputError, match="holds a Evil; supported: AutoencoderKL, VQModel"):
        write_pipeline(tmp_path / "out", unet, scheduler, tmp_path / "source")
