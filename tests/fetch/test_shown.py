"""Images are packed as a viewer shows them, whatever their source."""

import struct
import warnings
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image, ImageCms

from stages.data.images import read_images
from stages.fetch.data import fetch_data
from stages.fetch.params import FolderData, HubData, NpzData, S3Data
from stages.fetch.split import split_rows
from stages.runtime.errors import InputError
from stages.storage.files import read_json

SHAPE = (3, 8, 8)
GREEN, RED, WHITE = (0, 255, 0), (255, 0, 0), (255, 255, 255)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Give the datasets library a temporary cache and disable its progress bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def pack(tmp_path):
    """Write each image twice into a folder, fetch it, and return the packed images and dataset.json."""

    def run(images, suffix="png", shape=SHAPE, write=None, **rest):
        folder, out = tmp_path / "images", tmp_path / "out"
        folder.mkdir()
        out.mkdir()
        for index, image in enumerate(images):
            for copy in "ab":
                image.save(folder / f"{index}{copy}.{suffix}", **(write or {}))
        fetch_data(FolderData(source="folder", path=folder, **rest), shape, 0.5, out)
        return all_images(out)[::2], read_json(out / "dataset.json")

    return run


def all_images(out):
    """The packed images of both splits, in the order of the source: [N, H, W, C]."""
    images = read_images(out)
    order = np.argsort(np.concatenate([rows_of(out, "train"), rows_of(out, "heldout")]))
    return np.concatenate([images.train, images.heldout])[order].transpose(0, 2, 3, 1)


def rows_of(out, split):
    """The rows of the source that are in a split."""
    images = read_images(out)
    return split_rows(len(images.train) + len(images.heldout), 0.5)[split]


def turned(orientation):
    """An asymmetric 8×6 image (width, height) stored so that a viewer turns it with the EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose, from upright to stored
    upright = Image.fromarray(pixels)
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    return stored, exif, pixels


def test_all_orientations_are_upright_from_every_source(tmp_path, connect):
    """Folder, bucket and Hub give the pixels of the same images in an .npz; fit: exact judges the upright size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for orientation in range(1, 9):
        stored, exif, upright = turned(orientation)
        stored.save(folder / f"{orientation}.png", exif=exif)
    np.savez(tmp_path / "upright.npz", arr_0=np.stack([upright] * 8))
    store = connect()
    for path in folder.iterdir():
        store.client.upload_file(str(path), store.bucket, f"photos/{path.name}")
    (tmp_path / "npz").mkdir()
    fetch_data(NpzData(source="npz", path=tmp_path / "upright.npz"), (3, 6, 8), 0.5, tmp_path / "npz")
    sha256 = read_json(tmp_path / "npz" / "dataset.json")["sha256"]
    sources = {
        "folder": FolderData(source="folder", path=folder),
        "bucket": S3Data(source="s3", uri=f"s3://{store.bucket}/photos", sha256=sha256),
        "hub": HubData(source="hub", repo=str(folder), revision="0" * 40, column="image"),
    }
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        fetch_data(source, (3, 6, 8), 0.5, tmp_path / name)
        assert read_json(tmp_path / name / "dataset.json")["sha256"] == sha256, name


def transparent_images():
    """A green image whose left half is transparent with red below, in each mode that has transparency."""
    rgba = np.full((8, 8, 4), (*GREEN, 255), np.uint8)
    rgba[:, :4] = (*RED, 0)
    rgba = Image.fromarray(rgba)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *GREEN])
    palette.paste(0, (0, 0, 4, 8))
    rgb = rgba.convert("RGB")
    return {
        "RGBA": (rgba, {}),
        "P index": (palette, {"transparency": 0}),
        "P bytes": (palette, {"transparency": b"\x00\xff"}),
        "RGB tRNS": (rgb, {"transparency": RED}),
        "LA": (rgba.convert("LA"), {}),
        "L tRNS": (rgb.convert("L"), {"transparency": rgb.convert("L").getpixel((0, 0))}),
    }


@pytest.mark.parametrize("kind", transparent_images())
@pytest.mark.parametrize("background", [WHITE, (10, 20, 30)])
def test_transparent_pixels_lie_on_the_background(pack, capsys, kind, background):
    """What a file stores below them is not packed; dataset.json and the terminal count the images."""
    image, write = transparent_images()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (packed,), about = pack([image], write=write, background=background)

    assert (packed[:, :4] == background).all()
    assert (packed[:, 4:] == packed[0, 7]).all()
    assert tuple(packed[0, 7]) == (GREEN if image.mode in ("RGBA", "P", "RGB") else (150, 150, 150))
    assert about["shown"] == {"transparent": 2}
    assert f"2 had transparent pixels, which lie on the colour {list(background)}" in capsys.readouterr().err


def test_half_transparent_pixels_are_mixed(pack):
    """In proportion to their opacity: 51 of 255 of red over white."""
    (packed,), _ = pack([Image.new("RGBA", (8, 8), (*RED, 51))])

    assert tuple(packed[0, 0]) == (255, 204, 204)


def test_an_opaque_alpha_channel_changes_nothing(pack, capsys):
    """It is not counted, and dataset.json has the keys of plain images."""
    (packed,), about = pack([Image.new("RGBA", (8, 8), (*RED, 255))])

    assert (packed == RED).all()
    assert "shown" not in about
    assert not capsys.readouterr().err.startswith("Of ")


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(np.full((8, 8), 30_000, np.uint16)), "png"),
        (Image.fromarray(np.full((8, 8), 30_000, np.uint16)), "tif"),
        (Image.fromarray(np.full((8, 8), 30_000, np.int32)), "tif"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "tiff"),
    ],
)
def test_deep_grey_images_are_refused(pack, image, suffix):
    """Of 16 and 32 bits and of floats: their scale is not known, and Pillow would clip them."""
    with pytest.raises(InputError, match="has more than 8 bits per channel") as caught:
        pack([image], suffix)
    assert "\n" not in caught.value.message


def png_of_16_bits(colour_type, pixel):
    """A PNG of 8×8 equal pixels, which Pillow itself cannot write: colour type 2 is RGB, 4 grey with alpha, 6 RGBA."""
    rows = (b"\0" + 8 * struct.pack(f">{len(pixel)}H", *pixel)) * 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("colour_type", "pixel", "shown"),
    [
        (2, (0x7530, 0x00FF, 0xFFFF), (0x75, 0x00, 0xFF)),
        (4, (0x7530, 0xFFFF), (0x75,) * 3),
        (6, (0x7530, 0x00FF, 0xFFFF, 0xFFFF), (0x75, 0x00, 0xFF)),
    ],
)
def test_pictures_of_16_bits_keep_their_upper_8_bits(tmp_path, colour_type, pixel, shown):
    """As in a viewer; only grey images without alpha may be measurements."""
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(png_of_16_bits(colour_type, pixel))
    fetch_data(FolderData(source="folder", path=tmp_path / "images"), SHAPE, 0.5, tmp_path / "out")

    assert (all_images(tmp_path / "out") == shown).all()


def exchanged_profile():
    """The ICC profile of sRGB with the primaries red and blue exchanged, so that its red is shown as blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_another_colour_profile_is_converted(pack):
    """A profile with red and blue exchanged shows red as blue; sRGB itself changes no bit."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    red, same = Image.new("RGB", (8, 8), RED), noise.copy()
    red.info["icc_profile"], same.info["icc_profile"] = exchanged_profile(), plain
    packed, about = pack([red, same])

    assert np.abs(packed[0].astype(int) - (0, 0, 255)).max() <= 2
    assert np.array_equal(packed[1], np.asarray(noise))
    assert about["shown"] == {"other_profile": 2}


def test_a_damaged_profile_is_ignored_and_counted(pack, capsys):
    """As viewers do; the pixels are those without it."""
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.info["icc_profile"] = b"no profile at all"
    (packed,), about = pack([image])

    assert (packed == (1, 2, 3)).all()
    assert about["shown"] == {"invalid_profile": 2}
    assert "2 had a colour profile that is damaged" in capsys.readouterr().err


def test_damaged_exif_data_is_ignored_and_counted(pack):
    """As viewers do."""
    (packed,), about = pack([Image.new("RGB", (8, 8), GREEN)], write={"exif": b"Exif\x00\x00no TIFF header"})

    assert (packed == GREEN).all()
    assert about["shown"] == {"invalid_exif": 2}


def test_a_transparent_image_with_a_profile_keeps_the_background(pack):
    """Only its own colours are converted."""
    image = transparent_images()["RGBA"][0]
    image.info["icc_profile"] = exchanged_profile()
    (packed,), about = pack([image], background=(200, 100, 50))

    assert (packed[:, :4] == (200, 100, 50)).all()
    assert about["shown"] == {"transparent": 2, "other_profile": 2}


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_is_packed(tmp_path, suffix, capsys):
    """Of animated images and of documents with pages; they are counted."""
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    for name in "ab":
        path = tmp_path / "images" / f"{name}.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    fetch_data(FolderData(source="folder", path=tmp_path / "images"), SHAPE, 0.5, tmp_path / "out")

    assert (all_images(tmp_path / "out") == RED).all()
    assert read_json(tmp_path / "out" / "dataset.json")["shown"] == {"several_frames": 2}
    assert "2 had several frames, of which the first is packed" in capsys.readouterr().err


def test_cmyk_is_shown_in_rgb(pack):
    """Full cyan ink absorbs all red."""
    (packed,), about = pack([Image.new("CMYK", (8, 8), (255, 0, 0, 0))], "tif")

    assert (packed == (0, 255, 255)).all()
    assert "shown" not in about


def test_a_dataset_of_the_hub_is_decoded_like_a_folder(tmp_path):
    """Transparency, frames and profiles included: the same hash and the same counts."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, (image, write) in transparent_images().items():
        image.save(folder / f"{name}.png", **write)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "profile.png", icc_profile=exchanged_profile())
    found = []
    for name, source in {
        "folder": FolderData(source="folder", path=folder),
        "hub": HubData(source="hub", repo=str(folder), revision="0" * 40, column="image"),
    }.items():
        (tmp_path / name).mkdir()
        fetch_data(source, SHAPE, 0.5, tmp_path / name)
        about = read_json(tmp_path / name / "dataset.json")
        found.append((about["sha256"], about["shown"]))

    assert found[0] == found[1]
    assert found[0][1] == {"transparent": 6, "several_frames": 1, "other_profile": 1}


def test_an_embedded_image_is_decoded_like_a_file(tmp_path):
    """Parquet files of the Hub hold the bytes of images."""
    stored, exif, upright = turned(6)
    buffer = BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    rows = {"img": [{"bytes": buffer.getvalue(), "path": None}] * 2}
    features = datasets.Features({"img": datasets.Image()})
    (tmp_path / "repo").mkdir()
    (tmp_path / "out").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "repo" / "train.parquet")
    fetch_data(HubData(source="hub", repo=str(tmp_path / "repo"), revision="0" * 40), (3, 6, 8), 0.5, tmp_path / "out")

    assert (all_images(tmp_path / "out") == upright).all()


def test_a_row_without_an_image_is_named(tmp_path):
    """A dataset of the Hub may have empty cells."""
    features = datasets.Features({"img": datasets.Image()})
    (tmp_path / "repo").mkdir()
    (tmp_path / "out").mkdir()
    datasets.Dataset.from_dict({"img": [None] * 2}, features=features).to_parquet(tmp_path / "repo" / "train.parquet")

    with pytest.raises(InputError, match=r"/train\[0\] is not a readable image \(the row has no image\)"):
        fetch_data(HubData(source="hub", repo=str(tmp_path / "repo"), revision="0" * 40), SHAPE, 0.5, tmp_path / "out")


@pytest.mark.parametrize("background", [[255, 255], [0, 0, 256], [0, 0, 0.5], "white", [True, 0, 0]])
def test_a_wrong_background_is_refused(background):
    """It has three integers from 0 to 255."""
    with pytest.raises(ValueError, match="background"):
        FolderData(source="folder", path="x", background=background)
