"""The current folder -> findings about params.yaml, the weights of its extractor, and Git."""

from collections.abc import Iterator
from pathlib import Path

import flows
from flows.doctor.finding import Finding
from stages.runtime.git import git_error, git_output

PARAMS, CODE = Path("params.yaml"), Path(flows.__file__).parent


def check_params() -> Iterator[Finding]:
    """Check params.yaml and that this is the top of a project.

    Raises:
        InputError: A value is not allowed.
    """
    from stages.params import load_params

    for path in (PARAMS, Path("dvc.yaml"), Path(".dvc")):
        if not path.exists():
            yield Finding("fail", f"no {path} here; run this at the top of the project")
            return
    load_params(PARAMS)
    yield Finding("ok", f"every value of {PARAMS} is allowed")
    if Path("flows").is_dir() and not Path("flows").samefile(CODE):
        advice = "run make setup here, or type python -m flows in place of espalier"
        yield Finding("warn", f"espalier runs the code of {CODE.parent}, not that of this folder; {advice}")


def check_extractor() -> Iterator[Finding]:
    """Check that the weights of the extractor are here, or where a run would download them from.

    Raises:
        InputError: The name is not allowed, or the weights are missing or have another hash.
    """
    from stages.protocol.extractors import SOURCES, Extractor, find_extractor
    from stages.protocol.params import ReferenceParams
    from stages.runtime.schema import load_block

    if not PARAMS.is_file():
        return
    params = load_block(PARAMS, "reference", ReferenceParams).extractor
    if not find_extractor(params).is_file():
        advice = "the first run downloads them, or set reference.extractor.weights"
        url = SOURCES[params.name].url
        yield Finding("warn", f"the weights of {params.name} are not on this machine ({url}); {advice}")
    else:
        yield Finding("ok", f"{params.name} loads, with sha256 {Extractor(params, 1).sha256[:8]}")


def check_git() -> Iterator[Finding]:
    """Check that the folder is a Git repository with a commit."""
    commit = git_output(Path(), "rev-parse", "--short", "HEAD")
    if commit is None:
        reason = git_error(Path(), "rev-parse", "--short", "HEAD")
        need = "flows on commits and the registry need a commit: git init, git add and git commit"
        yield Finding("warn", f"no commit here ({reason}); the stages run, but {need}")
        return
    changed = [line for line in (git_output(Path(), "status", "--porcelain") or "").splitlines() if line]
    if changed:
        text = f"{len(changed)} uncommitted changes since {commit}"
        yield Finding("warn", f"{text}: run and compress see them, runs of commits and sweeps do not; commit them")
    else:
        yield Finding("ok", f"at {commit}, nothing uncommitted")
