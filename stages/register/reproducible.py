"""The params of a version -> one line if a reproduction must not run by them, or cannot."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.register.sandbox.environment import REPLACED
from stages.runtime.errors import InputError
from stages.runtime.presets import PRESETS
from stages.runtime.schema import flatten, read_tree

VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")


def check_reproducible(params: Path, commit: Path, passed: Collection[str], *, trust: bool) -> None:
    """Check the params that whoever registered a version wrote, before a command reads them.

    Args:
        params: params.yaml of the version.
        commit: Folder of its commit.
        passed: Names of the variables that its commands get as they are here.
        trust: Whether the code of a model that the commit does not name may run.

    Raises:
        InputError: They let the code of such a model run, or name something that a reproduction does not reach.
    """
    tree = read_tree(params, YAML(typ="safe"))
    model = _model_of(tree)
    if model.get("trust") and not trust and model not in _named_models(commit):
        found = "params.yaml of the version sets fetch.model.trust: true for a model that its commit does not name"
        raise InputError(f"{found}; read the denoiser.py of that model, then give --trust")
    if model.get("source") == "registry":
        found = "the base model of the version is in MLflow's registry, which a reproduction does not reach"
        raise InputError(f"{found}; versions of models from a folder, S3 or the Hub can be reproduced")
    for key, value in flatten(tree if isinstance(tree, dict) else {}):
        if isinstance(value, str) and value.startswith("~"):
            found = f"{key} of the version is {value}, and a reproduction has another home folder"
            raise InputError(f"{found}; versions whose params name absolute paths or $VARIABLES can be reproduced")
        if isinstance(value, str) and (missing := [it for it in VARIABLE.findall(value) if it not in passed]):
            found = f"{key} of the version is {value}, and a reproduction does not get {missing[0]}"
            is_replaced = missing[0] in REPLACED
            advice = "write the path itself" if is_replaced else "set it and add it to ESPALIER_EXTRA_VARIABLES"
            raise InputError(f"{found}; {advice}")


def _named_models(commit: Path) -> Iterator[dict[str, Any]]:
    """Yield the model of the commit's params.yaml and of each of its presets."""
    for path in (commit / "params.yaml", *sorted((commit / PRESETS).glob("*.yaml"))):
        if path.is_file():
            yield _model_of(read_tree(path, YAML(typ="safe")))


def _model_of(tree: object) -> dict[str, Any]:
    """Return the block fetch.model of params; a file of anyone's may hold anything."""
    for name in ("fetch", "model"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
