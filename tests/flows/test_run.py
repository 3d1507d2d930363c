"""espalier run: params.yaml is checked, the stages run, and the results are printed."""

import pytest
from click.testing import CliRunner

from flows.__main__ import main
from flows.commands import run as run_module
from flows.workspaces import running
from stages.storage.files import write_json

RESULTS = "Changed. Half as large.\n\n| model |\nLook at it: reports/index.html\n"


def write_results(project):
    """Write what the stage report leaves."""
    (project / "reports/summary").mkdir(parents=True)
    (project / "reports/summary/results.md").write_text("**Half as large.**\n\n| model |\n")
    write_json(project / "reports/summary/verdict.json", {"level": "changed", "sentence": "Half as large."})


@pytest.fixture
def project(tmp_path, root, monkeypatch):
    """A folder with the files that run checks, as the current one, in no repository."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stages(project, monkeypatch):
    """Replace the stages by a function that writes a table; returns the arguments that it was called with."""
    seen = []

    def run_stages(arguments):
        seen.append(arguments)
        write_results(project)
        return 0

    monkeypatch.setattr(running, "run_stages", run_stages)
    return seen


def test_the_results_and_the_page_are_printed_after_the_stages(stages):
    """All stages are brought up to date."""
    result = CliRunner().invoke(main, ["run"])

    assert (result.exit_code, result.stdout) == (0, RESULTS)
    assert stages == [()]


def test_arguments_go_to_dvc_and_no_table_is_printed(stages):
    """It could be that of an earlier run."""
    result = CliRunner().invoke(main, ["run", "finetune", "--force"])

    assert (result.exit_code, result.stdout) == (0, "")
    assert stages == [("finetune", "--force")]


def test_a_failure_has_the_exit_code_of_the_stages_and_no_table(project, monkeypatch):
    """An old table would look like the result."""
    (project / "reports/summary").mkdir(parents=True)
    (project / "reports/summary/results.md").write_text("old")
    monkeypatch.setattr(running, "run_stages", lambda _: 143)
    result = CliRunner().invoke(main, ["run"])

    assert (result.exit_code, result.stdout) == (143, "")


def test_a_wrong_key_is_refused_before_a_stage_runs(stages, project):
    """The message says what was meant."""
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("round_to:", "roundto:"))
    result = CliRunner().invoke(main, ["run"])

    assert result.exit_code == 1
    assert "prune.roundto is not a known key; did you mean prune.round_to?" in result.stderr
    assert stages == []


@pytest.mark.usefixtures("stages")
def test_a_folder_without_git_is_told_once(project):
    """DVC would refuse it; settings that are there already stay."""
    result = CliRunner().invoke(main, ["run"])

    assert result.exit_code == 0
    assert result.stderr.startswith("This folder is no Git repository: the stages run, but flows on commits")
    assert (project / ".dvc/config.local").read_text() == "[core]\n    no_scm = true\n"
    (project / ".dvc/config.local").write_text("[core]\n    autostage = true\n")
    run_module.allow_no_git(project)
    assert (project / ".dvc/config.local").read_text() == "[core]\n    autostage = true\n"


@pytest.mark.usefixtures("stages")
def test_a_folder_that_became_a_repository_is_one_for_dvc(project):
    """The setting goes once there is one; also above the folder, and whether git itself works or not."""
    run_module.allow_no_git(project)
    (project / ".git").mkdir()
    run_module.allow_no_git(project)

    assert not (project / ".dvc/config.local").exists()


@pytest.mark.e2e
def test_the_lines_of_the_stages_are_printed(project):
    """Those of a real DVC, which has nothing to do in a project without stages."""
    (project / "dvc.yaml").write_text("stages: {}\n")
    write_results(project)
    result = CliRunner().invoke(main, ["run"])

    assert result.exit_code == 0, result.output
    assert "Data and pipelines are up to date." in result.stdout
    assert result.stdout.endswith(RESULTS)
