"""Mistakes in the block fetch and in what it names: one line that says what was found and what is allowed."""

import numpy as np
import pytest
from PIL import Image

from stages.fetch.data import fetch_data
from stages.fetch.listing import list_folder
from stages.fetch.params import FetchParams, FolderData
from stages.fetch.pickles import read_pickle
from stages.fetch.source_images import check_path
from stages.models.pipeline import component
from stages.runtime.errors import InputError
from stages.runtime.paths import expand_path
from stages.runtime.schema import load_block
from stages.storage.files import read_json

BUNDLED = "{source: bundled, name: digits}"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("digits", BUNDLED, "fetch.model is 'digits': write a block, with a key and a value in each line"),
        ("{path: m}", BUNDLED, "fetch.model: the key source is missing"),
        (
            "{source: Folder, path: m}",
            BUNDLED,
            "fetch.model: source is 'Folder'; allowed: bundled, folder, s3, hub, checkpoint, registry",
        ),
        ("{source: folder}", BUNDLED, "fetch.model.path: field required"),
        ("{source: bundled, name: cifar10}", BUNDLED, "fetch.model.name is 'cifar10': input should be 'digits'"),
        (
            BUNDLED,
            "{source: folder, path: i, background: white}",
            "fetch.data.background is 'white': write a list such as [a, b]",
        ),
        (BUNDLED, "{source: folder, path: i, sise: 3}", "fetch.data.sise is not a known key"),
        (
            BUNDLED,
            "{source: s3, uri: 's3://Mine', sha256: '" + "0" * 64 + "'}",
            "fetch.data.uri is 's3://Mine': give s3",
        ),
    ],
)
def test_a_wrong_block_is_explained_by_its_own_keys(tmp_path, model, data, message):
    """In words of YAML; the kind of a source is no part of a key."""
    path = tmp_path / "params.yaml"
    path.write_text(f"fetch: {{model: {model}, data: {data}, heldout: 0.2}}")

    with pytest.raises(InputError) as caught:
        load_block(path, "fetch", FetchParams)
    assert caught.value.message.startswith(f"{path}: {message}")


def test_a_path_that_cannot_be_followed_is_refused(tmp_path):
    """A name that no file system takes, a null byte and a loop of links, whatever reads the path afterwards."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in ("x" * 5000, "a\0b", str(loop)):
        source = FolderData(source="folder", path=path)
        with pytest.raises(InputError, match=r"^fetch\.data\.path is ") as caught:
            check_path(source)
        assert len(caught.value.format_message()) <= 300
    assert expand_path(tmp_path / "missing", "fetch.data.path") == tmp_path / "missing"


def test_a_file_in_place_of_a_folder_is_called_a_file(tmp_path):
    """An archive of images, and weights in place of their pipeline; and the other way round for a checkpoint."""
    file = tmp_path / "images.zip"
    file.touch()

    with pytest.raises(InputError, match=r"images\.zip is a file; give the folder it is in, or unpack it"):
        list_folder(file, str(file))
    with pytest.raises(InputError, match=r"images\.zip is a file; give the folder of the pipeline"):
        component(file, "unet")
    with pytest.raises(InputError, match="is a folder; correct its path"):
        read_pickle(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """An image folder, and an empty output folder beside it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def test_images_of_which_none_is_readable_are_refused(folder):
    """However many may be corrupt; the share of held-out images is not to blame."""
    for name in "abc":
        (folder / f"{name}.png").write_text("<html>")

    with pytest.raises(
        InputError, match=r"none of the 3 images in .* is readable; .*a\.png is not a readable image.*; replace them"
    ):
        fetch_data(FolderData(source="folder", path=folder, max_corrupt=9), (1, 8, 8), 0.2, folder.parent / "out")


def test_colours_that_a_grey_model_does_not_see_are_counted(folder, capsys):
    """Grey pictures stored as RGB lose nothing and are not counted."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    for index in range(3):
        Image.fromarray(grey).convert("RGB").save(folder / f"{index}.png")
    Image.new("RGB", (8, 8), (10, 200, 10)).save(folder / "3.png")
    fetch_data(FolderData(source="folder", path=folder), (1, 8, 8), 0.5, folder.parent / "out")

    assert read_json(folder.parent / "out" / "dataset.json")["shown"] == {"coloured": 1}
    assert "1 had colours, which became grey levels for this model" in capsys.readouterr().err


def test_images_that_were_enlarged_are_counted(folder, capsys):
    """`fit: crop` accepts smaller images, which hold less detail than the model draws."""
    for index, size in enumerate([(8, 8), (20, 9), (7, 30), (1, 1)]):
        Image.new("L", size, 50 * index).save(folder / f"{index}.png")
    fetch_data(FolderData(source="folder", path=folder, fit="crop"), (1, 8, 8), 0.5, folder.parent / "out")

    assert read_json(folder.parent / "out" / "dataset.json")["shown"] == {"enlarged": 2}
    assert "2 were smaller than the model's images and were enlarged" in capsys.readouterr().err
