"""DVC and the flow on the same work -> what Prefect adds: seconds on a finished pipeline, and a share of real work."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

import click

from flows.workspaces.overrides import apply

ROOT = Path(__file__).parents[1]
PARTS = [".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "flows", "params.yaml", "requirements.lock", "stages"]
WORK = {
    "importance.stride": 10,
    "finetune.steps": 200,
    "reference.sets": 2,
    "costs.batches": [1],
    "costs.precisions": ["float32"],
}
"""Overrides for about two minutes of work on two cores."""
FLOW = [sys.executable, "-m", "flows", "compress"]
DVC = [sys.executable, "-m", "dvc", "repro"]


def copy_project(place: Path) -> None:
    """Copy the files that a run needs into a new repository without outputs."""
    for part in PARTS:
        source, target = ROOT / part, place / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    (place / "params.yaml").write_bytes(apply(WORK, ROOT / "params.yaml"))
    subprocess.run(["git", "init", "--quiet"], cwd=place, check=True)  # noqa: S607


def seconds(command: list[str], place: Path, environment: dict[str, str]) -> float:
    """Run a command that must succeed; returns its seconds, those of Python's start included."""
    begin = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=place, env=environment, check=True, **quiet)  # type: ignore[call-overload]  # noqa: S603
    return time.perf_counter() - begin


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run a Prefect server on loopback; yields the environment variables of its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    auth = f"admin:{secrets.token_hex(16)}"
    settings = {
        "PREFECT_HOME": str(folder / "server"),
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_API_PORT": str(port),
    }
    command = [sys.executable, "-m", "flows", "server"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env={**environment, **settings}, **quiet) as server:  # type: ignore[call-overload]  # noqa: S603
        address = f"http://127.0.0.1:{port}/api"
        try:
            while not _answers(address):
                time.sleep(0.2)
            yield {"PREFECT_API_URL": address, "PREFECT_API_AUTH_STRING": auth}
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=2):  # noqa: S310  # loopback
            return True
    except (URLError, OSError):
        return False


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of the finished pipeline.")
@click.option(
    "--work", type=click.IntRange(0), default=1, help="Rounds of real work, by DVC and by the flow; minutes each."
)
def main(rounds: int, work: int) -> None:
    """Print medians; the machine should be otherwise idle."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = {
            **os.environ,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "ESPALIER_HOME", "ESPALIER_REPOSITORY"):
            environment.pop(name, None)
        ratios = []
        with serving(folder, environment) as client:
            for turn in range(work):
                spent = {}
                for name in ("dvc", "flow") if turn % 2 == 0 else ("flow", "dvc"):
                    place = folder / f"{name}-{turn}"
                    copy_project(place)
                    given = environment | (client if name == "flow" else {})
                    spent[name] = seconds(DVC if name == "dvc" else FLOW, place, given)
                ratios.append(spent["flow"] / spent["dvc"])
                click.echo(f"real work: dvc repro {spent['dvc']:.1f} s, flow {spent['flow']:.1f} s, {ratios[-1]:.3f}×")
            place = folder / "finished"
            copy_project(place)
            seconds(DVC, place, environment)
            cases = {
                "dvc repro": (DVC, environment),
                "flow, no server running": (FLOW, environment),
                "flow, a server running": (FLOW, environment | client),
            }
            times: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name, (command, given) in cases.items():
                    times[name].append(seconds(command, place, given))
        for name, found in times.items():
            click.echo(f"finished pipeline, {name}: {median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
        if ratios:
            click.echo(f"real work: {median(ratios):.3f}× bare DVC")


if __name__ == "__main__":
    main()
