"""Git commands in any repository, without the variables that Git sets for its hooks."""

import os
import subprocess
from pathlib import Path

from stages.runtime.errors import without_password


def git_output(folder: Path, *arguments: str) -> str | None:
    """Run git in a folder and return its output without the last newlines; None if it fails or is not installed."""
    code, output, _ = _run(folder, *arguments)
    return None if code else output.rstrip("\n")


def git_error(folder: Path | None, *arguments: str) -> str:
    """Run git and return its error message in one line, without passwords; empty if it succeeds.

    Args:
        folder: Where git runs; None for the current folder.
        arguments: The git command and its arguments.
    """
    code, _, message = _run(folder, *arguments)
    return without_password(" ".join(message.split()) or "git failed") if code else ""


def without_git_variables() -> dict[str, str]:
    """Copy the environment without GIT_*.

    Git sets these variables for its hooks; a command for another repository would otherwise change the hook's.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def _run(folder: Path | None, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, output and error message; code 1 if the folder or git itself is missing."""
    if folder is not None and not folder.is_dir():
        return 1, "", f"{folder} does not exist or is not a folder"
    command = ["git", *(["-C", str(folder)] if folder else []), *arguments]
    try:
        result = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a file or name may be in any encoding
            check=False,
            env=without_git_variables(),
        )
    except OSError:
        return 1, "", "git is not installed"
    return result.returncode, result.stdout, result.stderr
