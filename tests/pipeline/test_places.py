"""All files that commands make lie in the project, its home or the temporary folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.workspaces.overrides import apply
from tests.servers import ROOT, own_environment

SMALL = {
    "importance.criterion": "taylor",
    "importance.stride": 500,
    "importance.num_images": 2,
    "importance.report": None,
    "reference.sampler.steps": 2,
    "finetune.samples.steps": 2,
}
CHOSEN = ("HF_", "MPLCONFIGDIR", "PREFECT_", "TORCH", "XDG_")
"""Variables by which a user, or PyTorch in the process of this test, chooses other folders."""
WATCHED = """
import json, os, sys
from importlib import import_module

FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
made = []

def watch(event, arguments):
    match event:
        case "open" if isinstance(arguments[0], (str, bytes)) and arguments[2] & FLAGS:
            made.append(arguments[0])
        case "os.mkdir":
            made.append(arguments[0])
        case "os.rename" | "os.link" | "os.symlink":
            made.append(arguments[1])

sys.addaudithook(watch)
for stage, *options in json.loads(sys.argv[1]):
    import_module(f"stages.{stage}.__main__").main(options, standalone_mode=False)
print(json.dumps([os.path.abspath(os.fsdecode(path)) for path in made]))
"""
"""Runs stages in one process, and prints each path that Python opened for writing, made or renamed to."""
MODEL, DATA = ("--model", "artifacts/pretrained"), ("--data", "artifacts/data")
COMMANDS = [
    ["fetch", "--model-out", "artifacts/pretrained", "--data-out", "artifacts/data"],
    ["importance", *MODEL, *DATA, "--out", "artifacts/importance", "--report", "reports/importance"],
    ["prune", *MODEL, *DATA, "--importance", "artifacts/importance", "--out", "artifacts/pruned"],
]


@pytest.mark.e2e
def test_fetch_importance_and_prune_write_only_where_they_may(tmp_path):
    """No library leaves a file beside the project; what remains are the outputs of the stages."""
    places = {name: tmp_path / name for name in ("project", "home", "temporary")}
    for place in places.values():
        place.mkdir()
    (places["project"] / "params.yaml").write_bytes(apply(SMALL, ROOT / "params.yaml"))
    environment = {key: value for key, value in own_environment().items() if not key.startswith(CHOSEN)}
    environment |= {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", WATCHED, json.dumps(COMMANDS)]
    result = subprocess.run(
        command, cwd=places["project"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    made = {Path(path) for path in json.loads(result.stdout.splitlines()[-1])} - {Path(os.devnull)}

    outside = {path for path in made if not any(path.is_relative_to(place) for place in places.values())}
    assert outside == set()
    assert places["project"] / "artifacts" / "pruned" in made
    left = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()}
    outputs = {("project", "artifacts", name) for name in ("pretrained", "data", "importance", "pruned")}
    records = {("project", "artifacts", f"{name}.provenance.json") for name in ("pretrained", "importance", "pruned")}
    expected = outputs | records | {("project", "params.yaml"), ("project", "reports", "importance")}
    assert {parts for parts in left if parts[0] != "home"} == expected
