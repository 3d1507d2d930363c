"""A preset and the sizes of its models -> multiply-accumulates and memory of each stage, and hours by a rate."""

from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.systems import PRESETS, SYSTEM_OF
from stages.params import Params, load_params

TIMESTEPS = 1000
STOPS_AT = 0.25
"""Of the timesteps, where T ends the sum on a trained model; measured on CIFAR-10's at T = .05."""
BACKWARD = 3
"""A forward and a backward pass over a forward pass."""
BYTES = 4


@dataclass(frozen=True)
class Forecast:
    """What a preset asks for."""

    macs: dict[str, float]
    """Of each stage."""
    train_bytes: float
    """Weights, gradients, Adam's two moments, averages and teacher, without activations."""

    def hours(self, tflops: float, gpus: int) -> dict[str, float]:
        """Time at a sustained rate of one GPU; only finetuning is shared by several."""
        rate = tflops * 1e12 / 2 * 3600
        return {stage: macs / rate / (gpus if stage == "finetune" else 1) for stage, macs in self.macs.items()}


def forecast(name: str, params: Params) -> Forecast:
    """Count what the stages compute: passes of the dense and of the pruned model times their size."""
    system = SYSTEM_OF[name]
    dense, pruned = system.dense[1] * 1e9, system.pruned[1] * 1e9
    drawn = params.reference.num_images * params.reference.sets
    passes = drawn * params.reference.sampler.steps * (2 if params.reference.guidance not in (None, 1) else 1)
    importance = params.importance
    scored = importance.num_images * importance.batches * importance.noises * TIMESTEPS / importance.stride * STOPS_AT
    finetune = params.finetune
    step = finetune.batch_size * (BACKWARD * pruned + (dense if finetune.loss.needs_teacher else 0))
    copies = 4 + len(finetune.ema_decays)
    teacher = system.dense[0] if finetune.loss.needs_teacher else 0
    return Forecast(
        {
            "reference": passes * dense,
            "importance": scored * BACKWARD * dense,
            "finetune": finetune.steps * step,
            "evaluate": 2 * passes * pruned,
        },
        (copies * system.pruned[0] + teacher) * 1e6 * BYTES,
    )


@click.command()
@click.option("--preset", "names", multiple=True, type=click.Choice(list(SYSTEM_OF)), default=list(SYSTEM_OF))
@click.option("--tflops", default=40.0, help="What one GPU sustains on these models, in 10¹² operations a second.")
@click.option("--gpus", type=click.IntRange(1), default=1, help="That share each batch of finetuning.")
@click.option("--params", "path", type=click.Path(path_type=Path), help="In place of the preset's own file.")
def main(names: tuple[str, ...], tflops: float, gpus: int, path: Path | None) -> None:
    """Print hours of each stage, and the memory that finetuning takes before any activation."""
    if path is not None and len(names) != 1:
        raise click.UsageError("--params is of one preset; name it with --preset")
    print("| preset | reference | importance | finetune | evaluate | together | weights and their like |")
    print("| --- |" + " ---: |" * 6)
    for name in names:
        found = forecast(name, load_params(path or PRESETS / f"{name}.yaml"))
        hours = found.hours(tflops, gpus)
        cells = [f"{value:.1f} h" for value in (*hours.values(), sum(hours.values()))]
        print(f"| {name} | {' | '.join(cells)} | {found.train_bytes / 2**30:.1f} GiB |")


if __name__ == "__main__":
    main()
