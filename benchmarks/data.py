"""Packed images, read as finetuning reads them -> their speed against an image folder and a DataLoader.

The readers take turns on the same images in one run, so that what else the machine does meets them alike; whatever is
read lies in the system's cache. Ours, Batches.at, also draws noise and timesteps and mirrors half of the images. The
other decodes, turns into tensors and normalises, as tutorials do: once alone, and once with the noise and timesteps
that the training of a diffusion model draws beside.
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
from stages.fetch.data import bundled_digits, fetch_data, split
from stages.fetch.params import FolderData
from stages.finetune.batches import Batches
from stages.finetune.params import FinetuneParams, LossParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import read_scheduler, read_unet
from stages.params import load_params

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "stages" / "fetch" / "bundled" / "digits"
CHANNELS, WORKERS = 3, (0, 2)
STEPS = 5
"""Of the digits model in a turn."""

Reader = Callable[[], Iterator[object]]
"""Gives its batches, without end."""


def draw_pictures(folder: Path, size: int, count: int) -> None:
    """Write coloured blots with some grain as JPEG, about as large as photographs are."""
    draws = np.random.default_rng(size)
    for index in range(count):
        blots = Image.fromarray(draws.integers(0, 256, (8, 8, CHANNELS), dtype=np.uint8))
        smooth = np.asarray(blots.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        grainy = (smooth + draws.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{index:06}.jpg", quality=90)


def pack(folder: Path, size: int, out: Path) -> Images:
    """Pack a folder as the stage does."""
    out.mkdir()
    fetch_data(FolderData(source="folder", path=folder, fit="crop"), (CHANNELS, size), 0.02, out)
    return read_images(out)


def ours(images: Images, params: FinetuneParams) -> Iterator[object]:
    """Batches as a training takes them."""
    batches, step = Batches(images, 1000, params, 0), 0
    while True:
        yield batches.at(step, slice(0, params.batch_size))
        step += 1


def plain(home: Path, size: int, batch_size: int, workers: int, *, noisy: bool) -> Iterator[object]:
    """Batches of torchvision's ImageFolder, alone or with noise and timesteps."""
    steps = [
        transforms.Resize(size),  # of images of this size they do nothing
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * CHANNELS, [0.5] * CHANNELS),
    ]
    pictures = ImageFolder(str(home), transforms.Compose(steps))
    while True:
        for clean, _ in DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=workers):
            yield (clean, torch.randn_like(clean), torch.randint(1000, (batch_size,))) if noisy else clean


def speed(reader: Reader, batches: int, batch_size: int) -> float:
    """Images per second, once the first batch is there."""
    coming = reader()
    next(coming)
    begin = time.perf_counter()
    for _ in islice(coming, batches):
        pass
    return batches * batch_size / (time.perf_counter() - begin)


def compare(home: Path, folder: Path, size: int, batch_size: int, rounds: int) -> list[str]:
    """Let the readers take turns: rows of a Markdown table."""
    (home / "classes").mkdir()
    (home / "classes" / "all").symlink_to(folder.resolve())
    images = pack(folder, size, home / "packed")
    params = load_params(ROOT / "params.yaml").finetune.model_copy(update={"batch_size": batch_size, "flip": True})
    readers: dict[str, Reader] = {"packed": partial(ours, images, params)}
    for workers, noisy in product(WORKERS, (True, False)):
        name = f"ImageFolder, {workers} workers{', noise' if noisy else ''}"
        readers[name] = partial(plain, home / "classes", size, batch_size, workers, noisy=noisy)
    batches = max(1, len(images.train) // batch_size - 1)
    turns = [
        {name: speed(readers[name], batches, batch_size) for name in (list(readers) if turn % 2 else reversed(readers))}
        for turn in range(rounds)
    ]
    return [row(f"{size}²", name, turns) for name in readers]


def row(images: str, name: str, turns: list[dict[str, float]]) -> str:
    """A row: medians over the turns, least and most."""
    speeds = [turn[name] for turn in turns]
    gains = sorted(turn["packed"] / turn[name] for turn in turns)
    evenly_spaced = f"{median(gains):.1f}× ({gains[0]:.1f} to {gains[-1]:.1f})"
    return f"| {images} | {name} | {median(speeds):.0f} | {min(speeds):.0f} to {max(speeds):.0f} | {evenly_spaced} |"


def share_of_a_step(rounds: int) -> tuple[float, float, float]:
    """Train the digits model, without a teacher: what its batch takes of a step's time, median, least and most."""
    images, params = split(bundled_digits(), 0.2), load_params(ROOT / "params.yaml").finetune
    params = params.model_copy(update={"loss": LossParams()})
    trainer = Trainer(read_unet(MODEL), read_scheduler(MODEL), images, params, seed=0)
    trainer.step()
    shares = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for step in range(STEPS):
            trainer.batches.at(trainer.done + step, trainer.share)
        middle = time.perf_counter()
        for _ in range(STEPS):
            trainer.step()
        shares.append((middle - begin) / (time.perf_counter() - middle))
    return median(shares), min(shares), max(shares)


@click.command()
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Images of one's own.")
@click.option("--size", "sizes", type=int, multiple=True, default=(32, 256), help="Of the packed images; repeatable.")
@click.option("--count", type=click.IntRange(1), default=1024, help="Images that are made, of each size.")
@click.option("--batch-size", type=click.IntRange(1), default=64)
@click.option("--rounds", type=click.IntRange(1), default=5, help="Turns of each reader.")
def main(folder: Path | None, sizes: tuple[int, ...], count: int, batch_size: int, rounds: int) -> None:
    """Make or take image folders, pack them, read both ways and print the tables."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            pictures = folder or Path(place) / "pictures"
            if not folder:
                pictures.mkdir()
                draw_pictures(pictures, size, count)
            rows += compare(Path(place), pictures, size, batch_size, rounds)
    print("| images | reader | images/s, median | least to most | packed over it, turn by turn |")
    print("| --- | --- | ---: | ---: | ---: |", *rows, sep="\n")
    middle, least, most = share_of_a_step(rounds)
    print(f"\nshare of a step of the digits model: {middle:.2%} ({least:.2%} to {most:.2%})")


if __name__ == "__main__":
    main()
