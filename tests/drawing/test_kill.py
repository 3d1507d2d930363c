"""A job whose worker and caller are killed by SIGKILL: nothing is drawn twice, and no byte differs."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress

import psutil
import pytest

from stages.storage.files import file_sha256
from tests.orchestra import until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes"),
]
NUM_IMAGES = int(os.environ.get("ESPALIER_TEST_IMAGES", "1000"))
SHARD = NUM_IMAGES // 40


@pytest.fixture
def start(root, tmp_path):
    """Begin to draw digits in ten steps, by two workers; returns the process."""

    def begin(out, seeds, jobs=2):
        model = root / "stages/fetch/bundled/digits"
        shards = ["--format", "webdataset", "--shard-size", SHARD, "--batch-size", SHARD // (1 + SHARD // 128)]
        options = ["--out", tmp_path / out, "--seeds", seeds, "--steps", 10, "--jobs", jobs, *shards]
        command = [sys.executable, "-m", "stages.tools", "draw", "--model", model, *options]
        log = (tmp_path / f"{out}.log").open("a")
        with log:
            return subprocess.Popen(list(map(str, command)), cwd=root, stdout=log, stderr=log, start_new_session=True)

    return begin


def records(folder):
    """Read the records of the finished shards."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob(".job/shard-*.json")}


def wait_for_shards(folder, number, seconds=900):
    """Wait until so many shards are finished."""
    assert until(lambda: len(records(folder)) >= number, seconds)


def workers(process):
    """List the workers of a call."""
    return [child for child in psutil.Process(process.pid).children() if "stages.drawing.worker" in child.cmdline()]


def test_what_is_killed_goes_on_and_repeats_nothing(start, tmp_path):
    """One of two workers is killed, then their caller; the second call draws what is left, to the same bytes."""
    out = tmp_path / "out"
    process = start("out", f"0:{NUM_IMAGES}")
    wait_for_shards(out, 4)
    victim, other = workers(process)
    victim.kill()
    wait_for_shards(out, 10)
    assert other.is_running()
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs([other], 10)
    assert (len(gone), alive) == (1, [])

    before = {it["name"]: (out / it["name"]).stat().st_mtime_ns for it in records(out).values()}
    assert 10 <= len(before) < 40
    assert not (out / "manifest.json").exists()
    assert start("out", f"0:{NUM_IMAGES}").wait() == 0, (tmp_path / "out.log").read_text()

    manifest = json.loads((out / "manifest.json").read_text())
    shards = manifest["shards"]
    assert (manifest["num_images"], len(shards)) == (NUM_IMAGES, 40)
    assert sum(shard["count"] for shard in shards) == NUM_IMAGES
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before  # no finished shard is repeated
    seeds = []
    for shard in shards:
        assert file_sha256(out / shard["name"]) == shard["sha256"]
        with tarfile.open(out / shard["name"]) as archive:
            seeds += [int(name.removesuffix(".png")) for name in archive.getnames() if name.endswith(".png")]
    assert seeds == list(range(NUM_IMAGES))
    assert {path.name for path in out.iterdir()} == {".job", "manifest.json", *(shard["name"] for shard in shards)}

    assert start("few", f"0:{2 * SHARD}", jobs=1).wait() == 0, (tmp_path / "few.log").read_text()
    few = json.loads((tmp_path / "few/manifest.json").read_text())["shards"]
    assert few == shards[:2]  # a smaller range that nothing disturbed, by one worker
    with suppress(psutil.NoSuchProcess):
        assert not workers(process)
    print((tmp_path / "out.log").read_text()[-600:])
