"""Layouts of weights: shards, variants of 16 bits and what stands beside them."""

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DModel, VQModel
from ruamel.yaml import YAML

from stages.fetch.__main__ import main
from stages.fetch.model import fetch_model
from stages.fetch.params import FolderModel, HubModel
from stages.fetch.pickles import BIN
from stages.fetch.weights import STEM, find_weights, read_weights
from stages.models.autoencoder import read_autoencoder
from stages.models.layout import WEIGHTS
from stages.models.pipeline import read_unet, write_pipeline
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.files import file_sha256, read_json, write_json
from stages.storage.tensors import read_tensors, tensors_sha256, write_tensors

INDEX = f"{WEIGHTS}.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "plain": {},
    "sharded": {"max_shard_size": "60KB"},
    "fp16": {"variant": "fp16"},
    "bf16": {"variant": "bf16"},
    "fp16 sharded": {"variant": "fp16", "max_shard_size": "30KB"},
}
"""Layout -> options of save_pretrained that write it."""


def save(network, folder, layout):
    """Write a network with diffusers in one layout, beside what is there."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(FILES[layout].get("variant"), torch.float32)
    cast = type(network).from_config(network.config)
    cast.load_state_dict(network.state_dict())
    cast.to(dtype).save_pretrained(folder, **FILES[layout])


def rounded(network, layout):
    """The tensors of a network after they were stored in a layout, in float32."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(FILES[layout].get("variant"), torch.float32)
    return {name: tensor.to(dtype).float() for name, tensor in network.state_dict().items()}


@pytest.fixture
def folder(tmp_path, unet, scheduler):
    """A model folder whose weights are still to be written."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    (tmp_path / "model/unet" / WEIGHTS).unlink()
    return tmp_path / "model"


@pytest.fixture
def fetch(tmp_path, folder):
    """Fetch the folder and return the UNet."""

    def run(sha256=None):
        return fetch_model(FolderModel(source="folder", path=folder, sha256=sha256), tmp_path / "out").unet

    return run


@pytest.fixture
def refused(fetch, tmp_path):
    """Check that fetching is refused in one line, and return it."""

    def run(sha256=None):
        with pytest.raises(InputError) as caught:
            fetch(sha256)
        assert "\n" not in caught.value.message
        assert "/.temporary" not in caught.value.message
        assert not (tmp_path / "out").exists()
        return caught.value.message

    return run


def shards(folder, variant=""):
    """The shards of the UNet, ordered by name."""
    return sorted((folder / "unet").glob(f"{STEM}{variant}-*.safetensors"))


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_of_diffusers_is_fetched(folder, fetch, unet, layout, tmp_path, content, capsys):
    """In float32, as one file that plain diffusers loads; a variant is announced."""
    save(unet, folder / "unet", layout)
    found = fetch()
    out = tmp_path / "out"

    assert tensors_sha256(found.state_dict()) == tensors_sha256(rounded(unet, layout))
    assert tensors_sha256(read_unet(out).state_dict()) == tensors_sha256(rounded(unet, layout))
    assert {path for path in content(out) if path.startswith("unet/")} == {"unet/config.json", f"unet/{WEIGHTS}"}
    assert UNet2DModel.from_pretrained(out, subfolder="unet").dtype == torch.float32
    assert ("16-bit weights" in capsys.readouterr().err) == ("16" in layout)
    assert len(shards(folder, ".fp16" if "fp16" in layout else "")) != 1


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_of_an_autoencoder_is_fetched(latent, layout, tmp_path, content):
    """Weights of 16 bits become float32, since the UNet beside them is; only the chosen file is copied."""
    folder, vqvae = latent
    (folder / "vqvae" / WEIGHTS).unlink()
    save(vqvae, folder / "vqvae", layout)
    fetch_model(FolderModel(source="folder", path=folder), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out/vqvae" / WEIGHTS)

    assert tensors_sha256(tensors) == tensors_sha256(rounded(vqvae, layout))
    assert {path for path in content(tmp_path / "out") if "vqvae" in path} == {"vqvae/config.json", f"vqvae/{WEIGHTS}"}
    assert read_autoencoder(tmp_path / "out", torch.device("cpu")).network.dtype == torch.float32


@pytest.fixture
def latent(tmp_path, make_unet, scheduler):
    """The folder of a small latent model, and its autoencoder."""
    torch.manual_seed(0)
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    write_pipeline(tmp_path / "latent", make_unet(in_channels=3, out_channels=3), scheduler)
    vqvae.save_pretrained(tmp_path / "latent/vqvae")
    return tmp_path / "latent", vqvae


@pytest.mark.parametrize(
    ("layouts", "taken"),
    [
        (["fp16", "plain"], WEIGHTS),
        (["fp16 sharded", "plain"], WEIGHTS),
        (["fp16", "sharded"], INDEX),
        (["bf16", "fp16"], f"{STEM}.fp16.safetensors"),
        (["fp16", "bin"], BIN),
        (["sharded", "bin"], INDEX),
    ],
)
def test_full_precision_is_preferred_and_the_choice_is_printed(folder, fetch, make_unet, layouts, taken, capsys):
    """Each layout holds other weights; those of the one that is named are fetched."""
    saved = {}
    for seed, layout in enumerate(layouts):
        network = make_unet(seed=seed)
        if layout == "bin":
            torch.save(network.state_dict(), folder / "unet" / BIN)
        else:
            stored = {path: path.read_bytes() for path in (folder / "unet").iterdir()}
            save(network, folder / "unet", layout)
            for path, content in stored.items():  # save_pretrained removes shards of others
                path.write_bytes(content)
        for path in find_weights(folder / "unet"):
            saved.setdefault(path.name, rounded(network, layout if layout in FILES else "plain"))
    found = fetch()
    line = capsys.readouterr().err.splitlines()[0]

    assert tensors_sha256(found.state_dict()) == tensors_sha256(saved[taken])
    assert line.startswith(f"fetch.model: unet/{taken} is read, not ")
    assert all(f"unet/{name}" in line for name in saved)


def test_an_older_name_of_a_variants_index_is_read(folder, fetch, unet):
    """Diffusers put the variant before `index`, and after the number of a shard."""
    save(unet, folder / "unet", "fp16 sharded")
    index = folder / "unet" / f"{WEIGHTS}.index.fp16.json"
    text = index.read_text()
    for path in shards(folder, ".fp16"):
        old = f"{path.name.replace('.fp16', '').removesuffix('.safetensors')}.fp16.safetensors"
        text = text.replace(path.name, old)
        path.rename(path.with_name(old))
    (folder / "unet" / f"{WEIGHTS}.fp16.index.json").write_text(text)
    index.unlink()

    assert tensors_sha256(fetch().state_dict()) == tensors_sha256(rounded(unet, "fp16 sharded"))


def test_a_single_safetensors_file_is_not_announced(folder, fetch, unet, capsys):
    """There is no choice."""
    save(unet, folder / "unet", "plain")
    fetch()

    assert "fetch.model" not in capsys.readouterr().err


def test_the_hash_of_shards_covers_all_of_them(folder, fetch, refused, unet):
    """It is that of `cat *-of-*.safetensors | sha256sum`; one changed byte in the last shard is refused."""
    save(unet, folder / "unet", "sharded")
    paths = shards(folder)
    (folder / "all").write_bytes(b"".join(path.read_bytes() for path in paths))
    expected = file_sha256(folder / "all")

    assert len(paths) > 1
    tensors = read_tensors(paths[-1])
    write_tensors(folder / "changed", {name: tensor + 1 for name, tensor in tensors.items()}, {"format": "pt"})
    original = paths[-1].read_bytes()
    paths[-1].write_bytes((folder / "changed").read_bytes())
    message = refused(expected)
    assert message.startswith(f"{folder}/unet/{INDEX} has sha256 ")
    assert f"expected {expected}" in message
    paths[-1].write_bytes(original)
    assert tensors_sha256(fetch(expected).state_dict()) == tensors_sha256(unet.state_dict())


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_missing_shard_is_named(folder, refused, unet, sha256):
    """With and without a hash."""
    save(unet, folder / "unet", "sharded")
    shards(folder)[1].unlink()

    assert refused(sha256).startswith(f"{shards(folder)[0].parent}/{STEM}-00002-of-")
    assert "does not exist" in refused(sha256)


def test_a_shard_that_contradicts_its_index_is_refused(folder, refused, unet):
    """A tensor that is missing, and one that the index places elsewhere or nowhere."""
    save(unet, folder / "unet", "sharded")
    first, index = shards(folder)[0], folder / "unet" / INDEX
    tensors = read_tensors(first)
    name = min(tensors)
    write_tensors(first, {key: tensor for key, tensor in tensors.items() if key != name})
    assert refused().startswith(f"{first} does not hold {name}, unlike {INDEX} says")

    write_tensors(first, tensors)
    content = read_json(index)
    moved = {**content["weight_map"], name: shards(folder)[1].name}
    write_json(index, {**content, "weight_map": moved})
    assert refused().startswith(f"{first} also holds {name}, unlike {INDEX} says")


def test_a_damaged_shard_is_named(folder, refused, unet):
    """A download that was cut short."""
    save(unet, folder / "unet", "sharded")
    last = shards(folder)[-1]
    last.write_bytes(last.read_bytes()[:-10])

    assert refused().startswith(f"{last} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "has no weight_map that gives each tensor a file beside it"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"conv_in.weight": 1}}', "has no weight_map"),
        ('{"weight_map": {"conv_in.weight": "../other/a.safetensors"}}', "has no weight_map"),
        ('{"weight_map": {"conv_in.weight": "config.json"}}', "has no weight_map"),
        ('{"weight_map": {"conv_in.weight": "nowhere.safetensors"}}', "nowhere.safetensors does not exist"),
    ],
)
@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_an_invalid_index_is_refused(folder, refused, content, reason, sha256):
    """With its path; a file outside the component is not opened."""
    (folder / "unet" / INDEX).write_text(content)

    message = refused(sha256)
    assert message.startswith(f"{folder}/unet/")
    assert reason in message


def test_other_files_of_weights_are_named(folder, refused, unet):
    """A variant that is not supported is not taken for the model."""
    save(unet, folder / "unet", "plain")
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / f"{STEM}.non_ema.safetensors")

    assert f"(found: {STEM}.non_ema.safetensors); complete the folder" in refused()


@pytest.mark.parametrize("layout", [layout for layout in FILES if layout != "plain"])
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_hub_model_of_every_layout_is_downloaded(tmp_path, monkeypatch, folder, unet, layout, is_flat):
    """Only the files that are asked for arrive; a .bin is not asked for beside shards."""
    save(unet, folder / "unet", layout)
    torch.save(unet.state_dict(), folder / "unet" / f"{STEM}.non_ema.bin")
    if is_flat:
        for file in (folder / "unet").iterdir():
            file.rename(folder / file.name)
        (folder / "unet").rmdir()
    requested, local = [], tmp_path / "cache"

    def download(repo, *, revision, allow_patterns):  # noqa: ARG001
        from huggingface_hub.utils import filter_repo_objects

        requested.extend(allow_patterns)
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            (local / path).parent.mkdir(parents=True, exist_ok=True)
            (local / path).write_bytes((folder / path).read_bytes())
        return str(local)

    monkeypatch.setattr("stages.fetch.model.snapshot_download", download)
    fetched = fetch_model(HubModel(source="hub", repo="someone/small", revision=COMMIT), tmp_path / "out")

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(rounded(unet, layout))
    assert not list(local.rglob("*non_ema*"))
    assert (layout == "sharded") == (not [name for name in requested if name.endswith(BIN)])


def test_fetch_as_a_command_takes_shards(tmp_path, root, folder, unet, images, monkeypatch):
    """With the line about the choice on stderr, and exit code 1 with one line for a missing shard."""
    save(unet, folder / "unet", "sharded")
    torch.save(unet.state_dict(), folder / "unet" / BIN)
    np.savez(tmp_path / "images.npz", arr_0=images.train[:, 0])
    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    params["fetch"]["model"] = {"source": "folder", "path": str(folder)}
    params["fetch"]["data"] = {"source": "npz", "path": str(tmp_path / "images.npz")}
    YAML().dump(params, tmp_path / "params.yaml")
    given = ["--params", "params.yaml", "--model-out", "out", "--data-out", "data"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, given)
    shards(folder)[0].unlink()
    again = CliRunner().invoke(main, given)

    assert result.exit_code == 0, result.output
    assert f"unet/{INDEX} is read, not unet/{BIN}" in result.stderr
    assert tensors_sha256(read_unet(tmp_path / "out").state_dict()) == tensors_sha256(unet.state_dict())
    assert again.exit_code == 1
    assert again.output.count("Error: ") == 1
    assert "Traceback" not in again.output


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1_000_000),
        torch.zeros(4, device="meta"),
        pytest.param(torch.zeros(4), marks=pytest.mark.filterwarnings("ignore")),  # PyTorch calls them deprecated
        torch.zeros(4, dtype=torch.complex64),
    ],
    ids=["expanded", "meta", "quantised", "complex"],
)
def test_tensors_that_a_bin_does_not_hold_number_by_number_are_refused(tmp_path, request, tensor):
    """A number that stands for a million, tensors without content, and types whose content is not real numbers."""
    if "quantised" in request.node.callspec.id:
        tensor = torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)
    path = tmp_path / BIN
    torch.save({"weight": tensor}, path)

    with pytest.raises(InputError, match=r"supported: (dense tensors only|tensors that do not share memory)"):
        read_weights(path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("refused"), UnavailableError),
        (httpx.ReadError("cut"), UnavailableError),
        (RuntimeError("odd"), InputError),
        (ValueError("no such revision"), InputError),
    ],
)
def test_an_outage_of_the_hub_may_be_over_later(tmp_path, monkeypatch, error, kind):
    """Its client raises network errors that are no OSError; a flow tries again after an outage alone."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("stages.fetch.model.snapshot_download", fail)
    with pytest.raises(InputError, match="is neither in the Hub's cache nor can it be downloaded") as caught:
        fetch_model(HubModel(source="hub", repo="someone/small", revision=COMMIT), tmp_path / "out")
    assert type(caught.value) is kind
