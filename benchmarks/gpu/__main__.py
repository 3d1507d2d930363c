"""A GPU -> its tests, latencies of the paper's models, speed of importance, finetune and sampling, part by part.

It needs only what the stages import as they start, and pytest for the tests.
"""

import warnings
from pathlib import Path

import click
import torch

from benchmarks.gpu.bench import FULL, SYSTEM_NAMES, TINY, Bench, Rows, reason_of
from benchmarks.gpu.parts import finetune, importance, sampling, table
from benchmarks.gpu.record import markdown, write_part
from benchmarks.gpu.suite import run_tests
from stages.models.sampling import DTYPES
from stages.runtime.device import select_device
from stages.runtime.errors import InputError
from stages.storage.files import cannot_write

PARTS = {"tests": run_tests, "table": table, "importance": importance, "finetune": finetune, "sampling": sampling}


def select(device_name: str, *, tiny: bool) -> torch.device:
    """Return the device, with PyTorch switched to full float32.

    Raises:
        InputError: There is no GPU, or the CPU is to run the real models.
    """
    found = select_device()
    if device_name == "cuda" and found.type == "cpu":
        raise InputError("PyTorch finds no GPU here; run this where it does, or try it with --device cpu --tiny")
    if device_name == "cpu" and not tiny:
        raise InputError("on a CPU the real models take hours; add --tiny, or take --device cuda")
    return torch.device(device_name)


def make_folder(out: Path) -> None:
    """Make the folder before anything is measured.

    Raises:
        InputError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None


def measure(name: str, bench: Bench) -> Rows:
    """Run one part; one that fails has its reason as its only row, so that the others go on."""
    try:
        return PARTS[name](bench)
    except Exception as error:  # noqa: BLE001  # time on a GPU is short
        return [{"reason": reason_of(error)}]


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Repeatable; by default all.")
@click.option("--out", type=Path, help="Folder for PART.md and PART.json; by default tables are only printed.")
@click.option("--device", "device_name", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--tiny", is_flag=True, help="Tiny models in float32, not compiled, in seconds: a trial, not a measurement."
)
@click.option("--compiled/--no-compiled", default=True, help="Whether to time torch.compile, which takes minutes more.")
@click.option("--system", "systems", multiple=True, type=click.Choice(SYSTEM_NAMES), help="Of the table; default: all.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(DTYPES)), help="By default all.")
def main(
    parts: tuple[str, ...],
    out: Path | None,
    device_name: str,
    systems: tuple[str, ...],
    precisions: tuple[str, ...],
    *,
    tiny: bool,
    compiled: bool,
) -> None:
    """Measure this machine's GPU, part by part, each in less than nine minutes."""
    bench = Bench(
        select(device_name, tiny=tiny),
        systems or SYSTEM_NAMES,
        precisions or (("float32",) if tiny else tuple(DTYPES)),
        compiled and not tiny,
        tiny,
        TINY if tiny else FULL,
    )
    if out:
        make_folder(out)
    failed: list[str] = []
    for name in [name for name in PARTS if name in (parts or PARTS)]:
        click.echo(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", err=True)
        with warnings.catch_warnings(action="ignore"):  # the compiler's, about diffusers
            rows = measure(name, bench)
        click.echo(f"\n{markdown(rows)}\n")
        if out:
            write_part(name, rows, bench, out)
        failed += [f"{name}: {row['reason']}" for row in rows if row.get("reason", "").startswith("failed with")]
    if unexpected := [line for line in failed if "OutOfMemory" not in line]:
        raise InputError(f"{len(unexpected)} rows failed, the first in {unexpected[0]}")


if __name__ == "__main__":
    main()
