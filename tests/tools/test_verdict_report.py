"""The command report: for a terminal, for a pull request, and against another commit."""

import re
import shutil

import pytest
from click.testing import CliRunner

from stages.protocol.evaluation import Difference, Metric
from stages.storage.files import write_json
from stages.tools import report_text
from stages.tools.verdict_report import report
from tests.records import make_costs, make_evaluation, make_model

POLICY = """champion: {fid: 0.2, ssim: 0.02, speed_up: 0.1}
dense: {fid: 0.5, ssim: 0.15}
budget: {macs: 0.7}
latency: {batch: 1, precision: float32, mode: eager, speed_up: 1.0}
canary: {levels: 1.0}
"""


def make_metric(values, dense=None):
    """Make a metric with these values, above the dense model's by `dense` of each set."""
    mean = sum(values) / len(values)
    above = (
        None if dense is None else Difference(mean=mean - dense, half_width=0.01, is_distinct=abs(mean - dense) > 0.01)
    )
    return Metric(sets=values, mean=mean, half_width=0.01, above_dense=above)


@pytest.fixture
def project(tmp_path, protocol, monkeypatch):
    """A folder with a policy and reports of a compression; returns a function that writes reports."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(POLICY)
    three = protocol.model_copy(update={"sets": 3})

    def write(folder, fid=0.5, ssim=0.99, *, speed_up=1.2, visible=0, seed=3, device="cpu"):
        size = {"params": 50, "macs": 50, "visible_pairs": visible}
        own = {"fid": make_metric([fid - 0.1, fid, fid + 0.1], 0.5), "ssim": make_metric([ssim] * 3)}
        models = {
            "dense": make_model({"fid": make_metric([0.4, 0.5, 0.6])}, params=100, macs=100),
            "finetuned": make_model(own, **size),
            "pruned": make_model(own, **size),
        }
        record = make_evaluation(three.model_copy(update={"seed": seed}), models)
        costs = make_costs(record, speed_up, device)
        write_json(tmp_path / folder / "evaluate/evaluation.json", record.model_dump(mode="json"))
        write_json(tmp_path / folder / "evaluate/run.json", {"packages": {}})
        write_json(tmp_path / folder / "costs/costs.json", costs.model_dump(mode="json"))

    write("reports")
    return write


@pytest.fixture
def reported(project):
    """Run the command: exit code and output."""
    del project

    def run(*arguments):
        result = CliRunner().invoke(report, ["--policy", "policy.yaml", *arguments])
        return result.exit_code, result.output

    return run


@pytest.fixture
def earlier(project, monkeypatch, tmp_path):
    """Let a commit have other reports, which are read from a folder and not from DVC."""
    project("before", fid=0.7, ssim=0.9)

    def fetch(commit, reports, folder):
        del commit, reports
        shutil.copytree(tmp_path / "before", folder, dirs_exist_ok=True)

    monkeypatch.setattr(report_text, "fetch_reports", fetch)
    return lambda **changes: project("before", **changes)


def test_reports_outside_the_project_have_no_earlier_ones(project, reported, tmp_path, monkeypatch):
    """A commit has the reports of its own folder alone."""
    project("elsewhere/reports")
    monkeypatch.chdir(tmp_path / "elsewhere" / "reports")

    code, output = reported("--reports", str(tmp_path / "reports"), "--against", "HEAD")
    assert (code, len(output.splitlines())) == (1, 1)
    assert "reports is outside the current folder, and --against reads the same one of HEAD" in output


def test_the_report_begins_with_the_verdict(reported):
    """In a terminal as in a pull request; the table has the models in their order."""
    code, output = reported()
    _, markdown = reported("--markdown")

    assert code == 0
    sentence = output.splitlines()[0].removeprefix("Good. ")
    assert sentence.startswith("Half the size and 1.20× as fast (cpu, batch 1); pictures differ visibly in none of")
    assert markdown.splitlines()[0] == f"### Good: {sentence}"
    rows = [line.split("|")[1].strip() for line in markdown.splitlines()[4:7]]
    assert rows == ["dense", "pruned", "finetuned"]


def test_markdown_folds_what_is_long(reported):
    """Reasons, worst pairs and protocol."""
    _, output = reported("--markdown")

    assert output.count("<details>") == output.count("</details>") == 3
    assert "| 1 | 1 | 0.500 | 0.1000 |" in output


@pytest.mark.parametrize(("fid", "result"), [(0.5, "all 4 limits met"), (1.5, "1 of 4 limits missed")])
def test_the_gate_says_which_limits_are_missed(reported, project, fid, result):
    """By the policy, without a registry."""
    project("reports", fid=fid)
    _, output = reported("--markdown")

    assert f"#### Gate: {result}" in output
    assert ("✗ | FID against dense" in output) is (fid > 1)


def test_the_limits_of_a_variant_are_among_those_of_the_gate(reported, tmp_path):
    """Where the policy asks for one; a run that measured none misses them in one line."""
    asked = "variant: {kind: onnx, fid: 0.2, ssim: 0.1}\n"
    (tmp_path / "policy.yaml").write_text(POLICY + asked)
    write_json(tmp_path / "reports/variants/variants.json", {"variants": {}})
    _, output = reported("--markdown")

    assert "#### Gate: 1 of 5 limits missed" in output
    assert "✗ | onnx measured | finetuned+onnx was not measured; measured: no variant" in output


def test_a_broken_model_is_said_to_be_worse(reported, project):
    """First of all."""
    project("reports", fid=9.0, ssim=0.104, visible=12)

    assert reported("--markdown")[1].startswith(
        "### Bad: Worse than the dense model: pictures differ visibly in all of 12;"
    )


def test_another_commit_is_compared_with_intervals(reported, earlier):
    """Paired by set: FID is .2 lower, SSIM .09 higher, and equal numbers cannot be told apart."""
    del earlier
    _, output = reported("--markdown", "--against", "main")

    assert "#### Against main" in output
    assert "| FID | 0.700 ± 0.010 | 0.500 ± 0.010 | -0.200 ± 0.000 |" in output
    assert "| recall | 0.500 | 0.500 | +0.000 ± 0.000 ≈ |" in output
    assert "| speed-up, batch 1, float32 | 1.20× (1.15–1.25) | 1.20× (1.15–1.25) | +0.00 ≈ |" in output
    assert "Verdict at main: " in output


@pytest.mark.parametrize(("before", "shown"), [(1.12, "+0.08 |"), (1.14, "+0.06 ≈ |")])
def test_speed_ups_of_two_runs_differ_beyond_the_interval_of_their_difference(reported, earlier, before, shown):
    """Each has ± .05, so their difference ± .07; that both intervals overlap says less."""
    earlier(fid=0.7, ssim=0.9, speed_up=before)
    _, output = reported("--markdown", "--against", "main")

    assert re.search(r"\| speed-up, batch 1, float32 \|.*\| " + re.escape(shown), output)


def test_times_of_two_devices_are_not_compared(reported, earlier):
    """Both are shown."""
    earlier(device="another")

    assert "measured on another device or in another setting" in reported("--against", "main")[1]


def test_another_protocol_is_refused(reported, earlier):
    """One line names the field that differs."""
    earlier(seed=9)
    code, output = reported("--against", "main")

    assert code == 1
    assert "seed is 9 and 3; measure both under one protocol" in output
    assert len(output.splitlines()) == 1


def test_a_folder_without_reports_is_refused(reported):
    """One line says what to run."""
    code, output = reported("--reports", "nowhere")

    assert code == 1
    assert "nowhere/evaluate/evaluation.json does not exist; run the pipeline first" in output
    assert len(output.splitlines()) == 1


def test_a_commit_that_does_not_exist_is_refused(tmp_path, monkeypatch, reported):
    """In one line, as is a folder without DVC."""
    monkeypatch.chdir(tmp_path)
    code, output = reported("--against", "no-such-commit")

    assert code == 1
    assert "the reports of no-such-commit could not be read" in output
    assert "dvc push" in output
    assert len(output.splitlines()) == 1
