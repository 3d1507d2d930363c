"""An image file -> what an image viewer shows: upright, opaque, in sRGB."""

from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from struct import error as StructError  # noqa: N812

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

Colour = tuple[int, int, int]
Transform = Callable[[Image.Image], Image.Image]
GREY_MODES = ("1", "L", "LA", "La")
PROFILE_MODES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
"""Colour space of an ICC profile -> modes of the images that it describes; viewers ignore it for others."""
SRGB_LEVELS = 2
"""A profile that moves no colour by more levels than this, of 255, is sRGB as another program rounds it."""


class DeepImageError(ValueError):
    """The image has more than 8 bits per channel and Pillow would clip it."""


def to_shown(image: Image.Image, background: Colour) -> tuple[Image.Image, list[str]]:
    """Decode an image as a viewer shows it.

    The EXIF orientation is applied, transparent pixels lie on `background`, colours of another ICC profile are
    converted to sRGB, and an animated image is its first frame.

    Args:
        image: An opened image; it is loaded.
        background: Red, green and blue in 0 … 255.

    Returns:
        The image, of mode L or RGB or another one that Pillow converts to both, and what was found in it:
        several_frames, invalid_exif (ignored), transparent, other_profile (converted) and invalid_profile (ignored).

    Raises:
        DeepImageError: It has more than 8 bits per channel.
        Exception: Pillow cannot decode it.
    """
    remarks = ["several_frames"] * bool(getattr(image, "is_animated", False))
    image.load()
    if image.mode.startswith(("I", "F")):
        raise DeepImageError(image.mode)
    image, exif_remarks = _turn(image)
    alpha = _alpha(image)
    colours, profile_remarks = _to_srgb(_without_alpha(image), image.info.get("icc_profile"))
    if alpha:
        on = Image.new("RGB", image.size, background)
        colours = Image.composite(colours.convert("RGB"), on, alpha)
    return colours, [*remarks, *exif_remarks, *["transparent"] * bool(alpha), *profile_remarks]


def has_colours(image: Image.Image) -> bool:
    """Whether a pixel of an image that `to_shown` returned is not grey."""
    if image.mode in GREY_MODES:
        return False
    red, green, blue = image.convert("RGB").split()
    return any(ImageChops.difference(red, other).getbbox() is not None for other in (green, blue))


def _turn(image: Image.Image) -> tuple[Image.Image, list[str]]:
    try:
        return ImageOps.exif_transpose(image), []
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, StructError):  # of damaged EXIF data
        return image, ["invalid_exif"]


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the opacity of each pixel; None if all are opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha  # noqa: PLR2004


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the colours alone, of mode L, RGB or CMYK."""
    if image.mode == "CMYK":
        return image
    colours = image.convert("RGBA") if image.has_transparency_data else image
    return colours.convert("L" if image.mode in GREY_MODES else "RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[str]]:
    if not profile:
        return image, []
    try:
        mode, transform = _transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image, ["invalid_profile"]
    if transform is None:
        return image, []
    return transform(image if image.mode == mode else image.convert(mode)), ["other_profile"]


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[str, Transform | None]:
    """Build the conversion from an ICC profile to sRGB for images of a mode; None if the profile is sRGB.

    Raises:
        ValueError: The profile describes images of another kind.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if mode not in PROFILE_MODES.get(space, ()):
        raise ValueError(f"an ICC profile of {space} in an image of mode {mode}")
    accepted = PROFILE_MODES[space][0]
    built = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), accepted, "RGB")
    if space == "CMYK":
        return accepted, built.apply
    probe = _probe(accepted)
    moved = np.asarray(built.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return accepted, built.apply if np.abs(moved).max() > SRGB_LEVELS else None


def _probe(mode: str) -> Image.Image:
    """All grey levels, or a lattice of 18³ colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    return Image.fromarray(lattice.reshape(len(levels), -1, 3))
