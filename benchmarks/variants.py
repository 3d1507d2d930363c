r"""The variants of a run -> the CPU time of a pass of each, in turn: ratios that waiting for a busy CPU does not blur.

    python -m benchmarks.variants --dense artifacts/pretrained --pruned artifacts/pruned \
        --finetuned artifacts/finetuned --variants artifacts/variants --batch 1 --batch 16

Prints a table: CPU milliseconds of this process for a pass, median of the rounds, and the speed-up relative to dense.
A pass of a cache is the mean over a full one and those that reuse it. Takes one thread (OMP_NUM_THREADS=1), where the
CPU time of a pass is its time on an idle machine.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch

from stages.costs.variants import Candidate, cycle, read_candidates
from stages.models.pipeline import CPU, read_unet, weights_file
from stages.report.markdown import markdown_table
from stages.runtime.device import device_name, kernels
from stages.storage.files import file_sha256


def cpu_ms(run: Callable[[], object]) -> float:
    """CPU milliseconds that this process spends in a function, in all its threads."""
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


def measure(candidates: dict[str, Candidate], batch: int, rounds: int) -> dict[str, list[float]]:
    """Run all candidates in turn; returns the CPU milliseconds of each pass after a round to warm up."""
    runs = {name: cycle(candidate, batch) for name, candidate in candidates.items()}
    found = [{name: cpu_ms(run) / candidates[name].interval for name, run in runs.items()} for _ in range(rounds + 1)]
    return {name: [times[name] for times in found[1:]] for name in runs}


@click.command(help=__doc__)
@click.option("--dense", type=Path, required=True)
@click.option("--pruned", type=Path, required=True)
@click.option("--finetuned", type=Path, required=True)
@click.option("--variants", type=Path, required=True)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1, 16])
@click.option("--rounds", type=click.IntRange(1), default=30)
def main(dense: Path, pruned: Path, finetuned: Path, variants: Path, batches: tuple[int, ...], rounds: int) -> None:
    """Measure and print."""
    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    models = {name: read_unet(folder) for name, folder in folders.items()}
    hashes = {name: file_sha256(weights_file(folder)) for name, folder in folders.items()}
    candidates = read_candidates(models, hashes, variants, CPU)
    with kernels(deterministic=False), torch.inference_mode():
        measured = [measure(candidates, batch, rounds) for batch in batches]
    rows = []
    for name in candidates:
        row = [name]
        for times in measured:
            ratio = median(one / other for one, other in zip(times["dense"], times[name], strict=True))
            row += [f"{median(times[name]):.2f}", f"{ratio:.2f}×"]
        rows.append(row)
    header = ["variant", *(text for batch in batches for text in (f"CPU ms, batch {batch}", "speed-up"))]
    click.echo(f"{device_name()}, {rounds} rounds\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main()
