"""Our store on a real server -> its speed against the plain transfer manager's, and what uploads cost a finetuning."""

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
from stages.fetch.data import bundled_digits, split
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import FinetuneParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import read_scheduler, read_unet
from stages.params import load_params
from stages.runtime.device import select_device
from stages.storage.s3 import Store

MIB = 1024 * 1024
ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "swift.py"
MODEL = ROOT / "stages" / "fetch" / "bundled" / "digits"
WARM_UP_STEPS = 10
RUN = "0" * 64


def write_noise(path: Path, size_mib: int, seed: int) -> None:
    """Write bytes that no two files share, quickly."""
    block = os.urandom(MIB - 8)
    with path.open("wb") as file:
        for index in range(size_mib):
            file.write((seed * size_mib + index).to_bytes(8, "big") + block)


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(store: Store, home: Path, size_mib: int, turn: int) -> dict[str, float]:
    """Move one new file both ways by the plain transfer manager, and another by the store; the order alternates."""
    client, bucket, spent = store.client, store.bucket, {}
    plain, ours = home / "plain", home / "ours"
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
    for name in order:
        spent[name] = seconds(steps[name])
    return spent


def finetune(images: Images, params: FinetuneParams, place: Path, uri: str | None) -> None:
    """Train the digits model as the stage does, to the end of the last upload."""
    store = Store(uri) if uri else None
    trainer = Trainer(read_unet(MODEL, select_device()), read_scheduler(MODEL), images, params, seed=0)
    checkpoints = Checkpoints(place, RUN, store)
    trainer.run(checkpoints)
    checkpoints.clear()


def measure_uploads(home: Path, images: Images, params: FinetuneParams, uri: str, turn: int) -> dict[str, float]:
    """Train once with a store and once without; the order alternates."""
    uris = {"with": uri, "without": None}
    order = list(uris) if turn % 2 else ["without", "with"]
    return {name: seconds(partial(finetune, images, params, home / "training", uris[name])) for name in order}


def compare_uploads(home: Path, store: Store, steps: int, checkpoint_every: int, rounds: int) -> None:
    """Print how much longer a finetuning takes that sends its checkpoints to the store."""
    images, params = split(bundled_digits(), 0.2), load_params(ROOT / "params.yaml").finetune
    params = params.model_copy(update={"steps": steps, "checkpoint_every": checkpoint_every})
    finetune(images, params.model_copy(update={"steps": WARM_UP_STEPS}), home / "training", None)
    uris = [f"{store.uri}/turn-{turn}" for turn in range(rounds)]  # equal checkpoints in one place are sent once
    turns = [measure_uploads(home, images, params, uri, turn) for turn, uri in enumerate(uris)]
    ratios = sorted(turn["with"] / turn["without"] for turn in turns)
    offered, sent = (steps - 1) // checkpoint_every * rounds, sum(len(Store(uri).names()) for uri in uris)
    print(f"\n{steps} steps of finetuning, {sent} of {offered} checkpoints sent over {rounds} rounds\n")
    print("| way | seconds, median | least | most |\n| --- | ---: | ---: | ---: |")
    for name in ("without", "with"):
        spent = sorted(turn[name] for turn in turns)
        print(f"| {name} uploads | {median(spent):.1f} | {spent[0]:.1f} | {spent[-1]:.1f} |")
    print(f"\nwith / without, round by round: {median(ratios):.4f}× ({ratios[0]:.4f} to {ratios[-1]:.4f})")


def compare_moves(home: Path, store: Store, size_mib: int, rounds: int) -> None:
    """Print how fast a file comes up and down."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    turns = [measure(store, home, size_mib, turn) for turn in range(rounds)]
    print(f"{size_mib} MiB\n\n| way | plain | ours | ratio of speeds |\n| --- | ---: | ---: | ---: |")
    for way in ("up", "down"):
        plain, ours = ([turn[f"{who} {way}"] for turn in turns] for who in ("plain", "ours"))
        ratio = median(one / two for one, two in zip(plain, ours, strict=True))
        print(f"| {way} | {size_mib / median(plain):.0f} MiB/s | {size_mib / median(ours):.0f} MiB/s | {ratio:.2f}× |")
    print(f"memory grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB")


@click.command()
@click.option("--size-mib", type=click.IntRange(1), default=1024, help="Of the file.")
@click.option("--steps", type=click.IntRange(2), default=200, help="Of a finetuning.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=50, help="Steps between two checkpoints.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="How often; medians count.")
def main(size_mib: int, steps: int, checkpoint_every: int, rounds: int) -> None:
    """Start Swift on loopback, move files, finetune with and without uploads, and compare."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        swift = runpy.run_path(str(SERVER))
        server = swift["Swift"](home / "swift")
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
            compare_moves(home, store, size_mib, rounds)
            os.sync()  # gigabytes that wait for the disk would disturb the training
            compare_uploads(home, store, steps, checkpoint_every, rounds)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
