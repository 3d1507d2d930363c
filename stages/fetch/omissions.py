"""What fetch left out of a source or changed in its images -> one line for the terminal."""

from collections.abc import Mapping
from typing import Any

from stages.fetch.params import FitParams
from stages.fetch.source_images import SourceImages

MAX_NAMED = 3
KINDS = {
    "hidden": ("hidden file or folder", "hidden files or folders"),
    "not_images": ("file that is not an image", "files that are not images"),
    "repeated_links": ("link to what is packed already", "links to what is packed already"),
}
"""Kind in `Listing.left_out` -> singular and plural."""
REMARKS = {
    "transparent": "{count} had transparent pixels, which lie on the colour {background}",
    "coloured": "{count} had colours, which became grey levels for this model",
    "enlarged": "{count} were smaller than the model's images and were enlarged",
    "several_frames": "{count} had several frames, of which the first is packed",
    "invalid_exif": "{count} had damaged EXIF data, which was ignored",
    "other_profile": "{count} had another colour profile and were converted to sRGB",
    "invalid_profile": "{count} had a colour profile that is damaged or of another kind of image, which was ignored",
}
"""Remark of `read_image` -> how it is printed."""


def passed_over_line(images: SourceImages) -> str:
    """Name and count what a source left out: SourceImages.about -> one line."""
    kinds: Mapping[str, Any] = images.about["passed_over"]
    parts = [_counted(kind, entry["count"], entry["first"]) for kind, entry in kinds.items()]
    return f"Left out of {images.origin}: {', '.join(parts)}"


def _counted(kind: str, count: int, names: list[str]) -> str:
    named = ", ".join([ascii(name)[1:-1] if not name.isprintable() else name for name in names[:MAX_NAMED]])
    return f"{count:,} {KINDS[kind][count > 1]} ({named}{', …' if count > MAX_NAMED else ''})"


def shown_line(images: SourceImages, remarks: Mapping[str, int], params: FitParams) -> str:
    """Count the images that are packed differently than their pixels are stored, in one line."""
    background = list(params.background)
    parts = [
        text.format(count=f"{remarks[name]:,}", background=background)
        for name, text in REMARKS.items()
        if name in remarks
    ]
    return f"Of {len(images):,} images in {images.origin}, {'; '.join(parts)}"
