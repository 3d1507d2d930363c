"""The tests marked gpu -> a row for each."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.gpu.bench import Bench, Rows

ROOT = Path(__file__).parents[2]
SECONDS = 500
"""Seconds after which the tests are stopped."""


def run_tests(bench: Bench) -> Rows:
    """Run the tests marked gpu; a row for each."""
    if bench.device.type == "cpu":
        return [{"reason": "the tests marked gpu need a GPU"}]
    if importlib.util.find_spec("pytest") is None:
        return [{"reason": "pytest is not installed; install it to run the tests marked gpu"}]
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    options += ["-W", "ignore::pytest.PytestConfigWarning"]  # of `timeout`, without pytest-timeout
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *files]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=SECONDS, stdout=2, check=False).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            return [{"reason": f"failed with more than {SECONDS} s"}]
        if not report.is_file():
            return [{"reason": f"failed with exit code {code} of pytest, before any test"}]
        return [_test_row(case) for case in ET.parse(report).iter("testcase")]  # noqa: S314  # written above


def _test_row(case: ET.Element) -> dict[str, Any]:
    found = next((case.find(kind) for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
    row = {"test": f"{case.get('classname')}.{case.get('name')}", "seconds": float(case.get("time", 0))}
    if found is None:
        return {**row, "outcome": "passed"}
    message = (found.get("message") or found.tag).splitlines()[0]
    return {**row, "outcome": found.tag, "reason": message if found.tag == "skipped" else f"failed with {message}"}
