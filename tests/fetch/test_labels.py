"""Image sources with classes, .npz files, and latents."""

import io
import os
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from stages.data.images import read_images
from stages.fetch import data
from stages.fetch.data import fetch_data
from stages.fetch.params import FolderData, HubData, NpzData
from stages.fetch.split import split
from stages.runtime.errors import InputError
from stages.storage.files import read_json

SHAPE = (1, 8)
TABLE = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
"""Conditions of three classes, and the unconditional one."""


@pytest.fixture
def out(tmp_path):
    """An empty output folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def folder(tmp_path):
    """Twelve images in three classes; the grey level of an image encodes its class."""
    for number, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), number * 20 + index).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def from_folder(path, **rest):
    """The params of a folder source with classes."""
    return FolderData(source="folder", path=path, labels=True, **rest)


@pytest.fixture
def arrays():
    """Ten images whose grey levels encode their classes, and four held-out ones."""
    labels = {"y": np.arange(10) % 3, "y_test": np.arange(4, dtype=np.uint8) % 3}
    images = {name: np.repeat(labels[y], 64).reshape(-1, 8, 8) * 20 for name, y in (("x", "y"), ("x_test", "y_test"))}
    return {**labels, **{name: part.astype(np.uint8) for name, part in images.items()}}


@pytest.fixture
def from_npz(tmp_path, arrays):
    """Write an .npz file, with some arrays replaced, and return the params of the source."""

    def make(changes=None, **keys):
        np.savez_compressed(tmp_path / "arrays.npz", **{**arrays, **(changes or {})})
        return NpzData(source="npz", path=tmp_path / "arrays.npz", **{"images": "x", **keys})

    return make


def assert_labels_fit(out):
    """Each image has the class that its grey level encodes, in both splits."""
    images = read_images(out)
    for name in ("train", "heldout"):
        found = getattr(images, name)[:, 0, 0, 0] // 20
        assert np.array_equal(getattr(images.conditions, name), found)
    assert np.array_equal(images.conditions.table, TABLE)


def test_folders_are_classes(folder, out):
    """Subfolders belong to their class, dataset.json has the names, and a skipped image loses its label, too."""
    (folder / "ant" / "more").mkdir()
    (folder / "ant" / "3.png").rename(folder / "ant" / "more" / "3.png")
    (folder / "bee" / "0.png").write_bytes(b"not an image")
    fetch_data(from_folder(folder, max_corrupt=1), SHAPE, 0.5, out, table=TABLE)

    assert_labels_fit(out)
    assert read_json(out / "dataset.json")["classes"] == ["ant", "bee", "cat"]
    assert sum(len(part) for part in (read_images(out).train, read_images(out).heldout)) == 11


def test_names_that_are_not_utf8_are_escaped(folder, out):
    """In dataset.json, which later stages read; file systems hold any bytes."""
    (folder / "ant").rename(folder / os.fsdecode(b"caf\xe9"))
    (folder / "bee" / "0.png").rename(folder / "bee" / os.fsdecode(b"\xe9.png"))
    (folder / "bee" / os.fsdecode(b"\xe9.png")).write_bytes(b"not an image")
    fetch_data(from_folder(folder, max_corrupt=1), SHAPE, 0.5, out, table=TABLE)

    about = read_json(out / "dataset.json")
    assert about["classes"] == ["bee", "caf\\xe9", "cat"]
    assert about["left_out"] == ["bee/\\xe9.png"]


def test_an_image_outside_all_class_folders_is_refused(folder, out):
    """The message has its name."""
    Image.new("L", (8, 8)).save(folder / "loose.png")

    with pytest.raises(InputError, match=r"loose\.png is in no class folder; move it into one"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE)


def test_model_and_classes_must_fit(folder, out):
    """A conditional model needs as many classes as it has, an unconditional one needs a source without."""
    with pytest.raises(InputError, match=r"fetch\.data\.labels is set, but the model is unconditional; remove it"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out)
    with pytest.raises(InputError, match=r"has no classes, but the model has 3; set fetch\.data\.labels"):
        fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out, table=TABLE)
    with pytest.raises(InputError, match="has an image of class 2; the model has classes 0 to 1"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE[:3])
    with pytest.raises(
        InputError, match="has 3 classes, the model 7; classes are numbered in order, so provide all of them"
    ):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=np.concatenate([TABLE, TABLE]))
    (folder / "bat").mkdir()
    with pytest.raises(InputError, match="images/bat has no images, but each folder is a class; remove it"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE)
    assert not list(out.iterdir())


def test_classes_are_read_from_a_hub_column(folder, out, tmp_path, monkeypatch):
    """With their names; the datasets library makes the column from the folders."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    source = HubData(source="hub", repo=str(folder), revision="0" * 40, column="image", labels="label")
    fetch_data(source, SHAPE, 0.5, out, table=TABLE)

    assert_labels_fit(out)
    assert read_json(out / "dataset.json")["classes"] == ["ant", "bee", "cat"]
    with pytest.raises(InputError, match="has no integer column 'image'; its columns: image, label"):
        fetch_data(source.model_copy(update={"labels": "image"}), SHAPE, 0.5, out, table=TABLE)


def test_npz_arrays_are_packed(from_npz, out, arrays):
    """They are split like other images, and their hash is checked."""
    fetch_data(from_npz(labels="y"), SHAPE, 0.2, out, table=TABLE)
    sha256, found = read_json(out / "dataset.json")["sha256"], read_images(out)

    assert_labels_fit(out)
    assert np.array_equal(found.train, split(arrays["x"][:, None], 0.2).train)
    fetch_data(from_npz(sha256=sha256), SHAPE, 0.2, out)
    with pytest.raises(InputError, match=r"arrays\.npz have sha256"):
        fetch_data(from_npz(sha256="0" * 64), SHAPE, 0.2, out)


def test_npz_held_out_images_replace_the_share(from_npz, out, arrays):
    """Both splits keep their order."""
    keys = {"heldout_images": "x_test", "labels": "y", "heldout_labels": "y_test"}
    fetch_data(from_npz(**keys), SHAPE, 0.2, out, table=TABLE)
    found = read_images(out)

    assert np.array_equal(found.train, arrays["x"][:, None])
    assert np.array_equal(found.heldout, arrays["x_test"][:, None])
    assert np.array_equal(found.conditions.train, arrays["y"])
    assert_labels_fit(out)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_channels_are_converted(from_npz, out, channels):
    """One or three channels, stored last, become the model's channels, first."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), np.uint8)
    fetch_data(from_npz({"x": pixels[:2], "x_test": pixels[2:]}, heldout_images="x_test"), (3, 8), 0.5, out)

    expected = np.broadcast_to(pixels, (4, 8, 8, 3)).transpose(0, 3, 1, 2)
    assert np.array_equal(read_images(out).train, expected[:2])
    assert np.array_equal(read_images(out).heldout, expected[2:])


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({}, {"images": "images"}, r"arrays\.npz has no array 'images'; its keys: y, y_test, x, x_test"),
        ({"x": np.zeros((2, 8, 8))}, {}, r"holds float64 \[2, 8, 8\] as x; expected uint8"),
        ({"x": np.zeros((2, 64), np.uint8)}, {}, r"holds uint8 \[2, 64\] as x"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, {}, r"holds uint8 \[0, 8, 8\] as x"),
        ({"x": np.zeros((2, 8, 8, 4), np.uint8)}, {}, r"holds uint8 \[2, 8, 8, 4\] as x"),
        ({"y": np.zeros(10)}, {"labels": "y"}, r"holds float64 \[10\] as y; expected one integer for each of the 10"),
        ({"y": np.zeros(9, int)}, {"labels": "y"}, r"holds int64 \[9\] as y"),
        ({"x": np.array([{}])}, {}, "is not a readable .npz file"),
        ({"x": np.zeros((2, 9, 8), np.uint8)}, {}, r"arrays\.npz/x\[0\] is 8×9, the model expects 8×8"),
    ],
)
def test_other_arrays_are_refused(from_npz, out, changes, keys, message):
    """The message has dtype and shape, or the keys of the file; objects are never unpickled."""
    with pytest.raises(InputError, match=message):
        fetch_data(from_npz(changes, **keys), SHAPE, 0.2, out)
    assert not list(out.iterdir())


def test_a_damaged_npz_file_is_refused(from_npz, tmp_path, out):
    """Truncated or missing."""
    source = from_npz()
    whole = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"arrays\.npz is not a readable \.npz file"):
        fetch_data(source, SHAPE, 0.2, out)
    (tmp_path / "arrays.npz").unlink()
    with pytest.raises(InputError, match=r"arrays\.npz is not a readable \.npz file"):
        fetch_data(source, SHAPE, 0.2, out)


def test_a_damaged_npz_file_of_another_compression_is_refused(tmp_path, out):
    """NumPy reads every method of zip, and LZMA has an error of its own."""
    path = tmp_path / "arrays.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        np.save(file := io.BytesIO(), np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8))
        archive.writestr("images.npy", file.getvalue())
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"arrays\.npz is not a readable \.npz file"):
        fetch_data(NpzData(source="npz", path=path, images="images"), SHAPE, 0.2, out)


def test_labels_of_only_one_split_are_refused():
    """When params.yaml is read."""
    for keys in (
        {"labels": "y", "heldout_images": "x"},
        {"heldout_labels": "y"},
        {"labels": "y", "heldout_labels": "z"},
    ):
        with pytest.raises(ValidationError, match="give all three or leave them out"):
            NpzData(source="npz", path="arrays.npz", **keys)


def halve(pixels):
    """A fake encoder: four channels of half the size, whose values are the image's grey level."""
    assert pixels.dtype == np.uint8
    return np.repeat(pixels[:, :, ::2, ::2] / 255, 4, axis=1).astype(np.float16)


def test_latents_are_packed_with_their_images(folder, out, monkeypatch):
    """In batches; pixels.npy has the training images in the order of their latents."""
    monkeypatch.setattr(data, "ENCODE_BATCH_SIZE", 4)
    fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE, encode=halve)
    found = read_images(out)

    assert found.train.dtype == np.float16
    assert found.train.shape == found.heldout.shape == (6, 4, 4, 4)
    assert isinstance(found.pixels, np.memmap)
    assert np.array_equal(found.train, halve(found.pixels))
    assert np.array_equal(found.conditions.train, found.pixels[:, 0, 0, 0] // 20)


def test_packed_pixels_are_stored_once(folder, out):
    """For a model of pixels, the training images are also the reference images."""
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out)
    found = read_images(out)

    assert found.pixels is found.train
    assert not (out / "pixels.npy").exists()


def test_images_of_other_latents_are_refused(folder, out):
    """Their number differs, or they are missing; FID needs them."""
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out, encode=halve)
    np.save(out / "pixels.npy", np.zeros((5, 1, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"pixels\.npy must hold the 6 images whose latents are in train\.npy"):
        read_images(out)
    (out / "pixels.npy").unlink()
    with pytest.raises(InputError, match=r"No such file or directory.*pixels\.npy.*; run the fetch stage again"):
        read_images(out)
