"""The benchmark of a GPU: its parts, on tiny models on the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import TINY, Bench, Variant, time_variants
from benchmarks.sampling import draw_with_diffusers
from stages.models.complexity import count_macs
from stages.models.params import SamplerParams
from stages.models.sampling import draw, image_seeds
from tests.conftest import ROOT
from tests.pipeline.test_packages import ABSENT, BLOCK, NEEDED, imported_at_start

BENCH = Bench(torch.device("cpu"), precisions=("float32",), compiled=False, tiny=True, sizes=TINY)


@pytest.fixture
def bare_environment(tmp_path):
    """The environment of a machine that has only what the stages import as they start, and pytest."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(absent=ABSENT))
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_ADDOPTS": "-p no:timeout"}


def run(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [([], "--device cpu --tiny"), (["--tiny"], "--device cpu --tiny"), (["--device", "cpu"], "add --tiny")],
)
def test_without_a_gpu_one_line_says_what_to_do(arguments, advice, tmp_path, monkeypatch):
    """The real models are never measured on a CPU, and nothing is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*arguments, "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert advice in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    """A part takes minutes on a GPU."""
    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {"tests": pytest.fail})
    (tmp_path / "file").touch()
    result = run("--device", "cpu", "--tiny", "--out", tmp_path / "file")

    assert result.exit_code == 1
    assert result.output.startswith(f"Error: cannot write {tmp_path}/file")
    assert len(result.output.splitlines()) == 1


def test_a_part_writes_a_table_and_a_record(tmp_path):
    """Rates are counts by times, speed-ups are relative to the bare loop, and device and versions stand with them."""
    result = run("--device", "cpu", "--tiny", "--part", "importance", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "importance.json").read_text())
    rows, table = record["rows"], (tmp_path / "importance.md").read_text().splitlines()

    assert [row["variant"] for row in rows] == ["bare", *["ours, 1 a pass", "ours, 4 a pass"] * 2]
    assert [row["deterministic"] for row in rows] == [False, True, True, False, False]
    assert {row["precision"] for row in rows} == {"float32"}
    assert [row["reason"] for row in rows] == [""] * 5
    assert [row["timesteps_per_s"] * row["median_ms"] for row in rows] == pytest.approx([4000] * 5)
    assert rows[0]["speed_up"] == 1
    assert (record["torch"], record["cuda"], record["deterministic"]) == (
        torch.__version__,
        torch.version.cuda,
        [False, True],
    )
    assert record["time_utc"].endswith("+00:00")
    assert record["device"].endswith("threads")
    assert record["device"] in table[0]
    assert len(table) == 2 + 2 + len(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["importance.json", "importance.md"]


@pytest.mark.e2e
def test_the_share_of_the_peak_counts_the_operations_of_a_step():
    """A step needs about six times the multiply-accumulates of a forward pass: two operations each, three passes."""
    rows = parts.finetune(BENCH)
    operations = [row["share_of_peak"] * row["peak_tflops"] * 1e12 / row["images_per_s"] for row in rows]
    dense_macs, macs = (count_macs(unet) for unet in BENCH.pair().values())

    assert [row["reason"] for row in rows] == [""] * 3
    assert operations == pytest.approx([operations[0]] * 3)
    assert operations[0] == pytest.approx(6 * macs, rel=0.3)
    assert macs < 0.8 * dense_macs


def test_diffusers_and_ours_draw_the_same_pictures():
    """Otherwise their times would not compare."""
    unet, seeds = BENCH.dense(), image_seeds(0, 3)
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(DDPMScheduler().config))
    theirs = draw_with_diffusers(pipeline, seeds, 4, 2)
    ours = draw(unet, DDPMScheduler(), seeds, SamplerParams(steps=4), batch_size=2, label="ours")

    assert theirs.shape == ours.shape == (3, 3, 8, 8)
    assert np.abs(theirs.astype(int) - ours).max() <= 1


def test_a_variant_that_fails_has_its_reason_and_the_others_go_on():
    """A compiler that fails must not cost the time on a GPU."""

    def fail():
        raise RuntimeError("no kernel | for this\nand more")

    variants = [Variant("one", lambda: None, deterministic=True), Variant("two", fail, deterministic=False)]
    rows = time_variants([*variants, Variant("three", lambda: None, deterministic=True)], BENCH, "float32", "runs", 1)

    assert [row["reason"] for row in rows] == ["", "failed with RuntimeError: no kernel | for this", ""]
    assert [("speed_up" in row, row["deterministic"]) for row in rows] == [(True, True), (False, False), (True, True)]


def test_a_part_that_fails_ends_with_exit_code_1(tmp_path, monkeypatch):
    """After its table is written, and after the other parts have run."""

    def fail(*_, **__):
        raise RuntimeError("no kernel | for this")

    monkeypatch.setattr(parts, "draw", fail)
    result = run("--device", "cpu", "--tiny", "--part", "sampling", "--part", "tests", "--out", tmp_path)

    assert result.exit_code == 1
    assert "2 rows failed, the first in sampling: failed with RuntimeError: no kernel | for this" in result.output
    assert "| failed with RuntimeError: no kernel / for this |" in (tmp_path / "sampling.md").read_text()
    assert "need a GPU" in (tmp_path / "tests.md").read_text()


def test_settings_for_which_no_time_is_left_say_how_to_run_them(monkeypatch):
    """Each with its own command."""
    monkeypatch.setattr(parts, "SECONDS", -1)
    rows = parts.table(BENCH)

    assert [row["reason"].partition("run ")[2] for row in rows] == [
        f"--part table --system {system} --precision float32" for system in BENCH.systems
    ]


def test_it_imports_no_other_packages_than_the_stages():
    """So a machine that can run the stages can run it."""
    files = [*(ROOT / "benchmarks" / "gpu").glob("*.py")]
    files += [ROOT / "benchmarks" / f"{name}.py" for name in ("finetune", "importance", "sampling", "sizes")]

    assert set().union(*map(imported_at_start, files)) - {"benchmarks"} <= NEEDED


@pytest.mark.e2e
def test_every_part_runs_on_a_bare_machine(tmp_path, bare_environment):
    """All of them in one process, on tiny models, without MLflow, Prefect, DVC, boto3 and datasets."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=bare_environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = {path.stem: json.loads(path.read_text())["rows"] for path in (tmp_path / "out").glob("*.json")}

    assert set(found) == {"tests", "table", "importance", "finetune", "sampling"}
    assert [row["reason"] for row in found.pop("tests")] == ["the tests marked gpu need a GPU"]
    assert all(row["reason"] == "" for rows in found.values() for row in rows)
    assert [(row["system"], row["batch"], row["model"]) for row in found["table"]] == [
        (system, batch, model) for system in BENCH.systems for model in ("dense", "pruned") for batch in (1, 2)
    ]
    assert all(row["images_per_s"] > 0 for name in ("table", "finetune", "sampling") for row in found[name])


@pytest.mark.e2e
def test_the_tests_marked_gpu_run_on_a_bare_machine(bare_environment):
    """Without a GPU that of tf32 must fail, which shows that it ran."""
    code = "import json, torch; from benchmarks.gpu.bench import Bench; from benchmarks.gpu.suite import run_tests"
    code += "; print(json.dumps(run_tests(Bench(torch.device('cuda')))))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=bare_environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = {row["test"].rpartition(".")[2]: row for row in json.loads(result.stdout)}

    assert "test_a_step_on_a_gpu_never_waits" in rows
    assert all(row.get("reason", "").startswith("failed with") for row in rows.values() if row["outcome"] != "passed")
    expected = "passed" if torch.cuda.is_available() else "failure"
    assert rows["test_tf32_rounds_on_a_gpu_and_float32_does_not"]["outcome"] == expected
