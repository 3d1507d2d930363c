"""Model folders and params -> a folder for each variant."""

from collections.abc import Mapping
from pathlib import Path

from stages.models.variants.folder import write_variant
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.variants.params import VariantsParams


def build_variants(params: VariantsParams, models: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Write every variant of every model that params name.

    Args:
        params: The block variants.
        models: Name of a model -> its folder.
        out: An existing folder.

    Returns:
        Name of each variant -> its folder, in the order of params.

    Raises:
        InputError: A model cannot have such a variant.
    """
    chosen = [(model, kind) for model in params.models for kind in params.parsed()]
    folders = {}
    for model, kind in track(chosen, "build variants, variant", len(chosen)):
        name = f"{model}+{kind.name}"
        folders[name] = out / name
        folders[name].mkdir()
        try:
            write_variant(model, models[model], kind, folders[name])
        except InputError as error:
            raise type(error)(f"variant {name}: {error.message}") from None
    return folders
