"""The digits model, no finetuning -> every criterion at several budgets and seeds, with and without compensation."""

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
from stages.finetune.batches import heldout_batch
from stages.importance.calibration import calibrate
from stages.importance.params import ImportanceParams
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.sampling import draw, image_seeds
from stages.protocol.extractors import Extractor
from stages.protocol.intervals import estimate
from stages.protocol.params import ExtractorParams, ReferenceParams
from stages.protocol.protocol import make_protocol
from stages.prune.compensate import NoisyImages
from stages.prune.params import CompensateParams, PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.runtime.errors import InputError
from stages.runtime.seeds import derive_seed

MODEL = Path(__file__).parents[1] / "stages" / "fetch" / "bundled" / "digits"
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
COMPENSATE = CompensateParams(num_images=32, num_timesteps=10, damping=0.1, rounds=6)
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
    """The dense model, its data, and what is measured on a model pruned from it."""

    def __init__(self, data: Path) -> None:
        self.unet, self.scheduler = read_unet(MODEL), read_scheduler(MODEL)
        self.images = read_images(data)
        self.heldout = heldout_batch(
            self.images, len(self.images.heldout), self.scheduler.config["num_train_timesteps"]
        )
        self.extractor = Extractor(QUALITY.extractor, QUALITY.batch_size)
        protocol = make_protocol(QUALITY, 0, self.scheduler, self.images.pixels, self.extractor)
        self.judge = QualityMetrics(self.extractor.features(self.images.pixels), protocol)
        self.dense: dict[int, np.ndarray] = {}

    def measure(self, unet: torch.nn.Module, seed: int) -> dict[str, float]:
        """FID, SSIM against the dense model's images from the same noise, and the loss on held-out images."""
        drawn = self.sample(unet, seed)
        if seed not in self.dense:
            self.dense[seed] = self.sample(self.unet, seed)
        images, noise, timesteps = self.heldout.images, self.heldout.noise, self.heldout.timesteps
        with torch.no_grad():
            predicted = unet(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = (predicted - noise).square().mean()
        quality = self.judge(self.extractor.features(drawn), seed)
        ssim = images_to_ssim(drawn, self.dense[seed]).mean()
        return {"fid": quality.fid, "ssim": float(ssim), "loss": float(loss)}

    def sample(self, unet: torch.nn.Module, seed: int) -> np.ndarray:
        """Draw the images of a seed."""
        seeds = image_seeds(seed, NUM_IMAGES)
        return draw(unet, self.scheduler, seeds, SAMPLER, batch_size=QUALITY.batch_size, label="images")

    def rows(self, criterion: str, formula: str, seed: int) -> list[dict[str, object]]:
        """Measure one criterion on one seed, at every budget, with and without compensation."""
        chosen = ImportanceParams(criterion=criterion, formula=formula, threshold=0.05, num_images=16, stride=4)
        importance = calibrate(self.unet, self.scheduler, self.images, chosen, seed)
        rows = []
        for macs, compensated in itertools.product(BUDGETS, (None, COMPENSATE)):
            params = PruneParams(target=Target(macs=macs), floor=0.1, compensate=compensated)
            plan = plan_pruning(self.unet, importance, params, derive_seed(seed, "random importance"))
            images = NoisyImages(self.unet, self.scheduler, self.images, COMPENSATE, seed)
            pruned = prune_unet(self.unet, plan, images)
            named = (criterion, formula, macs, compensated is not None, seed)
            rows.append(dict(zip(COLUMNS, named, strict=False)) | self.measure(pruned, seed))
        return rows


def interval(values: list[float]) -> str:
    """Write the mean ± half the 95 % interval."""
    found = estimate(values)
    return f"{found.mean:.3g} ± {found.half_width:.2g}"


def table(path: Path) -> str:
    """Write a Markdown table of mean ± interval over the seeds, one for each budget."""
    cells: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            cells[row["macs"], row["criterion"], row["formula"], row["compensated"]].append(row)
    lines = []
    for macs in BUDGETS:
        lines += ["", f"MACs {macs}:", "", "| criterion | FID | FID, comp. | SSIM | SSIM, comp. | loss | loss, comp. |"]
        lines.append("| --- |" + " ---: |" * 6)
        for criterion, formula in CRITERIA:
            values = [
                interval([float(row[key]) for row in cells[macs, criterion, formula, compensated]])
                for key in ("fid", "ssim", "loss")
                for compensated in ("False", "True")
            ]
            lines.append(f"| {criterion}, {formula} | {' | '.join(values)} |")
    return "\n".join(lines)


@click.command()
@click.option("--data", type=Path, default=Path("artifacts/data"), help="Packed digits, as fetch writes them.")
@click.option("--out", type=Path, default=Path("reports/criteria.csv"), help="One row a measurement; taken up again.")
@click.option("--seeds", default=5, help="How many.")
def main(data: Path, out: Path, seeds: int) -> None:
    """Measure what is not there yet, then print the table."""
    if seeds < 2:  # noqa: PLR2004
        raise InputError(f"--seeds {seeds} gives no interval; give at least 2")
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
    click.echo(table(out))


if __name__ == "__main__":
    main()
