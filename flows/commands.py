"""A command line -> its exit code, its lines handed on as they come."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.errors import InputError, first_line


def stage_names() -> list[str]:
    """Read the names of the stages, in order of flow, from dvc.yaml.

    Raises:
        InputError: There is no dvc.yaml here, or it lists no stages.
    """
    try:
        return list(YAML(typ="safe").load(Path("dvc.yaml").read_text())["stages"])
    except (OSError, YAMLError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise InputError(f"dvc.yaml here lists no stages ({reason}); run the flow at the top of the project") from None


def run(command: list[str], tell: Callable[[str], None]) -> int:
    """Run a program of this environment in a process group of its own, which dies with this call."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            _hand_on(process.stdout, tell)
            return process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def _hand_on(lines: Iterable[str], tell: Callable[[str], None]) -> None:
    for line in lines:
        if line.strip():
            tell(line.rstrip())
