"""Results of a process, as a file for the program that started it."""

import json

import click
import pytest
from click.testing import CliRunner

from stages.runtime.errors import InputError
from stages.runtime.result import RESULT_VARIABLE, write_result


def test_a_result_replaces_the_one_before(tmp_path, monkeypatch):
    """The file is whole at every moment, and nothing else is left beside it."""
    monkeypatch.setenv(RESULT_VARIABLE, str(tmp_path / "result.json"))
    write_result(uri="models:/a/1", new=True)
    write_result(uri="models:/a/2", new=False)

    assert json.loads((tmp_path / "result.json").read_text()) == {"uri": "models:/a/2", "new": False}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("path", ["", "nowhere/result.json"])
def test_a_result_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch, path):
    """A command outside a flow has no result file, and one on a full disk ends as it would without."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RESULT_VARIABLE, path)
    write_result(uri="models:/a/1")

    assert list(tmp_path.iterdir()) == []


def test_an_input_error_writes_its_message(tmp_path, monkeypatch):
    """What click prints stays as it was."""
    monkeypatch.setenv(RESULT_VARIABLE, str(tmp_path / "result.json"))

    @click.command()
    def main():
        raise InputError("Error: a; b")

    result = CliRunner().invoke(main)

    assert (result.exit_code, result.stderr) == (1, "Error: Error: a; b\n")
    assert json.loads((tmp_path / "result.json").read_text()) == {"message": "Error: a; b"}
