"""Data sources."""

import datasets
import numpy as np
import pytest
from PIL import Image

from stages.artifacts import read_json
from stages.errors import InputError
from stages.fetch.data import bundled_digits, fetch_data, split
from stages.packed import read_images
from stages.sources import BundledSource, FolderData, HubData

SHAPE = (1, 8)


@pytest.fixture
def folder(tmp_path):
    """Ten 8×8 pictures in two subfolders, each of one grey level, and a file that is none."""
    for index in range(10):
        home = tmp_path / "pictures" / f"class{index % 2}"
        home.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index * 20,) * 3).save(home / f"{index}.png")
    (tmp_path / "pictures" / "readme.txt").touch()
    return tmp_path / "pictures"


def test_the_digits_are_all_there():
    """1,797 real images, shown at 16×16, using the whole range of grey."""
    digits = bundled_digits()

    assert digits.shape == (1797, 1, 16, 16)
    assert (digits.min(), digits.max()) == (0, 255)


def test_the_split_is_a_partition_that_never_moves():
    """Every image is in exactly one split, and the same ones are held out each time."""
    pixels = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    parts = split(pixels, 0.2)

    assert sorted([*parts.train.ravel(), *parts.heldout.ravel()]) == list(range(50))
    assert len(parts.heldout) == 10
    assert np.array_equal(parts.heldout, split(pixels, 0.2).heldout)


def test_a_split_that_leaves_nothing_is_refused():
    """Of two images 20 % are none."""
    with pytest.raises(InputError, match=r"fetch\.heldout 0\.2 of 2 images leaves a split empty"):
        split(np.zeros((2, 1, 1, 1), np.uint8), 0.2)


def test_a_folder_is_packed(folder, tmp_path):
    """All pictures of all subfolders, in the channels of the model, and their hash."""
    (tmp_path / "out").mkdir()
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.2, tmp_path / "out")

    images = read_images(tmp_path / "out")
    levels = sorted(image[0, 0, 0] for image in [*images.train, *images.heldout])
    assert levels == [index * 20 for index in range(10)]
    sha256 = read_json(tmp_path / "out" / "dataset.json")["sha256"]
    fetch_data(FolderData(source="folder", path=folder, sha256=sha256), SHAPE, 0.2, tmp_path / "out")
    with pytest.raises(InputError, match="have sha256"):
        fetch_data(FolderData(source="folder", path=folder, sha256="0" * 64), SHAPE, 0.2, tmp_path / "out")


def test_a_dataset_of_the_hub_is_packed(folder, tmp_path):
    """Read by the datasets library, here from a folder that it takes for a repository."""
    source = HubData(source="hub", repo=str(folder), revision="0" * 40, column="image")
    fetch_data(source, SHAPE, 0.2, tmp_path)

    assert len(read_images(tmp_path).train) == 8
    with pytest.raises(InputError, match="has no image column 'label'; its columns: image, label"):
        fetch_data(source.model_copy(update={"column": "label"}), SHAPE, 0.2, tmp_path)


def test_images_of_the_wrong_size_are_refused_or_cropped(folder, tmp_path):
    """Which one it is, and how to have it resized."""
    with pytest.raises(
        InputError, match=r"0\.png is 8×8, the model draws 16×16; resize it or set fetch\.data\.fit: crop"
    ):
        fetch_data(FolderData(source="folder", path=folder), (1, 16), 0.2, tmp_path)

    fetch_data(FolderData(source="folder", path=folder, fit="crop"), (1, 16), 0.2, tmp_path)
    assert read_images(tmp_path).train.shape == (8, 1, 16, 16)


def test_a_folder_without_images_is_refused(tmp_path):
    """As is one that does not exist."""
    with pytest.raises(InputError, match="no images found"):
        fetch_data(FolderData(source="folder", path=tmp_path), SHAPE, 0.2, tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        fetch_data(FolderData(source="folder", path=tmp_path / "nowhere"), SHAPE, 0.2, tmp_path)


def test_a_damaged_image_is_named(folder, tmp_path):
    """Also when it is damaged behind its header."""
    victim = folder / "class0" / "4.png"
    victim.write_bytes(victim.read_bytes()[:-24])

    with pytest.raises(InputError, match=r"4\.png is not a readable image"):
        fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.2, tmp_path)


def test_images_of_more_than_eight_bits_are_refused(tmp_path):
    """Pillow would turn them white without a word."""
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep" / "a.png")

    with pytest.raises(InputError, match=r"a\.png has more than 8 bits a channel"):
        fetch_data(FolderData(source="folder", path=tmp_path / "deep"), SHAPE, 0.2, tmp_path)


def test_the_digits_do_not_go_into_another_model(tmp_path):
    """Which is of another size."""
    with pytest.raises(InputError, match="the digits are 1×16×16, the model draws 1×8×8"):
        fetch_data(BundledSource(source="bundled", name="digits"), SHAPE, 0.2, tmp_path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The datasets library keeps its cache out of the home folder and shows no bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
