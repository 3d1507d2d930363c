"""Images -> the throughput of packed images, read as in finetuning, against torchvision's ImageFolder and DataLoader.

The readers alternate on the same images in one run, so that other load on the machine affects them equally; all files
are in the page cache. Packed images are read with Batches.at, which also draws noise and timesteps and flips half of
the images. ImageFolder decodes and normalises: once without, and once with drawing noise and timesteps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from stages.data.images import Images, read_images
from stages.fetch.data import bundled_digits, fetch_data
from stages.fetch.model import BUNDLED
from stages.fetch.params import FolderData
from stages.fetch.split import split
from stages.finetune.batches import Batches
from stages.finetune.params import FinetuneParams, LossParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import read_scheduler, read_unet
from stages.params import load_params
from stages.runtime.errors import InputError

ROOT = Path(__file__).parents[1]
MODEL = BUNDLED / "digits"
CHANNELS, WORKERS = 3, (0, 2)
STEPS = 5
"""Training steps of the digits model per turn."""

Reader = Callable[[], Iterator[object]]
"""Returns an endless iterator of batches."""


def write_photographs(folder: Path, size: int, count: int) -> None:
    """Write synthetic JPEG images, coloured blobs with noise, whose files are about as large as photographs."""
    random = np.random.default_rng(size)
    for index in range(count):
        blobs = Image.fromarray(random.integers(0, 256, (8, 8, CHANNELS), dtype=np.uint8))
        smooth = np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        grainy = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{index:06}.jpg", quality=90)


def pack(folder: Path, size: int, out: Path) -> Images:
    """Pack an image folder as the fetch stage does."""
    out.mkdir()
    fetch_data(FolderData(source="folder", path=folder, fit="crop"), (CHANNELS, size), 0.02, out)
    return read_images(out)


def packed_batches(images: Images, params: FinetuneParams) -> Iterator[object]:
    """Yield the batches of a training."""
    batches = Batches(
        images,
        1000,
        0,
        batch_size=params.batch_size,
        flip=params.flip,
        antithetic=params.antithetic,
        label_dropout=params.label_dropout,
    )
    step = 0
    while True:
        yield batches.at(step, slice(0, params.batch_size))
        step += 1


def image_folder_batches(folder: Path, size: int, batch_size: int, workers: int, *, noisy: bool) -> Iterator[object]:
    """Yield the batches of torchvision's ImageFolder, alone or with noise and timesteps."""
    steps = [
        transforms.Resize(size),  # no effect on images of this size
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * CHANNELS, [0.5] * CHANNELS),
    ]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))
    while True:
        for clean, _ in DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers):
            yield (clean, torch.randn_like(clean), torch.randint(1000, (batch_size,))) if noisy else clean


def images_per_s(reader: Reader, num_batches: int, batch_size: int) -> float:
    """Measure the throughput of a reader after its first batch."""
    batches = reader()
    next(batches)
    begin = time.perf_counter()
    for _ in islice(batches, num_batches):
        pass
    return num_batches * batch_size / (time.perf_counter() - begin)


def compare_readers(place: Path, folder: Path, size: int, batch_size: int, rounds: int) -> list[str]:
    """Measure the readers in alternation and return the rows of a Markdown table."""
    (place / "classes").mkdir()
    (place / "classes" / "all").symlink_to(folder.resolve())
    images = pack(folder, size, place / "packed")
    if len(images.train) < batch_size:
        raise InputError(f"{len(images.train)} training images are less than one batch of {batch_size}; give more")
    params = load_params(ROOT / "params.yaml").finetune.model_copy(update={"batch_size": batch_size, "flip": True})
    readers: dict[str, Reader] = {"packed": partial(packed_batches, images, params)}
    for workers, noisy in product(WORKERS, (True, False)):
        name = f"ImageFolder, {workers} workers{', noise' if noisy else ''}"
        readers[name] = partial(image_folder_batches, place / "classes", size, batch_size, workers, noisy=noisy)
    num_batches = max(1, len(images.train) // batch_size - 1)
    turns = []
    for turn in range(rounds):
        order = list(readers) if turn % 2 else reversed(readers)
        turns.append({name: images_per_s(readers[name], num_batches, batch_size) for name in order})
    return [row(f"{size}²", name, turns) for name in readers]


def row(images: str, name: str, turns: list[dict[str, float]]) -> str:
    """Format a row of the table: medians over the turns, minimum and maximum."""
    speeds = [turn[name] for turn in turns]
    gains = sorted(turn["packed"] / turn[name] for turn in turns)
    gain = f"{median(gains):.1f}× ({gains[0]:.1f} to {gains[-1]:.1f})"
    return f"| {images} | {name} | {median(speeds):.0f} | {min(speeds):.0f} to {max(speeds):.0f} | {gain} |"


def data_share_of_a_step(rounds: int) -> tuple[float, float, float]:
    """Measure the time for a batch over that for a training step of the digits model: median, minimum, maximum."""
    images, params = split(bundled_digits(), 0.2), load_params(ROOT / "params.yaml").finetune
    params = params.model_copy(update={"loss": LossParams()})
    trainer = Trainer(read_unet(MODEL), read_scheduler(MODEL), images, params, seed=0)
    trainer.step()
    shares = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for step in range(STEPS):
            trainer.batches.at(trainer.steps_done + step, trainer.rows)
        middle = time.perf_counter()
        for _ in range(STEPS):
            trainer.step()
        shares.append((middle - begin) / (time.perf_counter() - middle))
    return median(shares), min(shares), max(shares)


@click.command()
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Image folder to use; without it, images are generated.",
)
@click.option(
    "--size",
    "sizes",
    type=int,
    multiple=True,
    default=(32, 256),
    help="Height and width of the packed images; repeatable.",
)
@click.option("--count", type=click.IntRange(1), default=1024, help="Number of generated images per size.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images per batch.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Measurements per reader.")
def main(folder: Path | None, sizes: tuple[int, ...], count: int, batch_size: int, rounds: int) -> None:
    """Generate or take image folders, pack them, measure the readers and print the results."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            images = folder or Path(place) / "images"
            if not folder:
                images.mkdir()
                write_photographs(images, size, count)
            rows += compare_readers(Path(place), images, size, batch_size, rounds)
    print("| images | reader | images/s, median | minimum to maximum | packed / reader, median (minimum to maximum) |")
    print("| --- | --- | ---: | ---: | ---: |", *rows, sep="\n")
    median_share, minimum, maximum = data_share_of_a_step(rounds)
    print(f"\nshare of data in a step of the digits model: {median_share:.2%} ({minimum:.2%} to {maximum:.2%})")


if __name__ == "__main__":
    main()
