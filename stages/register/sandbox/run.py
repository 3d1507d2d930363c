"""A Python program and the files that it may read -> what it prints, from a sandbox with limits."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import psutil

from stages.register.machine_faults import raising_machine_faults
from stages.register.sandbox import linux
from stages.register.sandbox.environment import make_environment
from stages.runtime.errors import InputError, MachineError

ISOLATIONS = ("namespaces", "landlock", "limits")
"""Ways to isolate a program, the closest first; the first that this machine allows is taken."""
OPEN = {
    "landlock": "open are names and sizes of files, disk space, and, before Linux 6.12, signals to other processes",
    "limits": "open are every file of this user, the network, and the memory and environment of its other processes",
}
"""Isolation -> what it leaves open."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache")
"""Programs and libraries of the machine."""
USERS = range(61184, 65520)
"""Numbers of users without files; a sandbox that root starts runs as one of them."""
PROCESSES = 256
"""Processes and threads of a sandbox."""
OUTPUT_BYTES = 64 << 20
"""Size of each file that a sandbox writes, its output and messages included."""
MAX_MESSAGE = 300
"""Longest message of a program that is shown, in characters."""
FREE_BYTES = 1 << 20
"""Space on the disk below which a program may have failed for lack of it."""
POLL_S = 0.1
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    memory_bytes: int
    """Address space of each process, and memory of all together."""
    timeout_s: float
    """Time until it is ended."""


def run_in_sandbox(program: Path, arguments: Sequence[str], files: Mapping[str, Path], limits: Limits) -> bytes:
    """Run a Python program in a sandbox and return what it prints.

    Args:
        program: The program; it can import the installed packages and nothing of this project.
        arguments: Its arguments; the name of a file is replaced by its path in the sandbox.
        files: Name -> file or folder that it may read.
        limits: What it may use.

    Raises:
        InputError: It fails or exceeds a limit; the line holds the last one that it printed to standard error.
        MachineError: This machine cannot start it, or has no space for what it writes.
    """
    with (
        raising_machine_faults(excused=()),
        _ALONE,
        _not_dumpable(),
        tempfile.TemporaryDirectory(prefix="espalier-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as messages,
    ):
        copy = shutil.copyfile(program, Path(folder) / program.name)
        launcher = _start(
            Path(folder), [program.name, *arguments], {program.name: copy, **files}, limits, output, messages
        )
        exceeded = _wait(launcher, limits)
        if exceeded:
            raise InputError(exceeded)
        if launcher.returncode:
            _check_space(folder)
            last = (_read(messages).decode(errors="replace").strip().splitlines() or [""])[-1]
            raise InputError(one_line(last) or f"exit code {launcher.returncode}")
        return _read(output)


def _check_space(folder: str) -> None:
    """Raise an OSError if the disk is full, since the program that failed may have written there."""
    if shutil.disk_usage(folder).free < FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def one_line(text: str) -> str:
    """Make a text of others fit to print: ASCII without control characters, and short."""
    return re.sub(r"[^\x20-\x7e]+", "?", text)[:MAX_MESSAGE]


def _start(
    folder: Path,
    command: Sequence[str],
    files: Mapping[str, Path],
    limits: Limits,
    output: IO[bytes],
    messages: IO[bytes],
) -> subprocess.Popen[bytes]:
    """Start the launcher with the closest isolation that this machine allows, and warn of what another leaves open."""
    obstacles: list[str] = []
    for isolation in ISOLATIONS:
        settings = _settings(isolation, folder / isolation, command, files, limits)
        launcher, obstacle = _launch(settings, output, messages)
        if not obstacle:
            if isolation in OPEN:
                found = f"the code runs without namespaces ({'; '.join(obstacles) or 'not tried'})"
                click.echo(f"Warning: {found}; {OPEN[isolation]}", err=True)
            return launcher
        obstacles.append(f"{isolation}: {obstacle}")
    found = f"this machine cannot start the code of a version ({'; '.join(obstacles) or 'no isolation is allowed'})"
    raise MachineError(f"{found}, so nothing was decided or changed; promote on another machine")


def _settings(
    isolation: str, folder: Path, command: Sequence[str], files: Mapping[str, Path], limits: Limits
) -> dict[str, Any]:
    """Describe a sandbox to the launcher; its paths are the same inside and outside."""
    home, root, shown = (folder / name for name in ("home", "root", "files"))
    for place in (home, root, shown):
        place.mkdir(parents=True)
    places = {name: str(shown / name) for name in files}
    for name, path in files.items():
        if isolation != "namespaces":
            (shown / name).symlink_to(path.resolve())
        elif os.geteuid() == 0:
            _make_readable(path)
    number, size = math.ceil(limits.timeout_s), limits.memory_bytes
    return {
        "isolation": isolation,
        "root": str(root),
        "home": str(home),
        "files": [
            *((path, path) for path in _system_files()),
            *((str(files[it].resolve()), places[it]) for it in files),
        ],
        "user": USERS[os.getpid() % len(USERS)] if os.geteuid() == 0 else None,
        "command": [sys.executable, "-I", "-B", *(places.get(word, word) for word in command)],
        "environment": {**make_environment(home), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        "limits": {
            "RLIMIT_AS": size,
            "RLIMIT_CPU": number * (1 + (os.cpu_count() or 1)),  # of all threads; the deadline itself is watched
            "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": OUTPUT_BYTES,
            "RLIMIT_NOFILE": 1024,
            "RLIMIT_NPROC": PROCESSES + (_count_processes() if os.geteuid() else 0),
        },
    }


def _system_files() -> list[str]:
    """List Python, its packages and the libraries of the machine, without what lies in another of them."""
    python = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    found = [path for path in (*SYSTEM, *python, *map(os.path.realpath, python)) if Path(path).exists()]
    distinct = sorted(set(found), key=lambda path: (path.count("/"), path))
    return [path for path in distinct if not any(path.startswith(f"{other}/") for other in distinct)]


def _make_readable(path: Path) -> None:
    """Let every user read a private copy, since the sandbox runs as another user; links are not followed."""
    path.chmod(0o755 if path.is_dir() else 0o644)
    for folder, folders, names in os.walk(path):
        for place in (Path(folder) / name for name in (*folders, *names)):
            if not place.is_symlink():
                place.chmod(0o755 if place.is_dir() else 0o644)


def _count_processes() -> int:
    """Count the processes and threads of this user, which the system counts together with those of the sandbox."""
    user, found = os.getuid(), psutil.process_iter(["uids", "num_threads"])
    return sum(it.info["num_threads"] or 1 for it in found if it.info["uids"] and it.info["uids"].real == user)


def _launch(settings: dict[str, Any], output: IO[bytes], messages: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    """Start the launcher and wait until the program starts; returns what could not be set up, if anything."""
    receiver, sender = os.pipe()
    command = [sys.executable, "-E", "-s", "-S", "-B", "-m", "stages.register.sandbox.launcher"]
    try:
        launcher = subprocess.Popen(  # noqa: S603
            [*command, json.dumps({**settings, "status": sender})],
            cwd=Path(__file__).parents[3],
            env={},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=messages,
            pass_fds=[sender],
            start_new_session=True,
        )
    finally:
        os.close(sender)
    with os.fdopen(receiver, "rb") as status:
        obstacle = status.read().decode(errors="replace")
    if obstacle:
        launcher.wait()
    return launcher, obstacle


def _wait(launcher: "subprocess.Popen[bytes]", limits: Limits) -> str:
    """Wait for the end of the program; returns the limit that it exceeded, if any. No process of it is left."""
    deadline, reason = time.monotonic() + limits.timeout_s, ""
    try:
        while launcher.poll() is None and not reason:
            memory, count = _measure(launcher.pid)
            if memory > limits.memory_bytes:
                reason = f"it takes more than {limits.memory_bytes >> 20} MiB of memory"
            elif count > PROCESSES + 1:
                reason = f"it starts more than {PROCESSES} processes"
            elif time.monotonic() > deadline:
                reason = f"it takes longer than {limits.timeout_s:g} s"
            time.sleep(POLL_S)
    finally:
        _end(launcher)
    return reason


def _measure(launcher: int) -> tuple[int, int]:
    """Return memory in bytes and number of all processes of a sandbox."""
    memory = count = 0
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                memory += process.memory_info().rss
                count += 1
    return memory, count


def _end(launcher: "subprocess.Popen[bytes]") -> None:
    """End every process of a sandbox; the launcher, to which orphans fall, is the last."""
    with suppress(psutil.NoSuchProcess):
        while launcher.poll() is None and (left := psutil.Process(launcher.pid).children(recursive=True)):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(POLL_S)
    launcher.kill()
    launcher.wait()


def _read(file: IO[bytes]) -> bytes:
    """Read what a sandbox wrote; it can write no more than the limit."""
    file.seek(0)
    return file.read(OUTPUT_BYTES)


@contextmanager
def _not_dumpable() -> Iterator[None]:
    """Close this process's memory and environment to other processes of the same user."""
    before = linux.prctl(linux.PR_GET_DUMPABLE)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    try:
        yield
    finally:
        linux.prctl(linux.PR_SET_DUMPABLE, before)
