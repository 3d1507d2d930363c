"""dvc.yaml -> the outputs of its stages, which no command beside the pipeline replaces."""

from collections.abc import Iterator
from pathlib import Path

import click

from stages.runtime.errors import InputError

DVC_FILE = "dvc.yaml"


def beside_the_pipeline(_context: click.Context, parameter: click.Parameter, value: Path | str) -> Path | str:
    """Check, as the callback of an option, that an output folder is none of a stage; an address is no folder.

    Raises:
        InputError: It is the output of a stage, lies in one, or holds one.
    """
    if "://" not in str(value):
        check_no_stage_output(Path(value), parameter.opts[0])
    return value


def check_no_stage_output(out: Path, option: str) -> None:
    """Check that a folder is no output of the pipelines in the folders above it.

    Raises:
        InputError: It is the output of a stage, lies in one, or holds one.
    """
    try:
        target = out.resolve()
    except (OSError, RuntimeError):  # links in a circle, which whoever writes there refuses
        return
    for stage, path, file in (found for parent in (target, *target.parents) for found in _outputs(parent / DVC_FILE)):
        place = path.resolve()
        if target.is_relative_to(place) or place.is_relative_to(target):
            relation = "is" if target == place else "lies in" if target.is_relative_to(place) else "holds"
            found = f"{option} {out} {relation} {path.name}, an output of the stage {stage} in {file}"
            raise InputError(f"{found}; choose a folder beside those of the pipeline")


def _outputs(file: Path) -> Iterator[tuple[str, Path, Path]]:
    """List the outputs of a dvc.yaml: stage, path, and the file; none where DVC would not read it either."""
    if not file.is_file():
        return
    from ruamel.yaml import YAML  # noqa: PLC0415  # only commands with an output need it

    from stages.runtime.schema import read_tree  # noqa: PLC0415

    try:
        tree = read_tree(file, YAML(typ="safe"))
    except InputError:
        return
    stages = tree.get("stages") if isinstance(tree, dict) else None
    for stage, entry in (stages if isinstance(stages, dict) else {}).items():
        outs = entry.get("outs") if isinstance(entry, dict) else None
        for out in outs if isinstance(outs, list) else []:
            name = next(iter(out), "") if isinstance(out, dict) else out
            yield str(stage), file.parent / str(entry.get("wdir", ".")) / str(name), file
