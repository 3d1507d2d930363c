"""What a person sees in a folder or a bucket is what is packed; the rest is counted."""

import os

import numpy as np
import pytest
from PIL import Image

from stages.data.images import read_images
from stages.fetch.data import fetch_data
from stages.fetch.listing import Listing, list_folder, sort_names
from stages.fetch.params import FitParams, FolderData, NpzData, S3Data
from stages.fetch.source_images import CorruptImageError, open_folder, read_image
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.storage.s3 import Store

SHAPE = (1, 8, 8)


@pytest.fixture
def out(tmp_path):
    """An empty output folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def draw(path, level=0):
    """Write a uniformly grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


def levels(out):
    """The grey levels of all packed images, sorted."""
    images = read_images(out)
    return sorted(int(image[0, 0, 0]) for image in [*images.train, *images.heldout])


def fetch(folder, out, **rest):
    """Pack a folder and return dataset.json."""
    fetch_data(FolderData(source="folder", path=folder, **rest), SHAPE, 0.34, out)
    return read_json(out / "dataset.json")


def test_links_to_folders_and_files_are_followed(tmp_path, out):
    """Three images of a folder, three behind a link to another one, and a linked file; nothing is left out."""
    for index in range(3):
        draw(tmp_path / "data" / "a" / f"{index}.png", index)
        draw(tmp_path / "elsewhere" / f"{index}.png", 10 + index)
    draw(tmp_path / "single.png", 99)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c.png").symlink_to(tmp_path / "single.png")
    about = fetch(tmp_path / "data", out)

    assert levels(out) == [0, 1, 2, 10, 11, 12, 99]
    assert "passed_over" not in about


def test_a_link_to_a_file_that_is_no_image_enters_nothing(tmp_path, out, capsys):
    """Neither under an image's name nor under its own; the output and the messages have its name alone."""
    for index in range(3):
        draw(tmp_path / "data" / f"{index}.png", index)
    for number, name in enumerate(("a.png", "b.tga", "c.ppm", "d.json")):
        (tmp_path / f"secret{number}").write_text("root:top-secret:0:0\n")
        (tmp_path / "data" / name).symlink_to(tmp_path / f"secret{number}")
    about = fetch(tmp_path / "data", out, max_corrupt=3)

    assert about["left_out"] == ["a.png", "b.tga", "c.ppm"]
    assert about["passed_over"]["not_images"]["first"] == ["d.json"]
    assert "top-secret" not in capsys.readouterr().err
    assert not [path for path in out.rglob("*") if path.is_file() and b"top-secret" in path.read_bytes()]


def test_linked_folders_are_classes(tmp_path, out):
    """Like folders of their own."""
    for index in range(3):
        draw(tmp_path / "data" / "a" / f"{index}.png", index)
        draw(tmp_path / "elsewhere" / f"{index}.png", 10 + index)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    source = FolderData(source="folder", path=tmp_path / "data", labels=True)
    fetch_data(source, SHAPE, 0.5, out, table=np.zeros((3, 1, 4), np.float32))
    images = read_images(out)

    assert np.array_equal(images.conditions.train, images.train[:, 0, 0, 0] // 10)
    assert read_json(out / "dataset.json")["classes"] == ["a", "b"]


def test_loops_of_links_end_and_each_image_counts_once(tmp_path):
    """A link to a folder or file that is listed anyway is left out and named."""
    for name in ("a", "b"):
        draw(tmp_path / "data" / name / "0.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "other").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "b" / "other").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "b" / "1.png").symlink_to("0.png")
    (tmp_path / "data" / "z").symlink_to(tmp_path)
    listing = list_folder(tmp_path / "data", "data")

    assert listing.images == ["a/0.png", "b/0.png"]
    assert listing.left_out == {"repeated_links": ["a/other", "a/up", "b/1.png", "b/other", "z/data"]}


def test_a_class_that_is_a_link_to_another_class_is_refused(tmp_path, out):
    """It would have no images of its own."""
    draw(tmp_path / "data" / "a" / "0.png")
    (tmp_path / "data" / "b").symlink_to("a")
    source = FolderData(source="folder", path=tmp_path / "data", labels=True)

    with pytest.raises(InputError, match="data/b leads to images of another class folder"):
        fetch_data(source, SHAPE, 0.5, out, table=np.zeros((3, 1, 4), np.float32))


def test_a_link_that_leads_nowhere_is_a_corrupt_image(tmp_path, out):
    """Under its name; with another suffix it is a file that is not an image."""
    for index in range(3):
        draw(tmp_path / "data" / f"{index}.png", index)
    (tmp_path / "data" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "data" / "gone.txt").symlink_to("gone.txt")

    with pytest.raises(InputError, match=r"gone\.png is not a readable image"):
        fetch(tmp_path / "data", out)
    about = fetch(tmp_path / "data", out, max_corrupt=1)
    assert about["left_out"] == ["gone.png"]
    assert about["passed_over"] == {"not_images": {"count": 1, "first": ["gone.txt"]}}


HIDDEN = [
    ".hidden.png",
    "._0.png",
    "a/._0.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "a/.ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/a/0.png",
    "@eaDir/0.png",
    "Thumbs.db",
    "desktop.ini",
]


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path, out, capsys):
    """Also within folders, and as classes: 9 entries, of which the terminal names three."""
    for index in range(4):
        draw(tmp_path / "data" / ("a", "b")[index % 2] / f"{index}.png", index)
    for name in HIDDEN:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(tmp_path / "image.png", 200)
        (tmp_path / "data" / name).write_bytes((tmp_path / "image.png").read_bytes())
    source = FolderData(source="folder", path=tmp_path / "data", labels=True)
    fetch_data(source, SHAPE, 0.5, out, table=np.zeros((3, 1, 4), np.float32))

    assert levels(out) == [0, 1, 2, 3]
    hidden = read_json(out / "dataset.json")["passed_over"]["hidden"]
    assert hidden["count"] == 9
    assert "a/.ipynb_checkpoints" in hidden["first"]
    assert f"Left out of {tmp_path}/data: 9 hidden files or folders (" in capsys.readouterr().err


def test_a_hidden_folder_can_itself_be_the_source(tmp_path, out):
    """Only what lies below it is judged."""
    for index in range(3):
        draw(tmp_path / ".cache" / "images" / f"{index}.png", index)

    assert "passed_over" not in fetch(tmp_path / ".cache" / "images", out)


@pytest.mark.parametrize(
    "suffix",
    ["png", "PNG", "bmp", "gif", "jpeg", "JPG", "jpe", "jfif", "tif", "TIFF", "webp", "ppm", "pgm", "tga", "jp2"],
)
def test_all_suffixes_of_images_are_read(tmp_path, out, suffix):
    """In any case of letters."""
    for index in range(2):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "pgm": "PPM", "tif": "TIFF", "jp2": "JPEG2000"}
        (tmp_path / "data").mkdir(exist_ok=True)
        name = suffix.lower()
        Image.new("L", (8, 8), 100).save(tmp_path / "data" / f"{index}.{suffix}", kind.get(name, name.upper()))
    fetch_data(FolderData(source="folder", path=tmp_path / "data"), SHAPE, 0.5, out)

    assert np.abs(np.array(levels(out)) - 100).max() <= 2


def test_other_files_are_named_and_counted(tmp_path, out, capsys):
    """Up to three on the terminal; hidden ones are counted apart."""
    for index in range(3):
        draw(tmp_path / "data" / f"{index}.png", index)
    for name in ("a.heic", "b.txt", "c.png.part", "noname", ".DS_Store"):
        (tmp_path / "data" / name).touch()
    os.mkfifo(tmp_path / "data" / "pipe.png")
    about = fetch(tmp_path / "data", out)

    names = ["a.heic", "b.txt", "c.png.part", "noname", "pipe.png"]
    assert about["passed_over"]["not_images"] == {"count": 5, "first": names}
    assert about["passed_over"]["hidden"] == {"count": 1, "first": [".DS_Store"]}
    assert "5 files that are not images (a.heic, b.txt, c.png.part, …)" in capsys.readouterr().err


def test_a_folder_of_other_files_is_refused_by_name(tmp_path, out):
    """The message names one of them and the suffixes that are read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.heic").touch()

    with pytest.raises(InputError, match=r"no images found in .*\(1 other files, the first is a\.heic\).*\.webp"):
        fetch(tmp_path / "data", out)


def test_names_that_are_not_utf8_are_escaped(tmp_path, out):
    """JSON cannot hold them."""
    for index in range(3):
        draw(tmp_path / "data" / f"{index}.png", index)
    (tmp_path / "data" / os.fsdecode(b"\xff.txt")).touch()

    assert fetch(tmp_path / "data", out)["passed_over"]["not_images"]["first"] == ["\\xff.txt"]


def test_a_bucket_is_listed_like_a_folder(tmp_path, out, connect):
    """The same images and the same counts; markers of folders count as nothing."""
    for index in range(3):
        draw(tmp_path / "data" / "a" / f"{index}.tif", index)
    for name in (".ipynb_checkpoints/0.png", "a/._0.tif", "__MACOSX/0.png", "notes.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"not an image")
    about = fetch(tmp_path / "data", out)
    store = connect()
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            store.client.upload_file(str(path), store.bucket, f"data/{path.relative_to(tmp_path / 'data')}")
    store.client.put_object(Bucket=store.bucket, Key="data/a/", Body=b"")
    (tmp_path / "s3").mkdir()
    source = S3Data(source="s3", uri=f"s3://{store.bucket}/data", sha256=about["sha256"])
    fetch_data(source, SHAPE, 0.34, tmp_path / "s3")

    assert {**read_json(tmp_path / "s3" / "dataset.json"), "source": about["source"]} == about
    assert about["passed_over"]["hidden"]["count"] == 3


def test_keys_that_lead_out_of_the_folder_are_not_hidden():
    """They stay among the images and are refused by the store."""
    assert sort_names(["../x.png", "a/../x.png"]).images == ["../x.png", "a/../x.png"]


def test_images_keep_the_order_of_their_paths():
    """Folder by folder, so that hashes of earlier packings stay valid."""
    assert sort_names(["a b/0.png", "a/1.png", "a/10.png", "a/2.png"]).images == [
        "a/1.png",
        "a/10.png",
        "a/2.png",
        "a b/0.png",
    ]


@pytest.fixture
def numbered(tmp_path):
    """Eleven class folders, class0 to class10; the grey level of an image is the number in the name."""
    for number in range(11):
        for index in range(2):
            draw(tmp_path / "data" / f"class{number}" / f"{index}.png", number)
    return tmp_path / "data"


def labels_by_level(out):
    """Grey level -> class."""
    images = read_images(out)
    pairs = [(images.train, images.conditions.train), (images.heldout, images.conditions.heldout)]
    return {int(i[0, 0, 0]): int(label) for part, labels in pairs for i, label in zip(part, labels, strict=True)}


def test_classes_are_numbered_in_natural_order(numbered, out, capsys):
    """class2 before class10, and the terminal says where that is not alphabetical."""
    source = FolderData(source="folder", path=numbered, labels=True)
    fetch_data(source, SHAPE, 0.5, out, table=np.zeros((12, 1, 4), np.float32))

    assert labels_by_level(out) == {number: number for number in range(11)}
    assert "class 2 is class2, in alphabetical order class10" in capsys.readouterr().err


def test_a_file_of_names_numbers_the_classes(numbered, tmp_path, out):
    """In its order; a name too many, too few or twice is refused in one line."""
    names = [f"class{number}" for number in reversed(range(11))]
    path = tmp_path / "classes.txt"
    source = FolderData(source="folder", path=numbered, labels=True, classes=path)
    table = np.zeros((12, 1, 4), np.float32)
    for wrong, message in (
        ([*names, "dog"], "has dog, which is no folder with images"),
        (names[1:], "lacks the folder class10"),
        ([*names, "class3"], "has class3 twice"),
    ):
        path.write_text("\n".join(wrong))
        with pytest.raises(InputError, match=message):
            fetch_data(source, SHAPE, 0.5, out, table=table)
    path.write_text("\n".join(names) + "\n")
    fetch_data(source, SHAPE, 0.5, out, table=table)

    assert labels_by_level(out) == {number: 10 - number for number in range(11)}
    with pytest.raises(ValueError, match="set labels: true or remove it"):
        FolderData(source="folder", path=numbered, classes=path)


def test_bucket_names_may_have_an_underscore():
    """Older buckets of AWS and those of other servers have them."""
    assert S3Data(source="s3", uri="s3://my_bucket/x", sha256="0" * 64).uri == "s3://my_bucket/x"
    with pytest.raises(InputError, match="invalid bucket address"):
        Store("s3://_bucket/x")


def test_the_name_of_an_image_forges_no_line(tmp_path, out, capsys):
    """In the warning that names corrupt images."""
    for index in range(3):
        draw(tmp_path / "data" / f"{index}.png", index)
    (tmp_path / "data" / "x\nError: all is lost\x1b[2J.png").write_bytes(b"not an image")
    fetch(tmp_path / "data", out, max_corrupt=1)
    told = [line for line in capsys.readouterr().err.splitlines() if "lost" in line]

    assert len(told) == 1
    assert told[0].startswith(f"Warning: {tmp_path}/data/x")
    assert told[0].isprintable()


def test_a_pipe_or_device_in_place_of_an_image_or_array_is_refused(tmp_path, out):
    """Reading it might never end; it may replace a file after the folder was listed."""
    os.mkfifo(tmp_path / "pipe.png")
    images = open_folder(tmp_path, "images", Listing(["pipe.png"], {}))
    with pytest.raises(CorruptImageError, match="is a pipe, device or socket"):
        read_image(images, 0, SHAPE, FitParams())
    with pytest.raises(InputError, match="is a pipe, device or socket"):
        fetch_data(NpzData(source="npz", path=tmp_path / "pipe.png"), SHAPE, 0.5, out)
