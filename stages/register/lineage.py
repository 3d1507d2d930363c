"""The workspace of a finished compression -> its lineage: what reproduces it, and the hashes of its outputs."""

import re
import reprlib
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, model_validator

from stages.models.layout import PLAN
from stages.runtime.errors import InputError, without_password
from stages.runtime.git import git_output, without_git_variables
from stages.runtime.schema import Commit, Frozen, Sha256
from stages.runtime.text import strings
from stages.storage.files import file_sha256, read_json
from stages.storage.run_record import read_provenance
from stages.tracking.compression import Compression

CODE = ("stages", "flows", "dvc.yaml", "requirements.lock", "pyproject.toml")
"""Paths that must be committed before a version is registered."""
FileName = Literal["params.yaml", "dvc.lock", "dvc.yaml", "requirements.lock"]
FILES: tuple[FileName, ...] = get_args(FileName)
"""Files of the workspace that are copied into the version."""
ARRAYS = {".safetensors", ".npy", ".onnx"}


class Lineage(Frozen):
    """What a version was made from."""

    git_commit: Commit
    """Commit whose code made the version: HEAD when it was registered."""
    git_remote: str | None
    """Address of the remote origin, without a password."""
    files: dict[FileName, Sha256]
    """File of the workspace -> sha256; the files lie beside the lineage."""
    data_sha256: Sha256
    """Hash of the packed pixels."""
    outputs: dict[str, Sha256]
    """Path in the workspace -> sha256, of all tensors, arrays, graphs and the plan, in the order of the stages."""
    runs: dict[str, dict[str, Any]]
    """Stage -> its run.json, and under `provenance` the device, time and commit of the run; null if unknown."""
    dvc_remotes: list[str]
    """Addresses from which `dvc pull` may fetch the outputs, without passwords."""
    store: str | None = None
    """Address of the model in the store, s3://BUCKET/PREFIX, and its manifest."""

    @model_validator(mode="after")
    def _is_complete(self) -> "Lineage":
        if set(self.files) != set(FILES):
            raise ValueError(f"it lacks {', '.join(set(FILES) - set(self.files))}")
        return self


def read_workspace_lineage(compression: Compression) -> Lineage:
    """Read the lineage of a compression from the current folder, its workspace.

    Raises:
        InputError: The code is not committed, the pipeline is not up to date, or a file is missing.
    """
    commit = _head()
    if _dvc("status", "--quiet") is None:
        raise InputError("the pipeline is not up to date, or `dvc status` failed; run the pipeline first: espalier run")
    missing = [name for name in FILES if not Path(name).is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)} is missing, and reproducing a version needs it; restore it")
    runs = read_runs(compression)
    dataset = read_json(compression.folders["fetch"].parent / "data" / "dataset.json")
    return Lineage(
        git_commit=commit,
        git_remote=without_password(git_output(Path(), "config", "--get", "remote.origin.url") or "") or None,
        files={name: file_sha256(Path(name)) for name in FILES},
        data_sha256=str(dataset.get("sha256")),
        outputs=hash_outputs(Path()),
        runs=runs,
        dvc_remotes=_dvc_remotes(),
    )


def _head() -> str:
    """Return the commit of HEAD, after checking that the code is committed."""
    commit = git_output(Path(), "rev-parse", "--verify", "HEAD")
    if commit is None or git_output(Path(), "rev-parse", "--show-prefix"):
        raise InputError(
            "a version names its git commit, and this is not the top folder of a repository with a commit; commit first"
        )
    changed = git_output(Path(), "status", "--porcelain", "--", *(path for path in CODE if Path(path).exists()))
    if changed:
        paths = ", ".join(line[3:] for line in changed.splitlines()[:5])
        raise InputError(f"{paths} is not as in commit {commit[:12]}; commit it, since a version names its commit")
    return commit


def read_runs(compression: Compression) -> dict[str, dict[str, Any]]:
    """Read the record of each stage and its provenance, which is null if the last run here wrote another one."""
    return {
        stage: {**record, "provenance": read_provenance(compression.folders[stage])}
        for stage, record in compression.records().items()
    }


def hash_outputs(workspace: Path) -> dict[str, str]:
    """Hash the tensors, arrays, graphs and the plan of every stage, in the order of the stages: path -> sha256."""
    folders = ("pretrained", "data", "reference", "importance", "pruned", "rounds", "finetuned", "variants")
    paths = (path for folder in folders for path in sorted((workspace / "artifacts" / folder).rglob("*")))
    hashed = [path for path in paths if path.suffix in ARRAYS or path.name == PLAN]
    return {path.relative_to(workspace).as_posix(): file_sha256(path) for path in hashed}


def read_lineage(evidence: Path) -> Lineage:
    """Read the lineage of a version from its evidence.

    Raises:
        InputError: The lineage is missing or damaged.
    """
    path = evidence / "lineage.json"
    if not path.is_file():
        raise InputError("the version has no lineage, so its commit, params and data are unknown; register it again")
    tree = read_json(path)
    if odd := next((text for text in strings(tree) if not text.isprintable()), None):
        raise InputError(f"the version's lineage is damaged: {reprlib.repr(odd)} holds control characters")
    try:
        return Lineage.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"the version's lineage is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None


def _dvc_remotes() -> list[str]:
    settings = (line.partition("=") for line in (_dvc("config", "--list") or "").splitlines())
    return [without_password(value) for key, _, value in settings if re.fullmatch(r"remote\..+\.url", key)]


def _dvc(*arguments: str) -> str | None:
    """Run DVC in the current folder and return its output; None if it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=without_git_variables())  # noqa: S603
    return None if result.returncode else result.stdout
