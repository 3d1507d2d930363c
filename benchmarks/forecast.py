"""A preset and the sizes of its models -> hours of each stage at a given rate, and memory of finetuning."""

from pathlib import Path

import click

from benchmarks.systems import PRESETS, SYSTEM_OF
from stages.params import Params, load_params
from stages.runtime.finite_range import FiniteRange
from stages.tools.planning.forecast import SHARED, forecast_stages, rates_at
from stages.tools.planning.workload import ModelSize, count_work, training_bytes

NAMES = [name for name, system in SYSTEM_OF.items() if system.preset is None]
"""Systems that have a preset of their own."""


def size_of(name: str) -> ModelSize:
    """Return the published sizes of a preset's models."""
    (dense_m, dense_g), (pruned_m, pruned_g) = SYSTEM_OF[name].dense, SYSTEM_OF[name].pruned
    return ModelSize(round(dense_m * 1e6), round(pruned_m * 1e6), dense_g * 1e9, pruned_g * 1e9)


def hours(name: str, params: Params, tflops: float, gpus: int = 1) -> dict[str, float]:
    """Return the hours of each stage that takes long, at a sustained rate per GPU; the GPUs share each evenly."""
    size = size_of(name)
    works = count_work(params, size, None, params.reference.sampler.steps)
    found = forecast_stages(params, works, rates_at(tflops, params, size), gpus)
    return {stage.name: stage.seconds / 3600 for stage in found if stage.name in (*SHARED, "rounds")}


@click.command()
@click.option("--preset", "names", multiple=True, type=click.Choice(NAMES), default=NAMES)
@click.option(
    "--tflops",
    type=FiniteRange(0, min_open=True),
    default=40.0,
    help="Sustained rate of one GPU, in 10¹² operations per second.",
)
@click.option("--gpus", type=click.IntRange(1), default=1, help="GPUs that share each stage.")
@click.option("--params", "path", type=click.Path(path_type=Path), help="Params file instead of the preset's own.")
def main(names: tuple[str, ...], tflops: float, gpus: int, path: Path | None) -> None:
    """Print the hours of each stage, and the memory of finetuning without activations."""
    if path is not None and len(names) != 1:
        raise click.UsageError("--params needs exactly one preset; name it with --preset")
    print("| preset | reference | importance | rounds | finetune | evaluate | total | memory without activations |")
    print("| --- |" + " ---: |" * 7)
    for name in names:
        params = load_params(path or PRESETS / f"{name}.yaml")
        found = hours(name, params, tflops, gpus)
        cells = [f"{found[stage]:.1f} h" for stage in ("reference", "importance", "rounds", "finetune", "evaluate")]
        memory = training_bytes(params, size_of(name)) / 2**30
        print(f"| {name} | {' | '.join(cells)} | {sum(found.values()):.1f} h | {memory:.1f} GiB |")


if __name__ == "__main__":
    main()
