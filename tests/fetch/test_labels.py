"""Data sources that give classes, arrays in .npz files, and latents."""

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from stages.data.images import read_images
from stages.fetch import data
from stages.fetch.data import fetch_data
from stages.fetch.params import FolderData, HubData, NpzData
from stages.runtime.errors import InputError
from stages.storage.files import read_json

SHAPE = (1, 8)
TABLE = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
"""Of three classes and none."""


@pytest.fixture
def out(tmp_path):
    """An empty folder for what is packed."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in three classes; the grey level of each tells its class."""
    for number, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), number * 20 + index).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def from_folder(path, **rest):
    """A folder of classes as a source."""
    return FolderData(source="folder", path=path, labels=True, **rest)


@pytest.fixture
def arrays():
    """What an .npz file may hold: ten images whose grey levels tell their classes, and four to hold out."""
    labels = {"y": np.arange(10) % 3, "y_test": np.arange(4, dtype=np.uint8) % 3}
    images = {name: np.repeat(labels[y], 64).reshape(-1, 8, 8) * 20 for name, y in (("x", "y"), ("x_test", "y_test"))}
    return {**labels, **{name: part.astype(np.uint8) for name, part in images.items()}}


@pytest.fixture
def from_npz(tmp_path, arrays):
    """Write an .npz file, with other arrays in place of some, and give it as a source."""

    def make(changes=None, **keys):
        np.savez_compressed(tmp_path / "arrays.npz", **{**arrays, **(changes or {})})
        return NpzData(source="npz", path=tmp_path / "arrays.npz", **{"images": "x", **keys})

    return make


def assert_labels_fit(out):
    """Each picture has the class that its grey level tells, in both splits."""
    images = read_images(out)
    for split in ("train", "heldout"):
        found = getattr(images, split)[:, 0, 0, 0] // 20
        assert np.array_equal(getattr(images.conditions, split), found)
    assert np.array_equal(images.conditions.table, TABLE)


def test_folders_are_classes(folder, out):
    """With all below, numbered by their names, which dataset.json keeps; a corrupt picture takes its class along."""
    (folder / "ant" / "more").mkdir()
    (folder / "ant" / "3.png").rename(folder / "ant" / "more" / "3.png")
    (folder / "bee" / "0.png").write_bytes(b"no picture")
    fetch_data(from_folder(folder, max_corrupt=1), SHAPE, 0.5, out, table=TABLE)

    assert_labels_fit(out)
    assert read_json(out / "dataset.json")["classes"] == ["ant", "bee", "cat"]
    assert sum(len(part) for part in (read_images(out).train, read_images(out).heldout)) == 11


def test_a_picture_outside_of_all_classes_is_refused(folder, out):
    """By name."""
    Image.new("L", (8, 8)).save(folder / "loose.png")

    with pytest.raises(InputError, match=r"loose\.png lies in no class; give each class a folder"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE)


def test_model_and_classes_must_fit(folder, out):
    """One that is told a class wants them, another wants none, and there must be enough of them."""
    with pytest.raises(InputError, match="gives classes and the model takes none; remove it"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out)
    with pytest.raises(InputError, match=r"gives no classes and the model takes one of 3 .*; set fetch\.data\.labels"):
        fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out, table=TABLE)
    with pytest.raises(InputError, match="gives the class 2, the model takes 0 to 1"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE[:3])
    with pytest.raises(InputError, match="has 3 classes, the model 7; they are numbered in order, so give all of them"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=np.concatenate([TABLE, TABLE]))
    (folder / "bat").mkdir()
    with pytest.raises(InputError, match="pictures/bat holds no images, though each folder is a class; remove it"):
        fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE)
    assert not list(out.iterdir())


def test_a_column_of_the_hub_gives_classes(folder, out, tmp_path, monkeypatch):
    """With their names; here the datasets library makes the column from the folders."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    source = HubData(source="hub", repo=str(folder), revision="0" * 40, column="image", labels="label")
    fetch_data(source, SHAPE, 0.5, out, table=TABLE)

    assert_labels_fit(out)
    assert read_json(out / "dataset.json")["classes"] == ["ant", "bee", "cat"]
    with pytest.raises(InputError, match="has no integer column 'image'; its columns: image, label"):
        fetch_data(source.model_copy(update={"labels": "image"}), SHAPE, 0.5, out, table=TABLE)


def test_arrays_are_packed(from_npz, out, arrays):
    """Split like any other images, and compared with their hash."""
    fetch_data(from_npz(labels="y"), SHAPE, 0.2, out, table=TABLE)
    sha256, found = read_json(out / "dataset.json")["sha256"], read_images(out)

    assert_labels_fit(out)
    assert np.array_equal(found.train, data.split(arrays["x"][:, None], 0.2).train)
    fetch_data(from_npz(sha256=sha256), SHAPE, 0.2, out)
    with pytest.raises(InputError, match=r"arrays\.npz have sha256"):
        fetch_data(from_npz(sha256="0" * 64), SHAPE, 0.2, out)


def test_arrays_bring_what_is_held_out(from_npz, out, arrays):
    """In place of a share, each in its order."""
    keys = {"heldout_images": "x_test", "labels": "y", "heldout_labels": "y_test"}
    fetch_data(from_npz(**keys), SHAPE, 0.2, out, table=TABLE)
    found = read_images(out)

    assert np.array_equal(found.train, arrays["x"][:, None])
    assert np.array_equal(found.heldout, arrays["x_test"][:, None])
    assert np.array_equal(found.conditions.train, arrays["y"])
    assert_labels_fit(out)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_have_their_channels_last(from_npz, out, channels):
    """One or three of them, brought to those of the model."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), np.uint8)
    fetch_data(from_npz({"x": pixels[:2], "x_test": pixels[2:]}, heldout_images="x_test"), (3, 8), 0.5, out)

    expected = np.broadcast_to(pixels, (4, 8, 8, 3)).transpose(0, 3, 1, 2)
    assert np.array_equal(read_images(out).train, expected[:2])
    assert np.array_equal(read_images(out).heldout, expected[2:])


@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        ({}, {"images": "images"}, r"arrays\.npz holds no array 'images'; its keys: y, y_test, x, x_test"),
        ({"x": np.zeros((2, 8, 8))}, {}, r"holds float64 \[2, 8, 8\] as x; wanted are uint8"),
        ({"x": np.zeros((2, 64), np.uint8)}, {}, r"holds uint8 \[2, 64\] as x"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, {}, r"holds uint8 \[0, 8, 8\] as x"),
        ({"x": np.zeros((2, 8, 8, 4), np.uint8)}, {}, r"holds uint8 \[2, 8, 8, 4\] as x"),
        ({"y": np.zeros(10)}, {"labels": "y"}, r"holds float64 \[10\] as y; wanted is one integer for each of the 10"),
        ({"y": np.zeros(9, int)}, {"labels": "y"}, r"holds int64 \[9\] as y"),
        ({"x": np.array([{}])}, {}, "is no readable .npz file"),
        ({"x": np.zeros((2, 9, 8), np.uint8)}, {}, r"arrays\.npz/x\[0\] is 8×9, the model draws 8×8"),
    ],
)
def test_other_arrays_are_refused(from_npz, out, changes, keys, words):
    """By their type and shape, or by the keys that there are; objects are never unpickled."""
    with pytest.raises(InputError, match=words):
        fetch_data(from_npz(changes, **keys), SHAPE, 0.2, out)
    assert not list(out.iterdir())


def test_what_is_no_npz_is_refused(from_npz, tmp_path, out):
    """Nothing at all, or cut short."""
    source = from_npz()
    whole = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"arrays\.npz is no readable \.npz file"):
        fetch_data(source, SHAPE, 0.2, out)
    (tmp_path / "arrays.npz").unlink()
    with pytest.raises(InputError, match=r"arrays\.npz is no readable \.npz file"):
        fetch_data(source, SHAPE, 0.2, out)


def test_labels_of_one_split_alone_are_refused():
    """As params.yaml is read."""
    for keys in (
        {"labels": "y", "heldout_images": "x"},
        {"heldout_labels": "y"},
        {"labels": "y", "heldout_labels": "z"},
    ):
        with pytest.raises(ValidationError, match="give all three or leave them out"):
            NpzData(source="npz", path="arrays.npz", **keys)


def halve(pixels):
    """Stand in for an encoder: four channels of half the size, which tell the picture's grey level."""
    assert pixels.dtype == np.uint8
    return np.repeat(pixels[:, :, ::2, ::2] / 255, 4, axis=1).astype(np.float16)


def test_latents_are_packed_with_their_images(folder, out, monkeypatch):
    """In batches, each beside the training image that it is the latent of."""
    monkeypatch.setattr(data, "ENCODED_AT_ONCE", 4)
    fetch_data(from_folder(folder), SHAPE, 0.5, out, table=TABLE, encode=halve)
    found = read_images(out)

    assert found.train.dtype == np.float16
    assert found.train.shape == found.heldout.shape == (6, 4, 4, 4)
    assert isinstance(found.pixels, np.memmap)
    assert np.array_equal(found.train, halve(found.pixels))
    assert np.array_equal(found.conditions.train, found.pixels[:, 0, 0, 0] // 20)


def test_of_pixels_the_training_images_are_the_real_ones(folder, out):
    """Nothing is stored twice."""
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out)
    found = read_images(out)

    assert found.pixels is found.train
    assert not (out / "pixels.npy").exists()


def test_images_of_other_latents_are_refused(folder, out):
    """Another number of them, or none: FID is taken against them."""
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.5, out, encode=halve)
    np.save(out / "pixels.npy", np.zeros((5, 1, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"pixels\.npy must hold the 6 images whose latents are in train\.npy"):
        read_images(out)
    (out / "pixels.npy").unlink()
    with pytest.raises(InputError, match=r"No such file or directory.*pixels\.npy.*; run the fetch stage again"):
        read_images(out)
