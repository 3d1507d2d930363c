"""The digits model, not finetuned -> quality of each criterion by budget and seed, with and without compensation."""

import csv
import itertools
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch

from stages.data.images import read_images
from stages.evaluate.consistency import images_to_ssim
from stages.evaluate.quality import QualityMetrics
from stages.fetch.model import BUNDLED
from stages.finetune.batches import heldout_batch
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
from stages.runtime.errors import InputError
from stages.runtime.seeds import derive_seed

MODEL = BUNDLED / "digits"
CRITERIA = (
    ("random", "paper"),
    ("magnitude", "paper"),
    ("taylor", "paper"),
    ("taylor", "diffusers"),
    ("diff-pruning", "paper"),
    ("diff-pruning", "diffusers"),
    ("no-cancel-taylor", "paper"),
    ("fisher", "paper"),
    ("snr-taylor", "paper"),
)
BUDGETS = ("80%", "56%", "35%")
COMPENSATE = CompensateParams()
NUM_IMAGES, SAMPLER = 250, SamplerParams(steps=10)
QUALITY = ReferenceParams(
    sampler=SAMPLER,
    num_images=NUM_IMAGES,
    batch_size=125,
    extractor=ExtractorParams(name="digits"),
    kid_subsets=1,
    kid_subset_size=100,
)
COLUMNS = ("criterion", "formula", "macs", "compensated", "seed", "fid", "ssim", "loss")


class Bench:
    """The dense model, its data, and the measurements of pruned models."""

    def __init__(self, data: Path) -> None:
        self.unet, self.scheduler = read_unet(MODEL), read_scheduler(MODEL)
        self.images = read_images(data)
        self.heldout = heldout_batch(
            self.images, len(self.images.heldout), self.scheduler.config["num_train_timesteps"]
        )
        self.extractor = Extractor(QUALITY.extractor, QUALITY.batch_size)
        protocol = make_protocol(QUALITY, 0, self.scheduler, self.images.pixels, self.extractor)
        self.quality_metrics = QualityMetrics(self.extractor.features(self.images.pixels), protocol)
        self.dense: dict[int, np.ndarray] = {}

    def measure(self, unet: torch.nn.Module, seed: int) -> dict[str, float]:
        """Measure FID, SSIM with the dense model's images of the same noise, and the held-out loss."""
        samples = self.sample(unet, seed)
        if seed not in self.dense:
            self.dense[seed] = self.sample(self.unet, seed)
        images, noise, timesteps = self.heldout.images, self.heldout.noise, self.heldout.timesteps
        with torch.no_grad():
            predicted = unet(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = (predicted - noise).square().mean()
        quality = self.quality_metrics(self.extractor.features(samples), seed)
        ssim = images_to_ssim(samples, self.dense[seed]).mean()
        return {"fid": quality.fid, "ssim": float(ssim), "loss": float(loss)}

    def sample(self, unet: torch.nn.Module, seed: int) -> np.ndarray:
        """Sample NUM_IMAGES images, uint8 [N, C, H, W]."""
        seeds = image_seeds(seed, NUM_IMAGES)
        return draw(unet, self.scheduler, seeds, SAMPLER, batch_size=QUALITY.batch_size, label="images")

    def rows(self, criterion: str, formula: str, seed: int) -> list[dict[str, object]]:
        """Measure one criterion with one seed, at every budget, with and without compensation."""
        chosen = ImportanceParams(criterion=criterion, formula=formula, threshold=0.05, num_images=16, stride=4)
        importance = calibrate(self.unet, self.scheduler, self.images, chosen, seed)
        rows = []
        for macs, compensated in itertools.product(BUDGETS, (None, COMPENSATE)):
            params = PruneParams(target=Target(macs=macs), floor=0.1, compensate=compensated)
            plan = plan_pruning(self.unet, importance, params, derive_seed(seed, "random importance"))
            images = NoisyBatches(self.unet, self.scheduler, self.images, COMPENSATE, seed) if compensated else None
            pruned = prune_unet(self.unet, plan, images)
            labels = (criterion, formula, macs, compensated is not None, seed)
            rows.append(dict(zip(COLUMNS, labels, strict=False)) | self.measure(pruned, seed))
        return rows


def interval(values: list[float]) -> str:
    """Format the mean ± half the width of the 95 % interval."""
    estimated = estimate(values)
    return f"{estimated.mean:.3g} ± {estimated.half_width:.2g}"


def markdown_tables(path: Path) -> str:
    """Format one Markdown table per budget, with mean ± interval over the seeds."""
    rows: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            rows[row["macs"], row["criterion"], row["formula"], row["compensated"]].append(row)
    lines = []
    for macs in BUDGETS:
        lines += ["", f"MACs {macs}:", "", "| criterion | FID | FID, comp. | SSIM | SSIM, comp. | loss | loss, comp. |"]
        lines.append("| --- |" + " ---: |" * 6)
        for criterion, formula in CRITERIA:
            values = [
                interval([float(row[key]) for row in rows[macs, criterion, formula, compensated]])
                for key in ("fid", "ssim", "loss")
                for compensated in ("False", "True")
            ]
            lines.append(f"| {criterion}, {formula} | {' | '.join(values)} |")
    return "\n".join(lines)


@click.command()
@click.option("--data", type=Path, default=Path("artifacts/data"), help="Packed digits, as fetch writes them.")
@click.option(
    "--out",
    type=Path,
    default=Path("reports/criteria.csv"),
    help="CSV with one row per measurement; an existing file is continued.",
)
@click.option("--seeds", default=5, help="Number of seeds, at least 2.")
def main(data: Path, out: Path, seeds: int) -> None:
    """Measure what --out does not have yet, then print the tables."""
    if seeds < 2:  # noqa: PLR2004
        raise InputError(f"--seeds {seeds} is too few for an interval; give at least 2")
    bench = Bench(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+", newline="") as file:
        file.seek(0)
        done = {(row["criterion"], row["formula"], row["seed"]) for row in csv.DictReader(file)}
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for seed, (criterion, formula) in itertools.product(range(seeds), CRITERIA):
            if (criterion, formula, str(seed)) not in done:
                writer.writerows(bench.rows(criterion, formula, seed))
                file.flush()
    click.echo(markdown_tables(out))


if __name__ == "__main__":
    main()
