"""The folder of a version and seeds -> the pictures that it draws, in a process that knows no password.

A version brings code of its own, which nobody here has read. So it is run beside the promoter, not inside.
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

SECRETIVE = ("AWS_", "AZURE_", "DATABRICKS_", "ESPALIER_", "GOOGLE_", "HF_TOKEN", "MLFLOW_", "PG", "PREFECT_")
"""How variables begin that may hold a secret, or lead to one."""
PATIENCE_S = 1800


def draw(folder: Path, seeds: Sequence[int]) -> dict[int, bytes]:
    """Load a version as a user would, by mlflow.pyfunc, and draw: seed -> PNG.

    Raises:
        InputError: It does not load or does not draw.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "stages.register.canary", str(folder.resolve()), out, *map(str, seeds)]
        plain = {key: value for key, value in os.environ.items() if not key.startswith(SECRETIVE)}
        environment = {
            **plain,
            "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            result = subprocess.run(  # noqa: S603
                command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"the version does not draw {len(seeds)} pictures in {PATIENCE_S} s") from None
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise InputError(f"the version does not draw ({reason})")
        return {int(path.stem): path.read_bytes() for path in Path(out).glob("*.png")}


def draw_here(folder: Path, out: Path, seeds: Sequence[int]) -> None:
    """Load and draw in this process, and write SEED.png for each."""
    import mlflow

    for row in mlflow.pyfunc.load_model(str(folder)).predict({"seed": list(seeds)}):
        (out / f"{int(row['seed'])}.png").write_bytes(base64.b64decode(row["png"]))


@click.command()
@click.argument("folder", type=Path)
@click.argument("out", type=Path)
@click.argument("seeds", type=int, nargs=-1)
def main(folder: Path, out: Path, seeds: tuple[int, ...]) -> None:
    """Draw SEEDS with the version in FOLDER into the folder OUT."""
    draw_here(folder, out, seeds)


if __name__ == "__main__":
    main()
