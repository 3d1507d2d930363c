"""Store and plain transfer manager on a Swift server -> their speeds, and the time that uploads add to a finetuning."""

import os
import resource
import runpy
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import click

from stages.data.images import Images
from stages.fetch.data import bundled_digits
from stages.fetch.model import BUNDLED
from stages.fetch.split import split
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import FinetuneParams, LossParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import read_scheduler, read_unet
from stages.params import load_params
from stages.report.markdown import markdown_table
from stages.runtime.device import select_device
from stages.storage.s3 import Store

MIB = 1024 * 1024
ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "swift.py"
MODEL = BUNDLED / "digits"
WARM_UP_STEPS = 10
RUN = "0" * 64


def write_noise(path: Path, size_mib: int, seed: int) -> None:
    """Write a file whose content no other file has, quickly."""
    block = os.urandom(MIB - 8)
    with path.open("wb") as file:
        for index in range(size_mib):
            file.write((seed * size_mib + index).to_bytes(8, "big") + block)


def measure_seconds(call: Callable[[], object]) -> float:
    """Measure the duration of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_transfers(store: Store, place: Path, size_mib: int, turn: int) -> dict[str, float]:
    """Transfer one new file both ways by the plain transfer manager, another by the store; the order alternates."""
    client, bucket = store.client, store.bucket
    plain, ours = place / "plain", place / "ours"
    for folder in (plain, ours):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_noise(folder / "weights", size_mib, hash((turn, folder.name)) % 2**20)
    steps = {
        "plain up": lambda: client.upload_file(str(plain / "weights"), bucket, f"plain-{turn}"),
        "ours up": lambda: store.push(ours, f"turn-{turn}"),
        "plain down": lambda: client.download_file(bucket, f"plain-{turn}", str(plain / "back")),
        "ours down": lambda: store.pull(f"turn-{turn}", ours / "back"),
    }
    order = list(steps) if turn % 2 else ["ours up", "plain up", "ours down", "plain down"]
    return {name: measure_seconds(steps[name]) for name in order}


def finetune(images: Images, params: FinetuneParams, place: Path, uri: str | None) -> None:
    """Train the digits model as the stage finetune does, until the last upload has ended."""
    store = Store(uri) if uri else None
    trainer = Trainer(read_unet(MODEL, select_device()), read_scheduler(MODEL), images, params, seed=0)
    checkpoints = Checkpoints(place, RUN, store)
    trainer.run(checkpoints)
    checkpoints.clear()


def measure_uploads(place: Path, images: Images, params: FinetuneParams, uri: str, turn: int) -> dict[str, float]:
    """Train once with uploads to a store and once without; the order alternates."""
    uris = {"with": uri, "without": None}
    order = list(uris) if turn % 2 else ["without", "with"]
    return {name: measure_seconds(partial(finetune, images, params, place / "training", uris[name])) for name in order}


def compare_uploads(place: Path, store: Store, steps: int, checkpoint_every: int, rounds: int) -> None:
    """Print how much longer a finetuning takes if it uploads its checkpoints."""
    images, params = split(bundled_digits(), 0.2), load_params(ROOT / "params.yaml").finetune
    # The noise loss needs no teacher model.
    params = params.model_copy(update={"steps": steps, "checkpoint_every": checkpoint_every, "loss": LossParams()})
    finetune(images, params.model_copy(update={"steps": WARM_UP_STEPS}), place / "training", None)
    uris = [
        f"{store.uri}/turn-{turn}" for turn in range(rounds)
    ]  # each turn has its own store, since equal checkpoints are sent only once
    turns = [measure_uploads(place, images, params, uri, turn) for turn, uri in enumerate(uris)]
    ratios = sorted(turn["with"] / turn["without"] for turn in turns)
    written, sent = (steps - 1) // checkpoint_every * rounds, sum(len(Store(uri).names()) for uri in uris)
    print(f"\n{steps} steps of finetuning, {sent} of {written} checkpoints sent over {rounds} rounds\n")
    rows = []
    for name in ("without", "with"):
        spent = sorted(turn[name] for turn in turns)
        rows.append([f"{name} uploads", *(f"{seconds:.1f}" for seconds in (median(spent), spent[0], spent[-1]))])
    print(markdown_table(["way", "seconds, median", "least", "most"], rows))
    print(f"\nwith / without, round by round: {median(ratios):.4f}× ({ratios[0]:.4f} to {ratios[-1]:.4f})")


def compare_transfers(place: Path, store: Store, size_mib: int, rounds: int) -> None:
    """Print the speed of uploads and downloads."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    turns = [measure_transfers(store, place, size_mib, turn) for turn in range(rounds)]
    rows = []
    for way in ("up", "down"):
        plain, ours = ([turn[f"{sender} {way}"] for turn in turns] for sender in ("plain", "ours"))
        ratio = median(one / two for one, two in zip(plain, ours, strict=True))
        speeds = (f"{size_mib / median(spent):.0f} MiB/s" for spent in (plain, ours))
        rows.append([way, *speeds, f"{ratio:.2f}×"])
    print(f"{size_mib} MiB\n\n{markdown_table(['way', 'plain', 'ours', 'ratio of speeds'], rows)}")
    print(f"memory grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB")


@click.command()
@click.option("--size-mib", type=click.IntRange(1), default=1024, help="Size of the file.")
@click.option("--steps", type=click.IntRange(2), default=200, help="Steps of a finetuning.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=50, help="Steps between two checkpoints.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Repetitions; medians are printed.")
def main(size_mib: int, steps: int, checkpoint_every: int, rounds: int) -> None:
    """Start Swift on loopback, then time transfers, and finetunings with and without uploads."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        swift = runpy.run_path(str(SERVER))
        server = swift["Swift"](place / "swift")
        server.start()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": swift["KEY"],
            "AWS_SECRET_ACCESS_KEY": swift["SECRET"],
            "AWS_REGION": "us-east-1",
        }
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{server.port}"
        store = Store("s3://benchmark")
        try:
            store.client.create_bucket(Bucket=store.bucket)
            compare_transfers(place, store, size_mib, rounds)
            os.sync()  # otherwise the disk would still be busy during the training
            compare_uploads(place, store, steps, checkpoint_every, rounds)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
