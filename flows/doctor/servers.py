"""The servers that are set -> whether each answers, asked by a process of its own that cannot hang the doctor."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flows.doctor import probes
from flows.doctor.finding import Finding, Status
from stages.runtime.errors import without_password
from stages.runtime.origin import records_folder

LIMIT_S = 30.0
"""Longest wait for a probe, most of which its imports take on a busy machine."""
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "AWS_MAX_ATTEMPTS": "1"}
"""Environment of the probes: they ask once."""


def check_remote() -> Iterator[Finding]:
    """Check that DVC's default remote can be read."""
    if not Path(".dvc").is_dir():
        return
    yield _ask("remote", "fail", "add one for other machines: dvc remote add -d storage s3://bucket/path")


def check_store() -> Iterator[Finding]:
    """Check that the bucket in ESPALIER_STORE can be read."""
    if os.environ.get("ESPALIER_STORE"):
        yield _ask("store", "fail")
    else:
        yield Finding("ok", "ESPALIER_STORE is not set: checkpoints stay on this machine")


def check_mlflow() -> Iterator[Finding]:
    """Check that the server in MLFLOW_TRACKING_URI answers; without one, runs continue and the record waits."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        yield _ask("mlflow", "warn")
    else:
        yield Finding("ok", f"MLFLOW_TRACKING_URI is not set: the record goes to {records_folder() / 'mlflow.db'}")


def check_prefect() -> Iterator[Finding]:
    """Check that the server of the environment or the profile of Prefect answers.

    Raises:
        InputError: It refuses the password, or the address is invalid.
        UnavailableError: It does not answer, after which every flow would end.
    """
    from flows.tasks.server import find_server

    address = find_server()
    if address:
        yield Finding("ok", f"{without_password(address)} answers")
    else:
        yield Finding("ok", "no server is set: each flow starts one of its own, which ends with it")


def _ask(probe: str, otherwise: Status, advice: str = "") -> Finding:
    """Run a probe; its last line is what it found."""
    command = [sys.executable, "-m", probes.__name__, probe]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env={**os.environ, **QUICK}
        )
    except subprocess.TimeoutExpired:
        return Finding(otherwise, f"no answer in {LIMIT_S:.0f} s; check the address and the network")
    lines = (result.stdout or result.stderr).strip().splitlines() or ["the check printed nothing"]
    text = without_password(lines[-1].removeprefix("Error: "))
    if result.returncode:
        return Finding(otherwise, text)
    return Finding("ok", f"{text}; {advice}" if advice and text.startswith("no ") else text)
