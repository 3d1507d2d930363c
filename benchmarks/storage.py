"""A large checkpoint, up and down -> how fast our store is against the plain transfer manager on the same server."""

import os
import resource
import runpy
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

from stages.storage import Store

MIB = 1024 * 1024
SERVER = Path(__file__).parents[1] / "tests" / "swift.py"


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


@click.command()
@click.option("--size-mib", type=click.IntRange(1), default=1024, help="Of the file.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="How often; medians count.")
def main(size_mib: int, rounds: int) -> None:
    """Start Swift on loopback, move files, and compare."""
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
        store.client.create_bucket(Bucket=store.bucket)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        turns = [measure(store, home, size_mib, turn) for turn in range(rounds)]
        server.kill()
    print(f"{size_mib} MiB\n\n| way | plain | ours | ratio of speeds |\n| --- | ---: | ---: | ---: |")
    for way in ("up", "down"):
        plain, ours = ([turn[f"{who} {way}"] for turn in turns] for who in ("plain", "ours"))
        ratio = median(one / two for one, two in zip(plain, ours, strict=True))
        print(f"| {way} | {size_mib / median(plain):.0f} MiB/s | {size_mib / median(ours):.0f} MiB/s | {ratio:.2f}× |")
    print(f"memory grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
