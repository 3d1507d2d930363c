"""Images with seeds and labels -> the bytes of one shard; equal images give equal bytes."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

FEATURES = {
    "image": {"_type": "Image"},
    "seed": {"dtype": "int64", "_type": "Value"},
    "label": {"dtype": "int64", "_type": "Value"},
}
"""The columns, as Hugging Face's datasets describes them in a Parquet file."""
COLUMNS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Type of a column of images in datasets."""


class Row(NamedTuple):
    """One image."""

    seed: int
    label: int | None
    """Its class; None of an unconditional model."""
    png: bytes


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode an image, [C, H, W] uint8 with one or three channels."""
    content = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "PNG")
    return content.getvalue()


def to_parquet(rows: Sequence[Row]) -> bytes:
    """Write a table with the columns image (PNG, as datasets stores images), seed and label."""
    images = [{"bytes": row.png, "path": f"{row.seed:012d}.png"} for row in rows]
    features = {name: value for name, value in FEATURES.items() if name != "label" or rows[0].label is not None}
    columns: dict[str, Any] = {
        "image": pa.array(images, COLUMNS),
        "seed": pa.array([row.seed for row in rows], pa.int64()),
        "label": pa.array([row.label for row in rows], pa.int64()),
    }
    table = pa.table({name: columns[name] for name in features})
    described = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    content = io.BytesIO()
    pq.write_table(described, content, compression="none")  # PNG is compressed already
    return content.getvalue()


def to_webdataset(rows: Sequence[Row]) -> bytes:
    """Write a tar with SEED.png and SEED.json for each image, and nothing that varies in its headers."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            about = {"seed": row.seed} if row.label is None else {"seed": row.seed, "label": row.label}
            for suffix, part in (("png", row.png), ("json", json.dumps(about).encode())):
                info = tarfile.TarInfo(f"{row.seed:012d}.{suffix}")  # its other fields are the same everywhere
                info.size = len(part)
                archive.addfile(info, io.BytesIO(part))
    return content.getvalue()


WRITERS: dict[str, Callable[[Sequence[Row]], bytes]] = {"parquet": to_parquet, "webdataset": to_webdataset}
"""Format -> how a shard is written."""
