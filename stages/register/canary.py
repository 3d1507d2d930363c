"""The folder of a version and seeds -> the images that it draws, in a subprocess without credentials.

A version contains code that nobody has reviewed, so the process that promotes it does not load it.
"""

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from stages.runtime.errors import InputError

SECRET_PREFIXES = ("AWS_", "AZURE_", "DATABRICKS_", "ESPALIER_", "GOOGLE_", "HF_TOKEN", "MLFLOW_", "PG", "PREFECT_")
"""Prefixes of environment variables that may hold credentials or the address of a server."""
TIMEOUT_S = 1800


def draw_isolated(folder: Path, seeds: Sequence[int]) -> dict[int, bytes]:
    """Load a version with mlflow.pyfunc in a subprocess and draw one image per seed: seed -> PNG.

    Raises:
        InputError: The version cannot be loaded, does not draw, or exceeds the time limit.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "stages.register.canary", str(folder.resolve()), out, *map(str, seeds)]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(SECRET_PREFIXES)},
            "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            result = subprocess.run(  # noqa: S603
                command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"the version does not draw {len(seeds)} images within {TIMEOUT_S} s") from None
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise InputError(f"the version does not draw ({reason})")
        return {int(path.stem): path.read_bytes() for path in Path(out).glob("*.png")}


def draw_in_process(folder: Path, out: Path, seeds: Sequence[int]) -> None:
    """Load a version in this process and write SEED.png for each seed."""
    import mlflow

    for row in mlflow.pyfunc.load_model(str(folder)).predict({"seed": list(seeds)}):
        (out / f"{int(row['seed'])}.png").write_bytes(base64.b64decode(row["png"]))


@click.command()
@click.argument("folder", type=Path)
@click.argument("out", type=Path)
@click.argument("seeds", type=int, nargs=-1)
def main(folder: Path, out: Path, seeds: tuple[int, ...]) -> None:
    """Draw SEEDS with the version in FOLDER into the folder OUT."""
    draw_in_process(folder, out, seeds)


if __name__ == "__main__":
    main()
