"""Models and images that are plain objects in a bucket, and failing transfers."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from stages.fetch.data import fetch_data
from stages.fetch.model import fetch_model
from stages.fetch.params import FolderData, FolderModel, S3Data, S3Model
from stages.fetch.weights import STEM
from stages.models.layout import WEIGHTS
from stages.params import load_params
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json, write_json
from stages.storage.s3 import Store
from stages.storage.tensors import tensors_sha256
from tests.swift import SECRET

WRONG = "0" * 64
SHAPE = (1, 8)


@pytest.fixture
def two_attempts(monkeypatch):
    """Make S3 clients give up after the second attempt, to keep the tests short."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


@pytest.fixture
def model(model_folder):
    """A model folder with a card and with files that fetch does not need."""
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (model_folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (model_folder / "notes.txt").touch()
    return model_folder


@pytest.fixture
def image_folder(tmp_path):
    """Forty 8×8 images in two subfolders, with suffixes in upper and lower case, and a file that is not an image."""
    for index in range(40):
        subfolder = tmp_path / "images" / f"class {index % 2}"
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 50).save(subfolder / (f"{index}.PNG" if index % 3 else f"{index}.bmp"))
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


@pytest.fixture
def upload(connect):
    """Upload a folder with a plain client and return its address."""

    def put(folder, prefix="of/someone"):
        store = connect()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            store.client.upload_file(str(path), store.bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")
        store.client.put_object(Bucket=store.bucket, Key=f"{prefix}/", Body=b"")  # as consoles mark folders
        store.client.put_object(Bucket=store.bucket, Key=f"{prefix}-else/{WEIGHTS}", Body=b"of a neighbour")
        return f"s3://{store.bucket}/{prefix}"

    return put


@pytest.fixture
def out(tmp_path):
    """An empty output folder, alone in its parent folder."""
    (tmp_path / "place" / "out").mkdir(parents=True)
    return tmp_path / "place" / "out"


@pytest.fixture
def refused(out):
    """Check that a call is refused and leaves no files, and return its one-line message."""

    def run(call):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in caught.value.message
        assert list(out.parent.rglob("*")) == [out]
        return caught.value.message

    return run


def s3_model(uri, sha256=WRONG):
    """The params of a model in a bucket."""
    return S3Model(source="s3", uri=uri, sha256=sha256)


def s3_data(uri, sha256=WRONG, fit="exact"):
    """The params of images in a bucket."""
    return S3Data(source="s3", uri=uri, sha256=sha256, fit=fit)


def test_a_model_in_a_bucket_is_fetched_like_a_folder(upload, model, out, tmp_path, content):
    """Byte for byte, with its card; no temporary file is left."""
    sha256 = file_sha256(model / "unet" / WEIGHTS)
    uri = upload(model)
    (tmp_path / "folder").mkdir()
    fetch_model(FolderModel(source="folder", path=model, sha256=sha256), tmp_path / "folder")
    fetch_model(s3_model(uri + "/", sha256), out)

    assert content(out) == content(tmp_path / "folder")
    assert "README.md" in content(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_what_is_needed_is_downloaded(upload, model, connect, tmp_path):
    """No pickle beside safetensors, and no object of another prefix that begins the same."""
    store = connect(uri=upload(model))
    preferred = {"diffusion_pytorch_model.bin": WEIGHTS}
    with store.downloaded(["unet/*.json", f"*{WEIGHTS}", "*.bin"], tmp_path, preferred) as folder:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert found == {"unet/config.json", f"unet/{WEIGHTS}"}
    assert not folder.exists()


def test_a_bin_is_downloaded_without_safetensors(upload, model, out, unet):
    """sha256 is then that of the .bin."""
    weights, pickle = model / "unet" / WEIGHTS, model / "unet" / "diffusion_pytorch_model.bin"
    torch.save(unet.state_dict(), pickle)
    weights.unlink()
    fetched = fetch_model(s3_model(upload(model), file_sha256(pickle)), out)

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{"max_shard_size": "60KB"}, {"variant": "fp16"}])
def test_shards_and_variants_in_a_bucket_are_fetched(upload, model, out, unet, options):
    """The hash covers all shards; beside one safetensors file neither is downloaded."""
    uri = upload(model, "whole")
    (model / "unet" / WEIGHTS).unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").unlink()
    unet.to(torch.float16 if options.get("variant") else torch.float32).save_pretrained(model / "unet", **options)
    paths = sorted((model / "unet").glob("*.safetensors"))
    fetched = fetch_model(s3_model(upload(model, "parts"), file_sha256(*paths)), out)
    upload(model, "whole")
    expected = {name: tensor.float() for name, tensor in unet.state_dict().items()}

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(expected)
    patterns = [f"*{STEM}*"]
    with Store(uri).downloaded(patterns, out.parent, {f"{STEM}*": WEIGHTS}) as folder:
        assert [path.name for path in (folder / "unet").iterdir()] == [WEIGHTS]


def test_images_in_a_bucket_are_packed_like_a_folder(upload, image_folder, out, tmp_path):
    """The same pixels in the same splits, subfolders and capital letters included."""
    (tmp_path / "folder").mkdir()
    fetch_data(FolderData(source="folder", path=image_folder), SHAPE, 0.2, tmp_path / "folder")
    sha256 = read_json(tmp_path / "folder" / "dataset.json")["sha256"]
    fetch_data(s3_data(upload(image_folder), sha256), SHAPE, 0.2, out)

    for name in ("train.npy", "heldout.npy"):
        assert (out / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    assert read_json(out / "dataset.json")["sha256"] == sha256
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_classes_in_a_bucket_are_packed_like_a_folder(upload, image_folder, out, tmp_path):
    """With skipped images; dataset.json differs only in the source."""
    (image_folder / "class 0" / "4.PNG").write_bytes(b"not an image")
    (tmp_path / "folder").mkdir()
    table = np.zeros((3, 1, 4), np.float32)
    rest = {"labels": True, "max_corrupt": 1}
    fetch_data(FolderData(source="folder", path=image_folder, **rest), SHAPE, 0.2, tmp_path / "folder", table=table)
    about = read_json(tmp_path / "folder" / "dataset.json")
    source = S3Data(source="s3", uri=upload(image_folder), sha256=about["sha256"], **rest)
    fetch_data(source, SHAPE, 0.2, out, table=table)

    assert about["left_out"] == ["class 0/4.PNG"]
    assert {**read_json(out / "dataset.json"), "source": about["source"]} == about
    for name in ("train_labels.npy", "heldout_labels.npy"):
        assert (out / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_whole_bucket_is_a_source(connect, image_folder, out, tmp_path):
    """An address without a prefix; images are cropped to the model's size."""
    store = connect()
    Image.new("L", (20, 12), 77).save(tmp_path / "large.png")
    store.client.upload_file(str(tmp_path / "large.png"), store.bucket, "large.png")
    store.client.upload_file(str(image_folder / "class 0" / "0.bmp"), store.bucket, "small.bmp")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.png").rename(tmp_path / "folder" / "large.png")
    (image_folder / "class 0" / "0.bmp").rename(tmp_path / "folder" / "small.bmp")
    fetch_data(FolderData(source="folder", path=tmp_path / "folder", fit="crop"), SHAPE, 0.5, tmp_path)
    source = s3_data(f"s3://{store.bucket}", read_json(tmp_path / "dataset.json")["sha256"], "crop")
    fetch_data(source, SHAPE, 0.5, out)

    assert (out / "train.npy").read_bytes() == (tmp_path / "train.npy").read_bytes()


def test_weights_with_another_hash_are_refused(upload, model, out, refused):
    """The message has both hashes and the address, not a temporary folder."""
    uri, found = upload(model), file_sha256(model / "unet" / WEIGHTS)
    message = refused(lambda: fetch_model(s3_model(uri), out))

    assert message.startswith(f"{uri}/unet/{WEIGHTS} has sha256 {found}, expected {WRONG}")
    assert "correct fetch.model.sha256" in message


def test_images_with_another_hash_are_refused(upload, image_folder, out, refused):
    """The message has both hashes and the address."""
    uri = upload(image_folder)
    message = refused(lambda: fetch_data(s3_data(uri), SHAPE, 0.2, out))

    assert message.startswith(f"the images of {uri} have sha256 ")
    assert f"expected {WRONG}; restore the images or correct fetch.data.sha256" in message


def test_an_incomplete_model_is_refused(upload, model, out, refused):
    """Its weights are missing, or its config is invalid."""
    weights = model / "unet" / WEIGHTS
    sha256 = file_sha256(weights)
    write_json(model / "unet" / "config.json", {**read_json(model / "unet" / "config.json"), "norm_num_groups": 0})
    uri = upload(model, "odd")
    message = refused(lambda: fetch_model(s3_model(uri, sha256), out))
    assert message.startswith(f"{uri}/unet")

    for file in (weights, model / "unet" / "diffusion_pytorch_model.bin"):
        file.unlink()
    uri = upload(model, "bare")
    assert f"{WEIGHTS} does not exist" in refused(lambda: fetch_model(s3_model(uri, sha256), out))


def test_a_damaged_image_is_named_by_its_address(upload, image_folder, out, refused):
    """The message has the object to replace."""
    (image_folder / "class 0" / "4.PNG").write_bytes(b"not an image")
    uri = upload(image_folder)

    assert refused(lambda: fetch_data(s3_data(uri), SHAPE, 0.2, out)).startswith(f"{uri}/class 0/4.PNG is not a")


def test_a_missing_bucket_is_refused(connect, out, refused):
    """The message has its address."""
    connect()

    assert "no-such-bucket/here: there is no such bucket" in refused(
        lambda: fetch_model(s3_model("s3://no-such-bucket/here"), out)
    )


def test_a_wrong_secret_is_refused(upload, model, out, refused, monkeypatch):
    """The message has the variable to correct, not the secret."""
    uri = upload(model)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    message = refused(lambda: fetch_model(s3_model(uri), out))

    assert "correct AWS_SECRET_ACCESS_KEY" in message
    assert "mistaken" not in message


def test_missing_credentials_are_refused(upload, model, out, refused, monkeypatch):
    """If the environment does not have them."""
    uri = upload(model)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    assert "Unable to locate credentials" in refused(lambda: fetch_model(s3_model(uri), out))


def test_a_prefix_without_usable_objects_is_refused(upload, image_folder, out, refused):
    """It has no objects, or none that fetch reads."""
    uri = upload(image_folder)
    message = refused(lambda: fetch_data(s3_data(f"{uri}-or-not"), SHAPE, 0.2, out))
    assert message == f"{uri}-or-not holds no objects; correct the address"

    message = refused(lambda: fetch_model(s3_model(uri), out))
    assert message.startswith(f"{uri} holds 42 objects, but none of README.md, model_index.json")


@pytest.mark.parametrize("key", ["../x.png", "a/../../x.png", "/x.png", "a//x.png", "a\\x.png", "a\nx.png"])
def test_keys_outside_the_folder_are_refused(connect, out, refused, monkeypatch, key):
    """The list of keys is faked, since not every client and server accepts such keys."""
    store = connect()
    monkeypatch.setattr("stages.storage.s3.Store._keys", lambda _, prefix: [prefix + "fine.png", prefix + key])
    message = refused(lambda: fetch_data(s3_data(store.uri), SHAPE, 0.2, out))

    is_odd = ".." not in key and key[0] != "/"
    reason = "is no plain path of printable names without \\" if is_odd else "leads out of the folder"
    assert message == f"an object in {store.uri}: {key!r} {reason}; rename it"
    assert not (out.parent / "x.png").exists()


def test_a_stored_key_above_the_prefix_is_refused(connect, out, refused):
    """With a real object of that key."""
    store = connect()
    store.client.put_object(Bucket=store.bucket, Key="some/prefix/../../x.png", Body=b"out")

    assert "leads out of the folder" in refused(lambda: fetch_data(s3_data(store.uri), SHAPE, 0.2, out))


def test_an_object_that_is_also_a_folder_is_refused(connect, out, refused):
    """A bucket can hold both, a file system cannot."""
    store = connect()
    for key in ("some/prefix/a.png", "some/prefix/a.png/b.png"):
        store.client.put_object(Bucket=store.bucket, Key=key, Body=b"an image")

    assert f"in {store.uri}: " in refused(lambda: fetch_data(s3_data(store.uri), SHAPE, 0.2, out))


@pytest.mark.usefixtures("two_attempts")
def test_a_connection_that_always_breaks_is_an_error(upload, model, connect, out, refused):
    """After the last attempt, with the address."""
    uri = upload(model)
    connect(lambda _: ("cut", 1000, "down"))

    assert uri in refused(lambda: fetch_model(s3_model(uri), out))


def test_a_connection_that_sometimes_breaks_is_retried(upload, image_folder, connect, out):
    """Every third connection is closed at once."""
    (out.parent / "folder").mkdir()
    fetch_data(FolderData(source="folder", path=image_folder), SHAPE, 0.2, out.parent / "folder")
    sha256 = read_json(out.parent / "folder" / "dataset.json")["sha256"]
    uri = upload(image_folder)
    connect(lambda n: ("cut", 0, "down") if n % 3 == 0 else None)
    fetch_data(s3_data(uri, sha256), SHAPE, 0.2, out)

    assert (out / "train.npy").read_bytes() == (out.parent / "folder" / "train.npy").read_bytes()


def test_a_garbled_transfer_is_refused(upload, model, connect, out, refused):
    """One flipped bit of the weights changes their hash."""
    uri, sha256 = upload(model), file_sha256(model / "unet" / WEIGHTS)
    connect(lambda _: ("garble", 50_000, "down"))

    assert f"expected {sha256}" in refused(lambda: fetch_model(s3_model(uri, sha256), out))


@pytest.mark.e2e
@pytest.mark.usefixtures("two_attempts")
def test_a_server_killed_in_the_middle_leaves_nothing(upload, image_folder, connect, swift, out, refused):
    """A one-line error; once the server runs again, the images are downloaded and their hash is checked."""
    uri = upload(image_folder)
    connect(lambda _: ("slow", 0.1, "down"))
    timer = threading.Timer(0.5, swift.kill)
    timer.start()
    try:
        assert "have sha256" not in refused(lambda: fetch_data(s3_data(uri), SHAPE, 0.2, out))
    finally:
        timer.join()
        swift.start()

    connect()
    assert f"the images of {uri} have sha256" in refused(lambda: fetch_data(s3_data(uri), SHAPE, 0.2, out))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("model: {source: s3, uri: 'bucket/x', sha256: %s}", "is 'bucket/x': give s3://BUCKET or s3://BUCKET/PREFIX"),
        ("model: {source: s3, uri: 's3://B/x', sha256: %s}", "is 's3://B/x': give s3://BUCKET or s3://BUCKET/PREFIX"),
        ("model: {source: s3, uri: 's3://bucket/x'}", "sha256: field required"),
        ("data: {source: s3, uri: 's3://bucket/x', sha256: null}", "sha256 is None"),
        ("data: {source: s3, uri: 's3://bucket/x', sha256: %s, fit: squeeze}", "fit is 'squeeze'"),
        ("data: {source: s3, path: x, sha256: %s}", "path is not a known key"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_runs(root, tmp_path, block, message):
    """The address and the hash are checked when params.yaml is read, in one line."""
    name = block.split(":")[0]
    old = f"{name}: {{source: bundled, name: digits}}"
    text = (root / "params.yaml").read_text()
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, block.replace("%s", WRONG)))

    with pytest.raises(InputError) as caught:
        load_params(tmp_path / "params.yaml")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.e2e
def test_the_stage_fetches_both_from_a_bucket(upload, root, tmp_path, out, content):
    """Run as DVC runs it; run.json has the sources and no secret."""
    uri = upload(root / "stages" / "fetch" / "bundled" / "digits", "digits")
    sha256 = file_sha256(root / "stages" / "fetch" / "bundled" / "digits" / "unet" / WEIGHTS)
    text = (root / "params.yaml").read_text()
    source = f"model: {{source: s3, uri: '{uri}', sha256: {sha256}}}"
    (tmp_path / "params.yaml").write_text(text.replace("model: {source: bundled, name: digits}", source))
    command = [sys.executable, "-m", "stages.fetch", "--params", str(tmp_path / "params.yaml")]
    places = ["--model-out", str(out / "model"), "--data-out", str(out / "data")]
    subprocess.run([*command, *places], cwd=root, capture_output=True, text=True, check=True)

    assert file_sha256(out / "model" / "unet" / WEIGHTS) == sha256
    assert read_json(out / "model" / "run.json")["params"]["fetch"]["model"]["uri"] == uri
    assert not [path for path, text in content(out / "model").items() if SECRET.encode() in text]
    assert sorted(path.name for path in out.iterdir()) == ["data", "model", "model.provenance.json"]
