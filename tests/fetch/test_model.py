"""Model sources: what is fetched, and what is refused."""

import hashlib
import shutil
from fnmatch import fnmatch

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel, VQModel

from recipes.photos import UNET, write_bundled
from stages.fetch.class_embedding import read_class_embedding
from stages.fetch.model import BUNDLED, BUNDLED_SHA256, _missing_weights, fetch_model
from stages.fetch.params import BundledModel, FolderModel, HubModel
from stages.fetch.pickles import BIN
from stages.models.complexity import count_macs, count_params
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.pipeline import read_unet, write_pipeline
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json, write_json
from stages.storage.manifest import Manifest, describe
from stages.storage.provenance import write_run_record
from stages.storage.tensors import read_tensors, tensors_sha256, write_tensors

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "num_vq_embeddings": 16,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, model_folder):
    """A Hub cache with one small model, in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    model_folder.rename(snapshot)


def test_the_bundled_model_is_small_and_loads(tmp_path):
    """At most 5 MB in the repository; the fetched weights are the bundled file, byte for byte."""
    unet = fetch_model(BundledModel(source="bundled", name="digits"), tmp_path / "out").unet
    shipped = BUNDLED / "digits" / "unet" / WEIGHTS

    assert shipped.stat().st_size <= 5_000_000
    assert file_sha256(tmp_path / "out" / "unet" / WEIGHTS) == file_sha256(shipped)
    assert unet.config["block_out_channels"] == [32, 64, 64]


def test_the_shipped_photos_have_their_hash_and_the_recipes_network(tmp_path):
    """At most 10 MB in the repository; `fetch` checks the hash."""
    unet = fetch_model(BundledModel(source="bundled", name="photos"), tmp_path / "out").unet
    (shipped,) = (BUNDLED / "photos" / "unet").glob("*.safetensors")

    assert shipped.stat().st_size <= 10_000_000
    assert {key: unet.config[key] for key in UNET} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in UNET.items()
    }


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The bundled model photos with random weights in float16, and its hash: its folder and the UNet."""
    monkeypatch.setattr("recipes.photos.BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr("stages.fetch.model.BUNDLED", tmp_path / "bundled")
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET)
    write_pipeline(tmp_path / "trained", unet, DDPMScheduler())
    write_run_record(tmp_path / "trained", "finetune", seed=0)
    sha256 = write_bundled(tmp_path / "trained")
    monkeypatch.setitem(BUNDLED_SHA256, "photos", sha256)
    return tmp_path / "bundled" / "photos", unet


def test_the_bundled_photos_are_small_and_become_float32(tmp_path, photos, capsys):
    """One file of 16 bits and at most 10 MB, as the recipe writes it; fetch rounds no weight any further."""
    folder, unet = photos
    fetched = fetch_model(BundledModel(source="bundled", name="photos"), tmp_path / "out").unet
    (weights,) = (folder / "unet").glob("*.safetensors")

    assert weights.stat().st_size <= 10_000_000
    assert weights.name == "diffusion_pytorch_model.fp16.safetensors"
    assert "has 16-bit weights, which become float32" in capsys.readouterr().err
    for name, tensor in unet.state_dict().items():
        assert torch.equal(fetched.state_dict()[name], tensor.half().float())
    assert (count_params(fetched), count_macs(fetched)) == (3_916_611, 696_422_592)
    assert "CIFAR-10" in (tmp_path / "out" / "README.md").read_text()


def test_damaged_bundled_photos_are_refused(tmp_path, photos):
    """Other weights than those of the hash, and a folder that is missing, in one line."""
    source = BundledModel(source="bundled", name="photos")
    weights = photos[0] / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    write_tensors(weights, {name: tensor + 1 for name, tensor in read_tensors(weights).items()})
    with pytest.raises(InputError, match=r"has sha256 .*, expected"):
        fetch_model(source, tmp_path / "out")

    photos[0].rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"the bundled model photos is missing: .*bundled/photos.*recipes/photos\.py"):
        fetch_model(source, tmp_path / "out")


def test_a_folder_is_checked_against_its_hash(tmp_path, model_folder, unet):
    """With a wrong hash nothing is loaded, and the message has both hashes."""
    found = file_sha256(model_folder / "unet" / WEIGHTS)
    fetched = fetch_model(FolderModel(source="folder", path=model_folder, sha256=found), tmp_path / "out")
    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())

    with pytest.raises(InputError, match=f"has sha256 {found}, expected {'0' * 64}"):
        fetch_model(FolderModel(source="folder", path=model_folder, sha256="0" * 64), tmp_path / "out")


def test_a_missing_folder_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(InputError, match="nowhere does not exist"):
        fetch_model(FolderModel(source="folder", path=tmp_path / "nowhere"), tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"norm_num_groups": 0}, "the weights do not fit the config"),
        ("unet", {"layers_per_block": "two"}, "the weights do not fit the config"),
        ("unet", {"sample_size": 0}, "sample_size 0; supported: one positive integer"),
        ("unet", {"freq_shift": "x"}, "the model does not run"),
        ("scheduler", {"beta_schedule": "foo"}, "is not a valid noise schedule"),
        ("scheduler", {"num_train_timesteps": 0}, "is not a valid noise schedule"),
    ],
)
def test_a_model_that_does_not_run_is_refused(tmp_path, model_folder, part, change, message):
    """A config that makes diffusers raise an exception is refused by fetch, not by a later stage."""
    path = model_folder / part / ("config.json" if part == "unet" else "scheduler_config.json")
    write_json(path, {**read_json(path), **change})

    with pytest.raises(InputError, match=message) as caught:
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")
    assert "\n" not in caught.value.message


def test_weights_that_are_not_finite_are_refused(tmp_path, model_folder, unet, scheduler):
    """One NaN is enough."""
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    write_pipeline(model_folder, unet, scheduler)

    with pytest.raises(InputError, match="holds values that are not finite"):
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")


@pytest.fixture
def latent_folder(tmp_path, conditional, scheduler):
    """A class-conditional latent diffusion model: UNet, autoencoder and class embedding."""
    folder = tmp_path / "latent"
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    vqvae.save_pretrained(folder / "vqvae")
    components = {"vqvae": ["diffusers", "VQModel"], "safety_checker": [None, None]}
    write_json(folder / "model_index.json", {"_class_name": "LDMPipeline", **components})
    write_json(folder / CLASS_EMBEDDING / "config.json", {"num_classes": 4, "width": 12, "unconditional": 4})
    write_tensors(folder / CLASS_EMBEDDING / WEIGHTS, {"weight": torch.randn(5, 12)})
    write_pipeline(tmp_path / "unet", conditional, scheduler)
    for part in ("unet", "scheduler"):
        (tmp_path / "unet" / part).rename(folder / part)
    return folder


PARTS = ("unet", "vqvae", CLASS_EMBEDDING)


@pytest.mark.parametrize("part", PARTS)
def test_the_hash_covers_all_weights_of_a_latent_model(tmp_path, latent_folder, part):
    """UNet, autoencoder and class embedding in this order; other weights of any of them are refused."""
    files = [latent_folder / name / WEIGHTS for name in PARTS]
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    fetch_model(FolderModel(source="folder", path=latent_folder, sha256=sha256), tmp_path / "out")
    path = latent_folder / part / WEIGHTS
    tensors = read_tensors(path)
    name = next(iter(tensors))
    write_tensors(path, tensors | {name: tensors[name] + 1})

    with pytest.raises(InputError, match=f"unet/{WEIGHTS} with vqvae/{WEIGHTS}, {CLASS_EMBEDDING}/{WEIGHTS} has sha"):
        fetch_model(FolderModel(source="folder", path=latent_folder, sha256=sha256), tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("number", "missed"), [(1, f"vqvae and {CLASS_EMBEDDING}, which belong"), (2, f"{CLASS_EMBEDDING}, which belongs")]
)
def test_a_hash_of_the_first_parts_alone_is_explained(tmp_path, latent_folder, number, missed):
    """It was enough before; the line has the hash that is expected now. A model in pixel space keeps its own."""
    first = file_sha256(*(latent_folder / name / WEIGHTS for name in PARTS[:number]))
    every = file_sha256(*(latent_folder / name / WEIGHTS for name in PARTS))
    found = f"has sha256 {every}, expected {first} .that is the hash without {missed} to it.; correct fetch"
    with pytest.raises(InputError, match=found):
        fetch_model(FolderModel(source="folder", path=latent_folder, sha256=first), tmp_path / "out")


def test_a_latent_model_is_fetched_with_all_components(tmp_path, latent_folder, conditional, content):
    """UNet, autoencoder and class embedding; a .bin becomes safetensors with the current parameter names."""
    weights = read_tensors(latent_folder / "vqvae" / WEIGHTS)
    old = {name.replace(".to_out.0.", ".proj_attn."): tensor for name, tensor in weights.items()}
    torch.save(old, latent_folder / "vqvae" / BIN)
    (latent_folder / "vqvae" / WEIGHTS).unlink()
    fetched = fetch_model(FolderModel(source="folder", path=latent_folder), tmp_path / "out")

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(conditional.state_dict())
    assert set(content(tmp_path / "out")) == {
        *(f"{part}/{file}" for part in ("class_embedding", "unet", "vqvae") for file in ("config.json", WEIGHTS)),
        "model_index.json",
        "scheduler/scheduler_config.json",
    }
    assert tensors_sha256(read_tensors(tmp_path / "out" / "vqvae" / WEIGHTS)) == tensors_sha256(weights)
    assert VQModel.from_pretrained(tmp_path / "out" / "vqvae").config["num_vq_embeddings"] == 8
    assert read_json(tmp_path / "out" / "model_index.json")["vqvae"] == ["diffusers", "VQModel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, r"a weight of shape \[5, 12\] and width 16 in its config\.json, the model takes 12"),
        ({"num_classes": 6}, "has 5 rows, but num_classes 6 and unconditional 4"),
        ({"unconditional": 5}, "has 5 rows, but num_classes 4 and unconditional 5"),
        (None, "class_embedding does not exist; supported: unconditional and class-conditional models, not text"),
    ],
)
def test_a_class_embedding_that_does_not_fit_is_refused(tmp_path, latent_folder, change, message):
    """A conditional model needs one of its own width with a row for each class."""
    config = latent_folder / CLASS_EMBEDDING / "config.json"
    if change:
        write_json(config, {**read_json(config), **change})
    else:
        shutil.rmtree(config.parent)

    with pytest.raises(InputError, match=message) as caught:
        fetch_model(FolderModel(source="folder", path=latent_folder), tmp_path / "out")
    assert "\n" not in caught.value.message


def test_a_class_embedding_of_another_name_is_refused(tmp_path, latent_folder):
    """The line names what the file has."""
    write_tensors(latent_folder / CLASS_EMBEDDING / WEIGHTS, {"embedding.weight": torch.ones(5, 12)})

    with pytest.raises(InputError, match=rf"{WEIGHTS} holds embedding\.weight, expected weight; rename it$"):
        fetch_model(FolderModel(source="folder", path=latent_folder), tmp_path / "out")


def test_variables_in_a_path_are_expanded(tmp_path, model_folder, monkeypatch):
    """For a variable that is not set, the message has its name and the key."""
    monkeypatch.setenv("SET", str(model_folder.parent))
    monkeypatch.delenv("UNSET", raising=False)
    fetch_model(FolderModel(source="folder", path="$SET/model"), tmp_path / "out")

    with pytest.raises(InputError, match=r"fetch\.model\.path is \$UNSET/model and \$UNSET is not set"):
        fetch_model(FolderModel(source="folder", path="$UNSET/model"), tmp_path / "out")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_comes_from_the_cache_when_offline(tmp_path, unet):
    """The pinned revision, through huggingface_hub itself."""
    fetched = fetch_model(HubModel(source="hub", repo="someone/small", revision=COMMIT), tmp_path / "out")

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert tensors_sha256(read_unet(tmp_path / "out").state_dict()) == tensors_sha256(unet.state_dict())


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_cannot_be_downloaded_is_refused_with_advice(tmp_path):
    """The message names HF_HOME and fetch.model."""
    source = HubModel(source="hub", repo="someone/small", revision="f" * 40)

    with pytest.raises(InputError, match=r"neither in the Hub's cache nor.*HF_HOME.*fetch\.model") as caught:
        fetch_model(source, tmp_path / "out")
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_with_only_a_bin_is_fetched(tmp_path, unet):
    """The layout of google/ddpm-ema-church-256: config and .bin at the top."""
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    torch.save(unet.state_dict(), snapshot / BIN)
    (snapshot / "unet" / "config.json").rename(snapshot / "config.json")
    shutil.rmtree(snapshot / "unet")
    fetched = fetch_model(HubModel(source="hub", repo="someone/small", revision=COMMIT), tmp_path / "out")

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert (tmp_path / "out" / "unet" / WEIGHTS).is_file()


def test_the_shards_of_a_bin_are_downloaded(tmp_path):
    """Which its index names, as those of safetensors are."""
    names = [f"diffusion_pytorch_model-{index:05}-of-00002.bin" for index in (1, 2)]
    (tmp_path / "unet").mkdir()
    write_json(tmp_path / "unet" / "config.json", {})
    write_json(tmp_path / "unet" / f"{BIN}.index.json", {"weight_map": dict(zip("ab", names, strict=True))})

    assert [path.name for path in _missing_weights(tmp_path)] == names


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("damaged", [False, True])
def test_a_pushed_model_is_compared_with_its_list_of_hashes(tmp_path, damaged):
    """The files.json that `espalier push` sent along: a file that changed on the way is named."""
    folder = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    listed = [describe(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    if damaged:
        listed = [it.model_copy(update={"sha256": "a" * 64}) if it.path == f"unet/{WEIGHTS}" else it for it in listed]
    write_json(folder / "files.json", Manifest(files=listed).model_dump(mode="json"))
    source = HubModel(source="hub", repo="someone/small", revision=COMMIT)

    if not damaged:
        assert fetch_model(source, tmp_path / "out").unet is not None
        return
    with pytest.raises(InputError, match=rf"unet/{WEIGHTS} is not what files\.json of someone/small at {COMMIT} lists"):
        fetch_model(source, tmp_path / "out")


@pytest.mark.usefixtures("hub_cache")
def test_a_list_of_another_form_is_not_read(tmp_path):
    """Whoever else calls a file of a repository files.json means something else by it; damage to ours is refused."""
    folder = tmp_path / "hub" / "models--someone--small" / "snapshots" / COMMIT
    source = HubModel(source="hub", repo="someone/small", revision=COMMIT)
    write_json(folder / "files.json", ["a.png", "b.png"])
    fetch_model(source, tmp_path / "out")

    write_json(folder / "files.json", {"version": 1, "files": [{"path": "../a.png"}]})
    with pytest.raises(InputError, match=r"files\.json of someone/small at .* is damaged"):
        fetch_model(source, tmp_path / "again")


def test_a_bin_is_downloaded_only_without_safetensors(monkeypatch, model_folder):
    """Checked on the patterns that are passed to snapshot_download."""
    requested = []

    def download(repo, *, revision, allow_patterns):  # noqa: ARG001
        requested.extend(allow_patterns)
        return str(model_folder)

    monkeypatch.setattr("stages.fetch.model.snapshot_download", download)
    source = HubModel(source="hub", repo="someone/small", revision=COMMIT)
    fetch_model(source, model_folder.parent / "out")
    assert not [pattern for pattern in requested if fnmatch(f"unet/{BIN}", pattern)]

    torch.save(read_tensors(model_folder / "unet" / WEIGHTS), model_folder / "unet" / BIN)
    (model_folder / "unet" / WEIGHTS).unlink()
    fetch_model(source, model_folder.parent / "out")
    assert requested[-1] == f"unet/{BIN}"


@pytest.fixture
def latent(tmp_path, conditional, scheduler):
    """The folder of a small latent model with four classes, whose model_index.json lacks the autoencoder."""
    folder = tmp_path / "latent"
    write_pipeline(folder, conditional, scheduler)
    torch.manual_seed(0)
    VQModel(block_out_channels=(8, 16), **BLOCKS).save_pretrained(folder / "vqvae")
    write_embedding(folder, {"num_classes": 4, "width": 12, "unconditional": 4})
    return folder


def write_embedding(folder, config, weight=None):
    """Write a class embedding."""
    write_json(folder / "class_embedding" / "config.json", config)
    tensors = {"weight": torch.ones(5, 12) if weight is None else weight}
    write_tensors(folder / "class_embedding" / WEIGHTS, tensors)


def test_an_autoencoder_missing_from_the_index_is_fetched(latent, tmp_path):
    """So is the class embedding; the written index names the autoencoder."""
    fetch_model(FolderModel(source="folder", path=latent), tmp_path / "out")

    assert read_json(tmp_path / "out" / "model_index.json")["vqvae"] == ["diffusers", "VQModel"]
    for file in (f"vqvae/{WEIGHTS}", f"class_embedding/{WEIGHTS}"):
        assert file_sha256(tmp_path / "out" / file) == file_sha256(latent / file)


@pytest.mark.parametrize(
    ("config", "weight", "message"),
    [
        ({"unconditional": True}, None, "has 5 rows, but num_classes 4 and unconditional True"),
        ({"unconditional": 5}, None, "has 5 rows, but num_classes 4 and unconditional 5"),
        ({"unconditional": 3}, None, "unconditional 3 .*; allowed: 1 to 5 classes, and null or a row behind those"),
        ({"num_classes": 9}, None, "has 5 rows, but num_classes 9"),
        ({}, torch.full((5, 12), torch.nan), "holds values that are not finite"),
        ({}, torch.ones(5, 8), r"a weight of shape \[5, 8\] .* the model takes 12"),
    ],
)
def test_an_embedding_that_contradicts_its_config_is_refused(latent, tmp_path, config, weight, message):
    """Nothing is written."""
    write_embedding(latent, {"num_classes": 4, "width": 12, "unconditional": 4, **config}, weight)

    with pytest.raises(InputError, match=message):
        fetch_model(FolderModel(source="folder", path=latent), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embedding_beside_an_unconditional_model_is_refused(model_folder, tmp_path):
    """Otherwise fetch would require classes that the model does not use."""
    write_embedding(model_folder, {"num_classes": 4, "width": 12, "unconditional": 4})

    with pytest.raises(InputError, match="embeds classes, but the model is unconditional; remove it"):
        fetch_model(FolderModel(source="folder", path=model_folder), tmp_path / "out")


def test_an_autoencoder_that_does_not_fit_is_refused(latent, tmp_path):
    """Other latent channels or NaN weights are found before any image is encoded."""
    network = VQModel(block_out_channels=(8, 16), latent_channels=4, **BLOCKS)
    network.save_pretrained(latent / "vqvae")
    with pytest.raises(InputError, match="the autoencoder does not fit the model"):
        fetch_model(FolderModel(source="folder", path=latent), tmp_path / "out")

    network = VQModel(block_out_channels=(8, 16), **BLOCKS)
    torch.nn.init.constant_(network.decoder.conv_out.weight, torch.nan)
    network.save_pretrained(latent / "vqvae")
    with pytest.raises(InputError, match=r"decoder\.conv_out\.weight holds values that are not finite"):
        fetch_model(FolderModel(source="folder", path=latent), tmp_path / "out")


@pytest.mark.parametrize(("unconditional", "last"), [(2, 2.0), (None, 0.0)])
def test_the_last_row_of_the_class_table_is_the_unconditional_one(conditional, unet, tmp_path, unconditional, last):
    """It is the row that the config names, or zeros; rows beyond the classes are dropped."""
    assert read_class_embedding(unet, tmp_path) is None
    weight = torch.arange(4.0)[:, None].expand(4, 12).contiguous()
    write_embedding(tmp_path, {"num_classes": 2, "width": 12, "unconditional": unconditional}, weight)

    assert read_class_embedding(conditional, tmp_path)[:, 0, 0].tolist() == [0.0, 1.0, last]
