"""The cells of a series: which of them count as finished, and what stops the table."""

import logging
from types import SimpleNamespace

import pytest

from flows.tasks import series as series_module
from flows.tasks.outcome import Outcome
from flows.tasks.series import Series
from flows.tasks.stages import StageFailedError
from flows.workspaces.commands import CommandResult
from flows.workspaces.grid import PlannedCell
from flows.workspaces.repository import ParamsSource
from stages.runtime.errors import InputError, UnavailableError


@pytest.fixture
def series(tmp_path):
    """A sweep of one cell."""
    repository = SimpleNamespace(root=tmp_path / "home")
    return Series(repository, "sweep", ParamsSource("0" * 40), [PlannedCell("seed 1", {"seed": 1})])


def test_a_cell_without_a_record_is_not_finished(series):
    """MLflow was away; the record waits, and the reports cannot be fetched."""
    (name,) = series.cells
    with pytest.raises(UnavailableError, match=r"^MLflow did not take its record; run the sweep again when it"):
        series.finish(name, Outcome(ran=(), mlflow_run=None))
    assert not series.is_finished(name)


def test_a_cell_whose_reports_cannot_be_written_is_not_finished(series):
    """The folder of the cells cannot be made."""
    (name,) = series.cells
    series.folder.parent.mkdir(parents=True)
    series.folder.write_text("")

    with pytest.raises(
        InputError, match=r"^cannot write \S+/cells: Not a directory; free some space or choose another"
    ):
        series.finish(name, Outcome(ran=(), mlflow_run="abc"))
    assert not series.is_finished(name)


def test_cells_that_cannot_be_compared_end_the_flow(series, monkeypatch):
    """The last line of the command says why."""
    monkeypatch.setattr(series_module, "get_run_logger", logging.getLogger)
    monkeypatch.setattr(series_module, "run", lambda *_: CommandResult(1, ("loading", "Error: two protocols")))

    with pytest.raises(StageFailedError, match=r"^the cells cannot be compared: Error: two protocols$"):
        series.publish("sweep_table", [], {}, {})
