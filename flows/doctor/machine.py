"""This machine -> findings about Python, packages, device, disk and the variables of the network."""

import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from flows.doctor.finding import Finding
from stages.runtime.cores import count_cores
from stages.runtime.environment import check_credentials, check_hub, check_network, check_numbers
from stages.runtime.wording import count, first_names, format_bytes

LOCK, PROJECT = Path("requirements.lock"), Path("pyproject.toml")
OLDEST, NEWEST = (3, 11), (3, 13)
"""Versions of Python that pyproject.toml allows."""
FEWEST_BYTES, FEW_BYTES = 10**9, 10**10
"""Free disk below which a run would end, and below which a larger data set may not fit."""
MOST_NAMES = 4


def check_python() -> Iterator[Finding]:
    """Check the version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        yield Finding("ok", f"{found} in {sys.prefix}")
    else:
        yield Finding("fail", f"{found}, supported: 3.11 to 3.13; choose one: make PYTHON=python3.12 setup")


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with requirements.lock."""
    if not (LOCK.is_file() and PROJECT.is_file()):
        yield Finding("warn", f"no {LOCK} and {PROJECT} here to compare with; run this at the top of the project")
        return
    locked = dict(_read_lock(LOCK.read_text()))
    project = tomllib.loads(PROJECT.read_text())["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    missing = sorted(name for name in locked if _version(name) is None)
    if absent := [name for name in missing if name in needed]:
        yield Finding("fail", f"not installed: {', '.join(absent)}; run: make setup")
    others = sorted(
        f"{name} {_version(name)} (locked {version})"
        for name, version in locked.items()
        if name not in missing and _version(name) != version
    )
    if others:
        advice = "results may differ from those of the lock; run: make setup"
        yield Finding("warn", f"other versions than locked: {first_names(others, MOST_NAMES)}; {advice}")
    if not absent and not others:
        rest = f"; {len(missing)} of the lock are for developers or servers and not installed" if missing else ""
        yield Finding("ok", f"{len(locked) - len(missing)} as in {LOCK}{rest}")


def _read_lock(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and version of each package that the lock has for this platform."""
    for line in text.splitlines():
        if "==" not in line or line.startswith((" ", "#")):
            continue
        try:
            requirement = Requirement(line.rstrip("\\ "))
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement.name, next(iter(requirement.specifier)).version


def _version(name: str) -> str | None:
    """Return the installed version of a package, without a local part such as +cpu."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check_device() -> Iterator[Finding]:
    """Check what PyTorch computes on, and how many threads it uses."""
    import torch

    from stages.runtime.device import select_device

    build = torch.__version__
    if select_device().type == "cuda":
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"GPU {index}: {gpu.name}, {format_bytes(gpu.total_memory)} (PyTorch {build})")
    elif shutil.which("nvidia-smi"):
        advice = "install the driver, or the CUDA build of PyTorch (docs/scaling.md)"
        yield Finding("warn", f"an NVIDIA driver is here, but PyTorch {build} finds no GPU; {advice}")
    cores, threads = count_cores(), torch.get_num_threads()
    text = f"{count(threads, 'thread')} on {count(cores, 'core')} (PyTorch {build})"
    if threads > cores:
        yield Finding("warn", f"{text}: they hinder each other; set OMP_NUM_THREADS={cores}")
    else:
        yield Finding("ok", text)


def check_disk() -> Iterator[Finding]:
    """Check the free space of the current folder and of the folder for temporary files."""
    for what, folder in {"here": Path(), "temporary files": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(folder).free
        text = f"{format_bytes(free)} free ({what})"
        if free < FEWEST_BYTES:
            yield Finding("fail", f"{text}; free some, such as by: espalier clean, dvc gc --workspace")
        elif free < FEW_BYTES:
            yield Finding("warn", f"{text}: enough for small models; espalier plan says what a run takes")
        else:
            yield Finding("ok", text)


def check_environment() -> Iterator[Finding]:
    """Check the variables of proxies, certificates, credentials and the Hub, whose values are not printed."""
    for check in (check_network, check_credentials, check_hub, check_numbers):
        check()
    yield Finding("ok", "proxies, certificates and credentials in the environment are well-formed")
