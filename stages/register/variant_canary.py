"""A downloaded version -> whether its variants draw what they should, each in the runtime that it is for.

A graph draws in a sandbox, by the version's code. Integers and caches are safetensors, which Espalier alone opens, and
draw here. What is expected is drawn by the same kind of variant, made anew from the weights of the version.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stages.models.variants.folder import read_variant_record, write_variant
from stages.models.variants.graph import PACKAGES
from stages.models.variants.kinds import GRAPHS, Kind
from stages.register.canary import check_canary, compare, draw_expected, new_seeds
from stages.register.registry import MODEL, OURS
from stages.register.variants import VARIANTS, held_kinds
from stages.runtime.errors import InputError


def check_runtime(version: Path) -> None:
    """Check that this machine has the packages that the graphs of a version need; no lack is a fault of the version.

    Raises:
        InputError: A package of the extra deploy is missing.
    """
    graphs = [name for name in held_kinds(version) if name in GRAPHS]
    needed = PACKAGES if set(graphs) - {"onnx"} else ("onnxruntime",) if graphs else ()  # others are exported anew
    if missing := [name for name in needed if find_spec(name) is None]:
        found = f"the version holds {', '.join(graphs)}, and this machine lacks {', '.join(missing)}"
        raise InputError(f"{found}, so it was not checked; install the extra deploy, or promote it on another machine")


def check_variant_canary(version: Path, name: str, levels: float, seeds: Sequence[int] = ()) -> str:
    """Draw images with a variant of a version, and compare them with those of the same kind, made of its weights.

    Args:
        version: The downloaded version.
        name: Kind of the variant, the name of its folder.
        levels: Largest mean absolute difference of an image, in grey levels from 0 to 255.
        seeds: As of `check_canary`.

    Returns:
        The reason of the check, with the seeds.

    Raises:
        InputError: The variant is another kind or cannot be opened, or draws a blank or another image.
    """
    folder = version / VARIANTS / name
    kind = read_variant_record(folder).kind
    if kind.name != name:
        raise InputError(f"the variant in {VARIANTS}/{name} is {kind.name}; register the run again")
    if kind.form == "onnx":  # the same numbers as those of the weights
        return check_canary(version, levels, seeds, name)
    if kind.is_graph:
        return check_canary(version, levels, seeds, name, partial(_draw_anew, kind=kind))
    seeds = seeds or new_seeds()
    return compare(seeds, draw_expected(version, seeds, folder), _draw_anew(version, seeds, kind), levels)


def _draw_anew(version: Path, seeds: Sequence[int], kind: Kind) -> list[NDArray[Any]]:
    """Make a variant from the weights of a version, and draw with it."""
    with tempfile.TemporaryDirectory(prefix="espalier-variant-") as folder:
        write_variant(OURS, version / MODEL, kind, Path(folder))
        return draw_expected(version, seeds, Path(folder))
