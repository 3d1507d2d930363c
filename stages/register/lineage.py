"""The workspace of a finished compression -> what is needed to make it again, and the hashes that must come out."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, model_validator

from stages.models.layout import PLAN
from stages.runtime.errors import InputError, without_password
from stages.runtime.git import git_output, without_git_variables
from stages.runtime.schema import Commit, Frozen, Sha256
from stages.storage.files import RUN_RECORD, file_sha256, read_json
from stages.storage.provenance import read_provenance
from stages.tracking.compression import Compression

CODE = ("stages", "flows", "dvc.yaml", "requirements.lock", "pyproject.toml")
"""What must stand in the commit as it is here."""
FileName = Literal["params.yaml", "dvc.lock", "dvc.yaml", "requirements.lock"]
FILES: tuple[FileName, ...] = get_args(FileName)
"""What travels with a version."""
DECISIVE = {".safetensors", ".npy"}


class Lineage(Frozen):
    """Where a version comes from."""

    git_commit: Commit
    git_remote: str | None
    """Where the commit can be had, without a password."""
    files: dict[FileName, Sha256]
    """Of those that lie beside this, all of them."""
    data_sha256: Sha256
    """Of the packed pixels."""
    outputs: dict[str, Sha256]
    """Path in the workspace -> hash, of all tensors, arrays and the plan, in the order of the stages."""
    runs: dict[str, dict[str, Any]]
    """Stage -> its run.json: params, code, versions, device."""
    dvc_remotes: list[str]
    """Where `dvc pull` may find the outputs."""
    store: str | None = None
    """Where the store holds the model: s3://BUCKET/PREFIX, manifest."""

    @model_validator(mode="after")
    def _is_whole(self) -> "Lineage":
        if set(self.files) != set(FILES):
            raise ValueError(f"it lacks {', '.join(set(FILES) - set(self.files))}")
        return self


def take_lineage(compression: Compression) -> Lineage:
    """Read the lineage off the workspace, here and now.

    Raises:
        InputError: The code is not committed, the pipeline is not up to date, or something of it is missing.
    """
    commit = git_output(Path(), "rev-parse", "--verify", "HEAD")
    if commit is None or git_output(Path(), "rev-parse", "--show-prefix"):
        raise InputError(
            "a version names its git commit, and this is not the top of a repository with one; commit first"
        )
    changed = git_output(Path(), "status", "--porcelain", "--", *(part for part in CODE if Path(part).exists()))
    if changed:
        found = ", ".join(line[3:] for line in changed.splitlines()[:5])
        raise InputError(f"{found} is not as in commit {commit[:12]}; commit it, since a version names its commit")
    if _dvc("status", "--quiet") is None:
        raise InputError("the pipeline is not up to date, or DVC cannot tell; run it first: make run")
    missing = [name for name in FILES if not Path(name).is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)} is not here, and a version cannot be made again without; restore it")
    dataset = read_json(compression.folders["fetch"].parent / "data" / "dataset.json")
    return Lineage(
        git_commit=commit,
        git_remote=without_password(git_output(Path(), "config", "--get", "remote.origin.url") or "") or None,
        files={name: file_sha256(Path(name)) for name in FILES},
        data_sha256=str(dataset.get("sha256")),
        outputs=hash_outputs(Path()),
        runs=read_runs(compression.folders),
        dvc_remotes=_list_remotes(),
    )


def read_runs(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Read the run.json of each stage, with the provenance beside it; null where its output came out of DVC's cache."""
    return {
        stage: {**read_json(folder / RUN_RECORD), "provenance": read_provenance(folder)}
        for stage, folder in folders.items()
    }


def hash_outputs(workspace: Path) -> dict[str, str]:
    """Hash what decides a model: tensors, arrays and the plan of every stage, in the order of the stages."""
    folders = ("pretrained", "data", "reference", "importance", "pruned", "finetuned")
    paths = (path for folder in folders for path in sorted((workspace / "artifacts" / folder).rglob("*")))
    chosen = [path for path in paths if path.suffix in DECISIVE or path.name == PLAN]
    return {path.relative_to(workspace).as_posix(): file_sha256(path) for path in chosen}


def read_lineage(evidence: Path) -> Lineage:
    """Read the lineage of a version.

    Raises:
        InputError: There is none, or it is damaged.
    """
    path = evidence / "lineage.json"
    if not path.is_file():
        raise InputError("the version has no lineage: nothing says which commit, params and data made it")
    try:
        return Lineage.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"the version's lineage is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None


def _list_remotes() -> list[str]:
    settings = (line.partition("=") for line in (_dvc("config", "--list") or "").splitlines())
    return [without_password(value) for key, _, value in settings if re.fullmatch(r"remote\..+\.url", key)]


def _dvc(*arguments: str) -> str | None:
    return _run(sys.executable, "-m", "dvc", *arguments)


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=without_git_variables())  # noqa: S603
    except OSError:
        return None
    return None if result.returncode else result.stdout.rstrip()
