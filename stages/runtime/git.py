"""Questions and commands to git, about other repositories than the one we are in, too."""

import os
import subprocess
from pathlib import Path

from stages.runtime.errors import without_password


def git_output(folder: Path, *arguments: str) -> str | None:
    """Ask git about a folder; None where it has no answer."""
    code, out, _ = _call(folder, *arguments)
    return None if code else out.rstrip("\n")


def git_error(folder: Path | None, *arguments: str) -> str:
    """Let git do something: what it complained of, in one line; nothing if it went well."""
    code, _, complaint = _call(folder, *arguments)
    return without_password(" ".join(complaint.split()) or "git failed") if code else ""


def outside_git() -> dict[str, str]:
    """Give the environment without what git tells its hooks, or a command for one repository would change another."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def _call(folder: Path | None, *arguments: str) -> tuple[int, str, str]:
    if folder is not None and not folder.is_dir():
        return 1, "", f"{folder} is not there"
    command = ["git", *(["-C", str(folder)] if folder else []), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=outside_git())  # noqa: S603
    except OSError:
        return 1, "", "git is not installed"
    return result.returncode, result.stdout, result.stderr
