"""A pretrained model, pruned to 56 % of its MACs -> quality of each recipe of recovery, at equal steps and seeds."""

import csv
import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from stages.data.images import read_images
from stages.evaluate.consistency import images_to_ssim
from stages.evaluate.quality import QualityMetrics
from stages.finetune.batches import heldout_batch
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.distillation import kept_channels
from stages.finetune.engine import Engine
from stages.finetune.params import FinetuneParams
from stages.finetune.recovery import with_fresh_weights
from stages.finetune.trainer import Trainer
from stages.importance.calibration import calibrate
from stages.importance.params import ImportanceParams
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.sampling import draw, image_seeds
from stages.protocol.extractors import Extractor
from stages.protocol.intervals import estimate
from stages.protocol.params import ExtractorParams, ReferenceParams
from stages.protocol.resolve import make_protocol
from stages.prune.compensate import NoisyBatches
from stages.prune.params import CompensateParams, PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.runtime.seeds import derive_seed

COMPENSATE = CompensateParams(num_images=32, num_timesteps=10, damping=0.1, rounds=6)
BUDGET = "56%"
NUM_IMAGES, BATCH_SIZE = 500, 100
QUALITY = ReferenceParams(
    sampler=SamplerParams(steps=20),
    num_images=NUM_IMAGES,
    batch_size=BATCH_SIZE,
    extractor=ExtractorParams(name="digits"),
    kid_subsets=50,
    kid_subset_size=250,
)
PAPER_EMA = 0.9999
DECAYS = (0.9, 0.95, PAPER_EMA)
"""In a short run the last one follows its ramp only."""
METRICS = ("fid", "kid", "ssim", "loss")
COLUMNS = ("variant", "seed", "ema", "ema_decay", *METRICS)


@dataclass(frozen=True)
class Variant:
    """One recipe; the defaults are the paper's: noise loss, constant learning rate, no compensation."""

    loss: Mapping[str, float]
    schedule: str = "constant"
    compensate: bool = False
    init: str = "pruned"


NOISE = {"noise": 1.0}
KD = {"noise": 0.0, "output": 1.0}
BOTH = {**KD, "feature": 0.1}
VARIANTS = {
    "noise": Variant(NOISE),
    "noise + output": Variant({**NOISE, "output": 1.0}),
    "noise + feature": Variant({**NOISE, "feature": 0.1}),
    "output": Variant(KD),
    "noise, min-SNR": Variant({**NOISE, "min_snr": 5.0}),
    "noise, compensated": Variant(NOISE, compensate=True),
    "noise, scratch": Variant(NOISE, init="scratch"),
    "output + feature": Variant(BOTH),
    "output + feature, cosine": Variant(BOTH, schedule="cosine"),
    "output + feature, cosine, compensated": Variant(BOTH, schedule="cosine", compensate=True),
}


class Bench:
    """Prunes one dense model, trains it by a recipe and measures the result."""

    def __init__(self, model: Path, data: Path, steps: int, batch_size: int, learning_rate: float) -> None:
        self.unet, self.scheduler = read_unet(model), read_scheduler(model)
        self.images = read_images(data)
        self.steps, self.batch_size, self.learning_rate = steps, batch_size, learning_rate
        self.extractor = Extractor(QUALITY.extractor, BATCH_SIZE)
        real = self.images.train[: 10 * NUM_IMAGES]
        self.quality_metrics = QualityMetrics(
            self.extractor.features(real), make_protocol(QUALITY, 0, self.scheduler, real, self.extractor)
        )
        self.dense: dict[int, NDArray[np.uint8]] = {}
        self.pruned: dict[tuple[int, bool], tuple[Any, Any]] = {}

    def prune(self, seed: int, *, compensated: bool) -> tuple[Any, Any]:
        """Prune with the importance of a seed, once: the pruned model and its plan."""
        if (seed, compensated) not in self.pruned:
            importance_params = ImportanceParams(
                criterion="diff-pruning", formula="paper", threshold=0.05, num_images=16, stride=10
            )
            importance = calibrate(self.unet, self.scheduler, self.images, importance_params, seed)
            params = PruneParams(target=Target(macs=BUDGET), compensate=COMPENSATE if compensated else None)
            plan = plan_pruning(self.unet, importance, params, derive_seed(seed, "random importance"))
            noisy = NoisyBatches(self.unet, self.scheduler, self.images, COMPENSATE, seed)
            self.pruned[seed, compensated] = prune_unet(self.unet, plan, noisy), plan
        return self.pruned[seed, compensated]

    def rows(self, name: str, variant: Variant, seed: int, scratch: Path) -> list[dict[str, object]]:
        """Train one variant with one seed: a row for the paper's EMA and one for the best."""
        pruned, plan = self.prune(seed, compensated=variant.compensate)
        params = FinetuneParams(
            init=variant.init,
            steps=self.steps,
            batch_size=self.batch_size,
            loss=variant.loss,
            learning_rate=self.learning_rate,
            schedule=variant.schedule,
            ema_decays=DECAYS,
            clip_norm=1.0,
            flip=False,
            heldout_images=512,
            heldout_every=self.steps,
            checkpoint_every=self.steps,
        )
        unet = with_fresh_weights(pruned, derive_seed(seed, "scratch"))
        if variant.init == "pruned":
            unet.load_state_dict(pruned.state_dict())
        teacher = (self.unet, kept_channels(self.unet, plan)) if params.loss.needs_teacher else None
        engine = Engine(params.engine, self.unet.device)
        trainer = Trainer(unet, self.scheduler, self.images, params, seed, teacher, engine)
        checkpoints = Checkpoints(scratch, sha256(f"{name} {seed}".encode()).hexdigest())
        checkpoints.clear()  # those of an interrupted variant
        trainer.run(checkpoints)
        best = trainer.curve[-1].ema_decay
        measured = {decay: self.measure(trainer.ema_models.models[decay], seed) for decay in {PAPER_EMA, best}}
        return [
            {"variant": name, "seed": seed, "ema": kind, "ema_decay": decay, **measured[decay]}
            for kind, decay in (("paper", PAPER_EMA), ("best", best))
        ]

    def measure(self, unet: torch.nn.Module, seed: int) -> dict[str, float]:
        """Measure FID, KID, SSIM to the dense model's images from the same noise, and the held-out loss."""
        if seed not in self.dense:
            self.dense[seed] = self.sample(self.unet, seed)
        drawn = self.sample(unet, seed)
        quality = self.quality_metrics(self.extractor.features(drawn), seed)
        return {
            "fid": quality.fid,
            "kid": quality.kid,
            "ssim": float(images_to_ssim(drawn, self.dense[seed]).mean()),
            "loss": self.loss(unet),
        }

    @torch.no_grad()
    def loss(self, unet: torch.nn.Module) -> float:
        """Compute the mean squared error of the noise on the held-out images."""
        batch = heldout_batch(self.images, 512, self.scheduler.config["num_train_timesteps"])
        noisy = self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
        return float((unet(noisy, batch.timesteps).sample - batch.noise).square().mean())

    def sample(self, unet: torch.nn.Module, seed: int) -> NDArray[np.uint8]:
        """Draw the images of a seed: [N, C, H, W] uint8."""
        seeds = image_seeds(seed, NUM_IMAGES)
        return draw(unet, self.scheduler, seeds, QUALITY.sampler, batch_size=BATCH_SIZE, label="images")


def table(path: Path) -> str:
    """Format a Markdown table: mean ± half the 95 % interval over the seeds, and the difference from the first row."""
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            cells[row["variant"], row["ema"]][row["seed"]] = row
    base = cells["noise", "paper"]
    lines = [
        "| recipe | EMA | FID | FID − first | KID·10³ | SSIM | SSIM − first | loss·10³ |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    for (variant, ema), rows in cells.items():
        same = {key: row["ema_decay"] for key, row in cells[variant, "paper"].items()}
        if ema == "best" and same == {key: row["ema_decay"] for key, row in rows.items()}:
            continue  # the best EMA was the paper's with every seed
        seeds = sorted(set(rows) & set(base))
        values = {key: [float(rows[seed][key]) for seed in seeds] for key in METRICS}
        deltas = {key: [float(rows[seed][key]) - float(base[seed][key]) for seed in seeds] for key in METRICS}
        columns = [
            interval(values["fid"], 3),
            interval(deltas["fid"], 3),
            interval([1000 * value for value in values["kid"]], 1),
            interval(values["ssim"], 4),
            interval(deltas["ssim"], 4),
            interval([1000 * value for value in values["loss"]], 2),
        ]
        lines.append(f"| {variant} | {ema} | {' | '.join(columns)} |")
    return "\n".join(lines)


def interval(values: list[float], digits: int) -> str:
    """Format the mean ± half the 95 % interval; the value alone if there is one, or all are 0."""
    if len(values) < 2 or not any(values):  # noqa: PLR2004
        return f"{values[0]:.{digits}f}"
    found = estimate(values)
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"


@click.command()
@click.option("--model", type=Path, default=Path("artifacts/pretrained"), help="The dense model.")
@click.option("--data", type=Path, default=Path("artifacts/data"), help="Packed images, as fetch writes them.")
@click.option(
    "--out", type=Path, default=Path("reports/recovery.csv"), help="Table of measurements; existing rows are kept."
)
@click.option("--steps", type=click.IntRange(1), default=450, help="Steps of each training.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images per step.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4, help="Highest learning rate of Adam."
)
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=range(5), help="Seeds of pruning, training and drawing."
)
@click.option("--variant", "names", type=click.Choice(list(VARIANTS)), multiple=True, default=list(VARIANTS))
def main(
    model: Path,
    data: Path,
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seeds: tuple[int, ...],
    names: tuple[str, ...],
) -> None:
    """Measure the variants and seeds that the table lacks, then print it."""
    bench = Bench(model, data, steps, batch_size, learning_rate)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+", newline="") as file:
        file.seek(0)
        done = {(row["variant"], row["seed"]) for row in csv.DictReader(file)}
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for seed, name in itertools.product(seeds, names):
            if (name, str(seed)) not in done:
                writer.writerows(bench.rows(name, VARIANTS[name], seed, out.parent / "recovery"))
                file.flush()
    click.echo(table(out))


if __name__ == "__main__":
    main()
