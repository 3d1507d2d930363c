"""Variants of a compression's finetuned model -> folders of a version, and their measurements as evidence."""

import shutil
from pathlib import Path, PurePath

from stages.models.layout import DENOISERS
from stages.models.variants.folder import GRAPH_FILE, read_variant_record, variant_folders
from stages.protocol.costs import VARIANT_COSTS
from stages.protocol.variants import VARIANTS_FILE
from stages.register.registry import OURS
from stages.storage.files import copy_file
from stages.tracking.compression import Compression

VARIANTS = "artifacts/variants"
"""Folder of a version with a folder KIND for each variant; also that of the workspace, with folders MODEL+KIND."""


def own_variants(compression: Compression) -> dict[str, Path]:
    """Find the variants of the model that becomes a version, not those of others: kind -> folder."""
    folders = variant_folders(compression.folders["variants"])
    records = {folder: read_variant_record(folder) for folder in folders}
    return {record.kind.name: folder for folder, record in records.items() if record.model == OURS}


def held_kinds(version: Path) -> list[str]:
    """Name the kinds of the variants that a version holds."""
    return sorted(path.name for path in (version / VARIANTS).glob("*"))


def copy_variants(compression: Compression, variants: Path, evidence: Path) -> list[str]:
    """Copy the variants of the model and the measurements of all variants; without variants, nothing.

    Args:
        compression: The finished compression.
        variants: The new folder of the variants, which is made if there are any.
        evidence: The folder of the evidence.

    Returns:
        The kinds of the variants.

    Raises:
        InputError: A variant or its measurement is missing or damaged.
    """
    found = own_variants(compression)
    for kind, folder in found.items():
        shutil.copytree(folder, variants / kind)
    if found:
        copy_file(compression.reports / "variants" / VARIANTS_FILE, evidence / "variants" / VARIANTS_FILE)
        copy_file(compression.folders["costs"] / VARIANT_COSTS, evidence / "costs" / VARIANT_COSTS)
    return list(found)


def is_graph(path: PurePath) -> bool:
    """Return whether a path within a version is where the graph of a variant belongs."""
    is_inside = path.parent.parent.parent.as_posix() == VARIANTS
    return is_inside and path.parent.name in DENOISERS and path.name == GRAPH_FILE
