"""Whatever a file holds, its reader returns or refuses it, in bounded time and memory.

ESPALIER_FUZZ_SECONDS is the time of the long form (make fuzz); without it each reader gets a few inputs.
"""

import mmap
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings, strategies
from ruamel.yaml import YAML

from stages.runtime.errors import InputError
from tests.fuzz.mutations import damaged_bytes, damaged_trees, dump
from tests.fuzz.readers import READERS, damage_metadata, read_metadata_tree, write_valid_files

SECONDS = float(os.environ.get("ESPALIER_FUZZ_SECONDS") or 0)
SHORT_EXAMPLES, LONG_EXAMPLES = 60, 400
MAX_SECONDS, MAX_KIB = 20, 1024 * 1024
"""Bounds of one input: time, and growth of the memory's high-water mark (1 GiB)."""


@pytest.fixture
def valid(make_once, unet, scheduler, images, protocol):
    """A folder with one valid file of each kind."""

    def write(folder):
        (folder / "data").mkdir(parents=True)
        write_valid_files(folder, unet, scheduler, images, protocol)

    return make_once("valid", write)


class TooSlowError(BaseException):
    """An input takes longer than any should; no reader takes this for a damaged file."""


def high_water_kib():
    """The most memory that this process has had since its mark was reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def attempt(read, folder):
    """Read a folder within the bounds.

    Raises:
        AssertionError: The input takes too much memory.
        TooSlowError: It takes too much time.
    """

    def stop(*_):
        raise TooSlowError

    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew at what is in use now
    before = high_water_kib()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    message = ""
    try:
        read(folder)
    except InputError as error:
        message = error.format_message()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert high_water_kib() - before < MAX_KIB
    assert len(message.splitlines()) <= 1


def inputs_of(reader, valid):
    """Damaged contents of a reader's file."""
    path = valid / reader.file
    if path.is_dir():
        return damaged_trees(read_metadata_tree(valid)).map(dump)
    content = path.read_bytes()
    if reader.is_tree:
        trees = damaged_trees(YAML(typ="safe").load(content.decode())).map(dump)
        return strategies.one_of(trees, trees, damaged_bytes(content))
    return damaged_bytes(content)


def attack(reader, inputs, folder, number):
    """Read damaged copies of a file, drawn from a seed; returns their number."""
    count = 0

    @seed(number)
    @settings(
        max_examples=max(2, (LONG_EXAMPLES if SECONDS else SHORT_EXAMPLES) // reader.cost),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged=inputs)
    def check(damaged):
        nonlocal count
        count += 1
        if (folder / reader.file).is_dir():
            damage_metadata(folder, damaged)
        else:
            (folder / reader.file).write_bytes(damaged)
        shutil.rmtree(folder / "out", ignore_errors=True)
        attempt(reader.read, folder)

    check()
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(valid, tmp_path, name):
    """Never anything but success, InputError or UnavailableError, whose message is one line."""
    folder = tmp_path / "copy"
    shutil.copytree(valid, folder)
    inputs = inputs_of(READERS[name], valid)
    begin, number, count = time.monotonic(), 0, 0
    while number == 0 or time.monotonic() - begin < SECONDS / len(READERS):
        count += attack(READERS[name], inputs, folder, number)
        number += 1
    print(f"{name}: {count:,} inputs in {time.monotonic() - begin:.0f} s")


@pytest.mark.parametrize(
    ("excess", "error", "seconds"),
    [
        (lambda _: take_memory(2**28), AssertionError, MAX_SECONDS),
        (lambda _: swallow(time.sleep, 60), TooSlowError, 0.2),
    ],
)
def test_the_bounds_hold_whatever_came_before(monkeypatch, tmp_path, excess, error, seconds):
    """A reader that takes 256 MiB of 64, or too long although it turns every exception into InputError, fails."""
    monkeypatch.setattr(f"{__name__}.MAX_SECONDS", seconds)
    monkeypatch.setattr(f"{__name__}.MAX_KIB", 64 * 1024)
    take_memory(2**28)  # an earlier peak

    with pytest.raises(error):
        attempt(excess, tmp_path)


def take_memory(count):
    """Write bytes of the system's, since this process may have kept as many that it freed, and give them back."""
    np.frombuffer(mmap.mmap(-1, count), np.uint8)[:] = 1


def swallow(run, *arguments):
    """Refuse whatever goes wrong, as readers do.

    Raises:
        InputError: Anything went wrong.
    """
    try:
        run(*arguments)
    except Exception as error:  # noqa: BLE001  # as readers of foreign files do
        raise InputError(str(error)) from None


def test_valid_files_are_read(valid, tmp_path):
    """Otherwise every damaged one would be refused for another reason."""
    shutil.copytree(valid, tmp_path / "copy")
    for name, reader in READERS.items():
        try:
            reader.read(tmp_path / "copy")
        except InputError as error:
            pytest.fail(f"{name}: {error.message}")
