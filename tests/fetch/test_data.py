"""Image sources: packing, splitting, and what is refused."""

import hashlib
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from stages.data.images import read_images
from stages.fetch import data
from stages.fetch.data import bundled_digits, fetch_data
from stages.fetch.params import BundledData, FolderData, HubData, NpzData
from stages.fetch.source_images import open_npz
from stages.fetch.split import split
from stages.runtime.errors import InputError
from stages.storage.files import read_json

SHAPE = (1, 8)


@pytest.fixture
def out(tmp_path):
    """An empty output folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def from_folder(path, **rest):
    """The params of a folder source."""
    return FolderData(source="folder", path=path, **rest)


@pytest.fixture
def folder(tmp_path):
    """Ten uniformly grey 8×8 images in two subfolders, and a file that is not an image."""
    for index in range(10):
        subfolder = tmp_path / "images" / f"class{index % 2}"
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index * 20,) * 3).save(subfolder / f"{index}.png")
    (tmp_path / "images" / "readme.txt").touch()
    return tmp_path / "images"


def test_the_bundled_digits_are_complete():
    """1,797 images, 16×16, with grey levels from 0 to 255."""
    digits = bundled_digits()

    assert digits.shape == (1797, 1, 16, 16)
    assert (digits.min(), digits.max()) == (0, 255)


def test_the_split_is_a_fixed_partition():
    """Every image is in exactly one split, and the split is the same each time."""
    pixels = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    parts = split(pixels, 0.2)

    assert sorted([*parts.train.ravel(), *parts.heldout.ravel()]) == list(range(50))
    assert len(parts.heldout) == 10
    assert np.array_equal(parts.heldout, split(pixels, 0.2).heldout)


def test_an_empty_split_is_refused():
    """20 % of two images rounds to none."""
    with pytest.raises(InputError, match=r"fetch\.heldout 0\.2 of 2 images leaves a split empty"):
        split(np.zeros((2, 1, 1, 1), np.uint8), 0.2)


def test_a_folder_is_packed(folder, tmp_path):
    """All images of all subfolders, with the model's channels; the hash is recorded and checked."""
    (tmp_path / "out").mkdir()
    fetch_data(FolderData(source="folder", path=folder), SHAPE, 0.2, tmp_path / "out")

    images = read_images(tmp_path / "out")
    levels = sorted(image[0, 0, 0] for image in [*images.train, *images.heldout])
    assert levels == [index * 20 for index in range(10)]
    sha256 = read_json(tmp_path / "out" / "dataset.json")["sha256"]
    fetch_data(FolderData(source="folder", path=folder, sha256=sha256), SHAPE, 0.2, tmp_path / "out")
    with pytest.raises(InputError, match="have sha256"):
        fetch_data(FolderData(source="folder", path=folder, sha256="0" * 64), SHAPE, 0.2, tmp_path / "out")


def test_a_hub_dataset_is_packed(folder, tmp_path):
    """The datasets library reads a local folder like a repository."""
    source = HubData(source="hub", repo=str(folder), revision="0" * 40, column="image")
    fetch_data(source, SHAPE, 0.2, tmp_path)

    assert len(read_images(tmp_path).train) == 8
    with pytest.raises(InputError, match="has no image column 'label'; its columns: image, label"):
        fetch_data(source.model_copy(update={"column": "label"}), SHAPE, 0.2, tmp_path)


def test_images_of_the_wrong_size_are_refused_or_cropped(folder, tmp_path):
    """The message names the image and the option that resizes it."""
    with pytest.raises(
        InputError, match=r"0\.png is 8×8, the model expects 16×16; resize it or set fetch\.data\.fit: crop"
    ):
        fetch_data(FolderData(source="folder", path=folder), (1, 16), 0.2, tmp_path)

    fetch_data(FolderData(source="folder", path=folder, fit="crop"), (1, 16), 0.2, tmp_path)
    assert read_images(tmp_path).train.shape == (8, 1, 16, 16)


def test_a_folder_without_images_is_refused(tmp_path):
    """So is a folder that does not exist."""
    with pytest.raises(InputError, match="no images found"):
        fetch_data(FolderData(source="folder", path=tmp_path), SHAPE, 0.2, tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        fetch_data(FolderData(source="folder", path=tmp_path / "nowhere"), SHAPE, 0.2, tmp_path)


@pytest.fixture
def damage(folder):
    """Truncate some images behind their headers."""

    def cut(*names):
        for name in names:
            path = folder / name
            path.write_bytes(path.read_bytes()[:-24])

    return cut


def test_a_damaged_image_is_named(folder, damage, out):
    """Also if only its pixels are damaged; the output stays empty."""
    damage("class0/4.png")

    with pytest.raises(InputError, match=r"^\S+class0/4\.png is not a readable image .*: 1 of the first 3 images are"):
        fetch_data(from_folder(folder), SHAPE, 0.2, out)
    assert not list(out.iterdir())


def test_images_of_more_than_eight_bits_are_refused(tmp_path, out):
    """Pillow would clip them to white without a warning."""
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep" / "a.png")

    with pytest.raises(InputError, match=r"a\.png has more than 8 bits per channel"):
        fetch_data(from_folder(tmp_path / "deep"), SHAPE, 0.2, out)


def test_a_few_damaged_images_are_left_out(folder, damage, out, capsys):
    """dataset.json and stderr name them; the rest is packed as if they did not exist."""
    damage("class0/4.png", "class1/3.png")
    fetch_data(from_folder(folder, max_corrupt=2), SHAPE, 0.2, out)
    found, about = read_images(out), read_json(out / "dataset.json")
    warning = capsys.readouterr().err

    assert about["left_out"] == ["class0/4.png", "class1/3.png"]
    assert "Warning: 2 of 10 images are corrupt and left out\n" in warning
    for name in about["left_out"]:
        assert f"{name} is not a readable image" in warning
        (folder / name).unlink()
    fetch_data(from_folder(folder), SHAPE, 0.2, out)
    assert read_json(out / "dataset.json")["sha256"] == about["sha256"]
    assert np.array_equal(read_images(out).train, found.train)


def test_more_damaged_images_than_allowed_are_refused(folder, damage, out):
    """The message has the first few, the count and the limit."""
    damage("class0/0.png", "class0/2.png", "class0/4.png", "class0/6.png", "class0/8.png")

    with pytest.raises(InputError, match=r"0\.png .*2\.png .*: 2 of the first 2 .*max_corrupt allows 1; replace"):
        fetch_data(from_folder(folder, max_corrupt=1), SHAPE, 0.2, out)
    with pytest.raises(
        InputError, match=r"4\.png [^;]*; …: 5 of the first 5 .*max_corrupt allows 4; replace"
    ) as caught:
        fetch_data(from_folder(folder, max_corrupt=4), SHAPE, 0.2, out)
    assert "6.png" not in caught.value.message
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"none of the 10 images in .* is readable; "):
        fetch_data(from_folder(folder, max_corrupt=10), SHAPE, 0.2, out)


def test_streaming_gives_the_files_and_hash_of_the_whole_array(tmp_path, out, monkeypatch):
    """Over several blocks, of which the last is smaller."""
    monkeypatch.setattr(data, "BLOCK_SIZE", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), np.uint8)
    (tmp_path / "noise").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "noise" / f"{index:02}.png")
    fetch_data(from_folder(tmp_path / "noise"), (3, 8), 0.3, out)

    for name, whole in vars(split(pixels, 0.3)).items():
        if whole is not None:
            np.save(tmp_path / "whole.npy", whole)
            assert (out / f"{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert read_json(out / "dataset.json")["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()


PACK = """
import sys, tracemalloc
from pathlib import Path
from stages.fetch import data
from stages.fetch.params import FolderData

data.BLOCK_SIZE = 16
few, many, first, out = map(Path, sys.argv[1:])
data.fetch_data(FolderData(source="folder", path=few), (1, 128), 0.5, first)  # imports what is imported when first used
tracemalloc.start()
data.fetch_data(FolderData(source="folder", path=many), (1, 128), 0.3, out)
print(tracemalloc.get_traced_memory()[1])
"""


def test_the_images_are_never_all_in_memory(tmp_path, root):
    """Packing 8 MB takes less than 2 MB, in a process without the threads that other tests left."""
    folders = {name: tmp_path / name for name in ("few", "many", "first", "out")}
    for folder in folders.values():
        folder.mkdir()
    for index in range(500):
        Image.new("L", (128, 128), index % 256).save(folders["many"] / f"{index:03}.bmp")
    for index in range(2):
        shutil.copyfile(folders["many"] / f"{index:03}.bmp", folders["few"] / f"{index}.bmp")
    command = [sys.executable, "-c", PACK, *map(str, folders.values())]
    peak = int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)

    assert read_images(folders["out"]).train.nbytes > 5e6
    assert peak < 2e6


def test_the_face_of_celeba_is_cropped(tmp_path, out):
    """128×128 pixels at column 25 and row 57, as in DDIM; images of another size are refused."""
    (tmp_path / "faces").mkdir()
    photograph = np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8)
    for index in range(2):
        Image.fromarray(photograph).save(tmp_path / "faces" / f"{index}.png")
    fetch_data(from_folder(tmp_path / "faces", fit="celeba"), (3, 128), 0.5, out)

    assert np.array_equal(read_images(out).train[0], photograph[57:185, 25:153].transpose(2, 0, 1))
    Image.fromarray(photograph[:-1]).save(tmp_path / "faces" / "2.png")
    with pytest.raises(InputError, match=r"2\.png is 178×217, aligned CelebA is 178×218"):
        fetch_data(from_folder(tmp_path / "faces", fit="celeba"), (3, 128), 0.5, out)


@pytest.mark.parametrize("resample", ["lanczos", "bilinear", "bicubic", "box"])
@pytest.mark.parametrize("fit", ["crop", "celeba"])
def test_images_are_resized_with_the_given_filter(tmp_path, out, fit, resample):
    """The crop is resized with Pillow's filter of that name."""
    (tmp_path / "faces").mkdir()
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (218, 178), np.uint8))
    for index in range(2):
        photograph.save(tmp_path / "faces" / f"{index}.png")
    fetch_data(from_folder(tmp_path / "faces", fit=fit, resample=resample), (1, 64), 0.5, out)

    method = Image.Resampling[resample.upper()]
    face = photograph.crop((25, 57, 153, 185)).resize((64, 64), method)
    expected = face if fit == "celeba" else photograph.resize((64, 64), method, box=(0, 20, 178, 198))
    assert np.array_equal(read_images(out).train[0, 0], np.asarray(expected))


def test_variables_in_a_path_are_expanded(folder, out, monkeypatch):
    """dataset.json has the path as given; the message about a variable that is not set has its name."""
    monkeypatch.setenv("ESPALIER_DATA", str(folder.parent))
    source = from_folder("$ESPALIER_DATA/images")
    fetch_data(source, SHAPE, 0.2, out)
    assert read_json(out / "dataset.json")["source"]["path"] == "$ESPALIER_DATA/images"

    monkeypatch.delenv("ESPALIER_DATA")
    with pytest.raises(InputError, match=r"fetch\.data\.path is .* and \$ESPALIER_DATA is not set"):
        fetch_data(source, SHAPE, 0.2, out)


def test_the_digits_are_refused_for_another_image_size(tmp_path):
    """The message has both sizes."""
    with pytest.raises(InputError, match="the digits are 1×16×16, the model expects 1×8×8"):
        fetch_data(BundledData(source="bundled", name="digits"), SHAPE, 0.2, tmp_path)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Give the datasets library a temporary cache and disable its progress bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_an_array_that_does_not_fit_on_the_disk_is_not_unpacked(tmp_path, monkeypatch):
    """A megabyte of compressed zeros is a gigabyte; nothing is written."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((1000, 8, 8), np.uint8))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    (tmp_path / "out").mkdir()

    with pytest.raises(
        InputError, match=r"unpacks to 62\.6 KiB as arr_0\.npy, and the limit is 1000 B, as much as is free"
    ):
        open_npz(NpzData(source="npz", path=tmp_path / "a.npz"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
