"""dvc.yaml -> the outputs of its stages, which no command beside the pipeline replaces."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from stages.runtime.errors import InputError, first_line

DVC_FILE = "dvc.yaml"
WRITTEN = ("outs", "metrics", "plots")
"""Keys of a stage in dvc.yaml whose entries are its outputs."""
TEMPLATES = ("${", "'foreach'", "'matrix'")
"""What a dvc.yaml holds, as Python prints it, if DVC makes its stages from templates."""


def beside_the_pipeline(_context: click.Context, parameter: click.Parameter, value: Path | str) -> Path | str:
    """Check, as the callback of an option, that an output folder is none of a stage; an address is no folder.

    Raises:
        InputError: It is the output of a stage, lies in one, or holds one.
    """
    if "://" not in str(value):
        check_no_stage_output(Path(value), parameter.opts[0])
    return value


def check_no_stage_output(out: Path, option: str) -> None:
    """Check that a folder is no output of a pipeline with dvc.yaml above it, or between it and the current folder.

    Raises:
        InputError: It is the output of a stage, lies in one, or holds one; or such a dvc.yaml cannot be read.
    """
    try:
        target, here = out.resolve(), Path.cwd()
    except (OSError, RuntimeError):  # links in a circle, or no current folder, which whoever writes there refuses
        return
    below = [folder for folder in (here, *here.parents) if folder != target and folder.is_relative_to(target)]
    places = [*below, target, *target.parents]
    for stage, path, file in (found for folder in places for found in _outputs(folder / DVC_FILE, option)):
        place = path.resolve()
        if target.is_relative_to(place) or place.is_relative_to(target):
            relation = "is" if target == place else "lies in" if target.is_relative_to(place) else "holds"
            found = f"{option} {out} {relation} {path.name}, an output of the stage {stage} in {file}"
            raise InputError(f"{found}; choose a folder beside those of the pipeline")


def _outputs(file: Path, option: str) -> Iterator[tuple[str, Path, Path]]:
    """List the outputs of a dvc.yaml: stage, path, and the file; none of a file without stages.

    Raises:
        InputError: It cannot be read, so that nobody knows its outputs.
    """
    if not file.is_file():
        return
    from ruamel.yaml import YAML  # noqa: PLC0415  # only commands with an output need it

    from stages.runtime.schema import read_tree  # noqa: PLC0415

    try:
        tree = read_tree(file, YAML(typ="safe"))
        if isinstance(tree, dict) and any(template in str(tree) for template in TEMPLATES):
            tree = _resolve_templates(tree, file)
    except InputError as error:
        found = f"{option} cannot be compared with the outputs of a pipeline ({error.message})"
        raise InputError(f"{found}; correct or shorten that file, or move it away") from None
    stages = tree.get("stages") if isinstance(tree, dict) else None
    for stage, entry in (stages if isinstance(stages, dict) else {}).items():
        for name in outputs(entry) if isinstance(entry, dict) else ():
            yield str(stage), file.parent / str(entry.get("wdir", ".")) / name, file


def _resolve_templates(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """Make the stages of a dvc.yaml from its templates and variables, as DVC does.

    Raises:
        InputError: A variable has no value, or a template is invalid.
    """
    from dvc.exceptions import DvcException  # noqa: PLC0415  # half a second that only such a file needs
    from dvc.parsing import DataResolver  # noqa: PLC0415
    from dvc.repo import Repo  # noqa: PLC0415

    folder = str(file.resolve().parent)
    try:
        with Repo(folder, uninitialized=True) as repo:
            resolved: dict[str, Any] = DataResolver(repo, folder, tree).resolve()
    except (AssertionError, AttributeError, DvcException, TypeError, ValueError) as error:
        raise InputError(f"DVC cannot resolve the templates in {file}: {first_line(error)}") from None
    return resolved


def outputs(stage: Mapping[str, object]) -> Iterator[str]:
    """List the paths that a stage of dvc.yaml writes; one with options is the key of a mapping."""
    for key in WRITTEN:
        entries = stage.get(key)
        for entry in entries if isinstance(entries, list) else []:
            yield str(next(iter(entry), "") if isinstance(entry, dict) else entry)
