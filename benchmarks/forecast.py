"""A preset and the sizes of its models -> MACs of each stage, memory of finetuning, and hours at a given rate."""

from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.systems import PRESETS, SYSTEM_OF
from stages.params import Params, load_params

TIMESTEPS = 1000
STOPS_AT = 0.25
"""Share of the timesteps after which the threshold T ends the sum; measured on CIFAR-10's model at T = .05."""
BACKWARD = 3
"""Cost of a forward and a backward pass relative to a forward pass."""
BYTES = 4
"""Per float32."""


@dataclass(frozen=True)
class Workload:
    """Computation and memory of a preset."""

    macs: dict[str, float]
    """Multiply-accumulates of each stage."""
    train_bytes: float
    """Weights, gradients, Adam's two moments, EMA and teacher, without activations."""

    def hours(self, tflops: float, gpus: int) -> dict[str, float]:
        """Return the hours of each stage at a sustained rate per GPU; all share each stage evenly."""
        rate = tflops * 1e12 / 2 * 3600
        return {stage: macs / rate / gpus for stage, macs in self.macs.items()}


def estimate(name: str, params: Params) -> Workload:
    """Count the MACs of the stages: passes of the dense and the pruned model times their MACs per pass."""
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
    return Workload(
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
@click.option("--tflops", default=40.0, help="Sustained rate of one GPU, in 10¹² operations per second.")
@click.option("--gpus", type=click.IntRange(1), default=1, help="GPUs that share each stage.")
@click.option("--params", "path", type=click.Path(path_type=Path), help="Params file instead of the preset's own.")
def main(names: tuple[str, ...], tflops: float, gpus: int, path: Path | None) -> None:
    """Print the hours of each stage, and the memory of finetuning without activations."""
    if path is not None and len(names) != 1:
        raise click.UsageError("--params needs exactly one preset; name it with --preset")
    print("| preset | reference | importance | finetune | evaluate | total | memory without activations |")
    print("| --- |" + " ---: |" * 6)
    for name in names:
        workload = estimate(name, load_params(path or PRESETS / f"{name}.yaml"))
        hours = workload.hours(tflops, gpus)
        cells = [f"{value:.1f} h" for value in (*hours.values(), sum(hours.values()))]
        print(f"| {name} | {' | '.join(cells)} | {workload.train_bytes / 2**30:.1f} GiB |")


if __name__ == "__main__":
    main()
