"""The cells of a sweep or comparison -> each compressed once, and a table of all that are finished."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import State, Task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner

from flows.tasks import artifacts
from flows.tasks.names import literal_name
from flows.tasks.outcome import Outcome
from flows.tasks.runners import RunnerName, Slots, compress_here, compress_on_pool, open_runner
from flows.tasks.stages import StageFailedError
from flows.workspaces.commands import run
from flows.workspaces.grid import PlannedCell
from flows.workspaces.repository import ParamsSource, Repository, hash_json, locked
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.files import cannot_write

REPORTS = ("evaluate/evaluation.json", "costs/costs.json")
"""Report files of a cell that the tables compare."""
VARIANTS = ("variants/variants.json", "costs/variants.json")
"""Reports of a cell on the quality and the times of its variants; commits from before that stage have none."""
SUBFOLDERS = {VARIANTS[1]: "costs"}
"""Report -> the subfolder of a cell that it is kept in, for its name is that of another one."""


class Series:
    """Cells that change one params file, and which of them are finished.

    Args:
        repository: Its folder on this machine keeps the finished cells.
        kind: sweep, comparison or curve.
        source: The params file that the cells' overrides change.
        cells: All different.
        reports: Report files of a cell that the table needs.
        extras: Report files that a cell may lack.
    """

    def __init__(
        self,
        repository: Repository,
        kind: str,
        source: ParamsSource,
        cells: Sequence[PlannedCell],
        reports: Sequence[str] = REPORTS,
        extras: Sequence[str] = VARIANTS,
    ) -> None:
        names = [hash_json([source.commit, source.preset, cell.overrides, cell.about]) for cell in cells]
        self.kind, self.source, self.reports, self.extras = kind, source, reports, extras
        self.cells = {name[:12]: cell for name, cell in zip(names, cells, strict=True)}
        self.id = hash_json([kind, *names])
        self.folder = repository.root / f"{kind}s" / self.id[:12]
        self.lock = repository.root / "locks" / f"{kind}-{self.id}.lock"

    def is_finished(self, name: str) -> bool:
        """Whether a cell was compressed and its reports were fetched."""
        return (self.folder / "cells" / name / "cell.json").is_file()

    def finish(self, name: str, outcome: Outcome) -> None:
        """Fetch a cell's reports from MLflow, to which the machine that it ran on sent them, and mark it finished.

        Raises:
            InputError: MLflow is unavailable, the cell was not recorded, or its reports cannot be written.
        """
        if outcome.mlflow_run is None:
            raise UnavailableError(f"MLflow did not take its record; run the {self.kind} again when it is back")
        cell = self.cells[name]
        about = {**cell.about, "overrides": cell.overrides, "mlflow_run": outcome.mlflow_run, "ran": outcome.ran}
        cells = self.folder / "cells"
        try:
            self._fetch(name, outcome.mlflow_run, about, cells)
        except OSError as error:
            raise cannot_write(cells, error) from None

    def _fetch(self, name: str, run: str, about: Mapping[str, Any], cells: Path) -> None:
        from stages.tracking import recording

        cells.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            for report in [*self.reports, *recording.list_reports(run, self.extras)]:
                found = recording.fetch_report(run, report, Path(temporary))
                place = folder / SUBFOLDERS.get(report, ".") / found.name
                place.parent.mkdir(exist_ok=True)
                found.rename(place)
            (folder / "cell.json").write_text(json.dumps(about, indent=2))
            folder.rename(cells / name)

    def publish(
        self, table: str, options: Iterable[str], params: Mapping[str, str], pictures: Mapping[str, str]
    ) -> dict[str, Any]:
        """Compare the finished cells, show the table in Prefect and MLflow, and return it as data.

        Args:
            table: sweep_table, method_table or curve_table, after the command of stages.tools that compares the cells.
            options: Further options of that command.
            params: Params of the MLflow run that keeps the table.
            pictures: File -> description; a file that is missing is left out.

        Raises:
            InputError: The cells cannot be compared.
        """
        logger, out = get_run_logger(), self.folder / "result"
        folders = ["--cells", str(self.folder / "cells"), "--out", str(out)]
        result = run(["python", "-m", "stages.tools", table.replace("_", "-"), *folders, *options], logger.info)
        if result.code:
            raise StageFailedError(f"the cells cannot be compared: {result.message}")
        found: dict[str, Any] = json.loads((out / f"{table}.json").read_text())
        rows = [dict(zip(found["header"], row, strict=True)) for row in found["rows"]]
        self._show(out, rows, pictures)
        self._record(out, rows, params)
        logger.info("table and plot are in %s", out)
        return found

    def _show(self, out: Path, rows: list[dict[str, Any]], pictures: Mapping[str, str]) -> None:
        """Show table and pictures on Prefect's page."""
        title = f"{self.kind.capitalize()} {self.id[:12]} at {self.source.commit[:12]}"
        create_table_artifact(rows, key=self.kind, description=title)
        create_markdown_artifact((out / "table.md").read_text(), key=f"{self.kind}-table", description="With protocol")
        for file, description in pictures.items():
            if (out / file).is_file():
                artifacts.picture(f"{self.kind}-{Path(file).stem}", out / file, description)

    def _record(self, out: Path, rows: list[dict[str, Any]], params: Mapping[str, str]) -> None:
        """Send table and pictures to MLflow; a warning where it is unavailable."""
        from stages.tracking import recording

        try:
            artifacts.link(recording.record_folder(f"{self.kind}-{self.id[:8]}", self.id, params, out, rows))
        except UnavailableError as error:
            get_run_logger().warning(error.format_message())


@dataclass(frozen=True)
class CellExecutor:
    """Compresses the cells of a series."""

    series: Series
    runner: TaskRunner[Any]
    slots: Slots | None
    """Free shares of this machine; None where cells run elsewhere."""
    limits: dict[str, float]
    on_pool: bool = False
    """Whether workers of a pool compress the cells."""

    def submit(self, name: str, *, to_register: bool = False) -> PrefectFuture[Any]:
        """Submit the compression of a cell to the runner."""
        cell, source = self.series.cells[name], self.series.source
        given = {
            "overrides": cell.overrides,
            "commit": source.commit,
            "limits": self.limits,
            "preset": source.preset,
            "to_register": to_register,
        }
        job: Task[..., Any] = compress_here
        more: dict[str, Any] = {"slots": self.slots, "label": cell.label}
        if self.on_pool:
            job, more = compress_on_pool, {"tag": f"cell:{name}{':register' * to_register}"}
        future: PrefectFuture[Any] = self.runner.submit(
            job.with_options(task_run_name=literal_name(cell.label)), {**given, **more}
        )
        return future

    def compress_all(self) -> dict[str, str]:
        """Compress the unfinished cells; returns cell -> reason of those that failed, which stop no other.

        Each cell is marked finished as soon as it is.
        """
        logger, series = get_run_logger(), self.series
        names = [name for name in series.cells if not series.is_finished(name)]
        logger.info(
            "%s %s: %s cells, %s of them finished before",
            series.kind,
            series.id[:12],
            len(series.cells),
            len(series.cells) - len(names),
        )
        futures = {self.submit(name): name for name in names}
        failed: dict[str, str] = {}
        for done, future in enumerate(as_completed(list(futures)), start=1):
            future.wait()  # before this, the state may be an outdated one of the server
            name, state = futures[future], future.state
            progress = f"{done} of {len(names)} cells: {series.cells[name].label}"
            try:
                if not state.is_completed():
                    raise StageFailedError(state.message or state.name or "it did not end")
                series.finish(name, state.result())
                logger.info("%s, %s", progress, state.message)
            except InputError as error:
                failed[name] = error.format_message()
                logger.warning("%s failed, %s", progress, failed[name])
        return failed


@contextmanager
def open_executor(
    series: Series, runner: RunnerName, jobs: int, limits: dict[str, float] | None
) -> Iterator[CellExecutor]:
    """Lock the series against other runs, and start the runner of its cells.

    Raises:
        InputError: The server lacks the deployment compress.
    """
    with (
        locked(series.lock, get_run_logger().info),
        open_runner(runner, jobs) as (task_runner, slots),
    ):
        yield CellExecutor(series, task_runner, slots, limits or {}, on_pool=runner == "pool")


def describe(series: Series, failed: Mapping[str, str]) -> list[str]:
    """Report how many cells finished, and why others did not."""
    return [
        f"{len(series.cells) - len(failed)} of {len(series.cells)} cells finished",
        *(f"{series.cells[name].label} failed: {why}" for name, why in failed.items()),
    ]


def compress_and_publish(
    executor: AbstractContextManager[CellExecutor],
    table: str,
    options: Iterable[str],
    params: Mapping[str, str],
    pictures: Mapping[str, str],
) -> State[None]:
    """Compress the cells of a comparison, `Series.publish` those that finished, and return the flow's state."""
    with executor as opened:
        series, failed = opened.series, opened.compress_all()
        if len(failed) < len(series.cells):
            series.publish(table, options, params, pictures)
    return (Failed if failed else Completed)(message="; ".join(describe(series, failed)))
