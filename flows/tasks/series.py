"""Named cells at a commit -> each compressed once, wherever there is room, and what came of all of them shown."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.task_runners import TaskRunner

from flows.tasks import artifacts
from flows.tasks.runners import RunnerName, Slots, compress_here, compress_on_pool, open_runner
from flows.tasks.stages import Outcome, StageFailedError
from flows.workspaces.commands import run
from flows.workspaces.overrides import PlannedCell
from flows.workspaces.repository import Base, Repository, hash_json, locked
from stages.runtime.errors import InputError, UnavailableError


class Series:
    """Cells on one base, and what is finished of them on this machine.

    Args:
        home: What runs of the repository share.
        kind: What it is in the words of the user, such as sweep.
        base: What overrides change.
        cells: Each of which is unlike every other.
    """

    def __init__(self, repository: Repository, kind: str, base: Base, cells: Sequence[PlannedCell]) -> None:
        names = [hash_json([base.commit, base.preset, cell.overrides, cell.about]) for cell in cells]
        self.kind, self.base = kind, base
        self.cells = {name[:12]: cell for name, cell in zip(names, cells, strict=True)}
        self.id = hash_json([kind, *names])
        self.folder = repository.root / f"{kind}s" / self.id[:12]
        self.lock = repository.root / "locks" / f"{kind}-{self.id}.lock"

    def is_finished(self, name: str) -> bool:
        """Whether a cell needs nothing more."""
        return (self.folder / "cells" / name / "cell.json").is_file()

    def finish(self, name: str, message: str) -> None:
        """Fetch a cell's evaluation from MLflow, where whatever machine it ran on has put it, and note that it is done.

        Raises:
            InputError: MLflow is away, or the cell was not recorded.
        """
        from stages.tracking import recording

        outcome = Outcome.read(message)
        if outcome.mlflow_run is None:
            raise UnavailableError(f"MLflow did not take its record; run the {self.kind} again when it is back")
        place = self.folder / "cells" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            found = Path(temporary) / "cell"
            found.mkdir()
            for file in ("evaluate/evaluation.json", "costs/costs.json"):
                recording.fetch_report(outcome.mlflow_run, file, Path(temporary)).rename(found / Path(file).name)
            cell = self.cells[name]
            about = {
                **cell.about,
                "overrides": cell.overrides,
                "mlflow_run": outcome.mlflow_run,
                "ran": outcome.ran,
            }
            (found / "cell.json").write_text(json.dumps(about, indent=2))
            found.rename(place)

    def publish(
        self, table: str, options: Iterable[str], params: Mapping[str, str], pictures: Mapping[str, str]
    ) -> dict[str, Any]:
        """Compare what is finished, show that here and in MLflow, and give what programs read of it.

        Args:
            table: sweep_table or method_table: the command of stages.tools that compares the cells.
            options: For it, beside the folders of cells and result.
            params: For MLflow.
            pictures: File -> what it shows; one that is not there is left out.

        Raises:
            InputError: The cells cannot be compared.
        """
        from stages.tracking import recording

        logger, out = get_run_logger(), self.folder / "result"
        folders = ["--cells", str(self.folder / "cells"), "--out", str(out)]
        result = run(["python", "-m", "stages.tools", table.replace("_", "-"), *folders, *options], logger.info)
        if result.code:
            raise StageFailedError(f"the cells cannot be compared: {result.lines[-1].removeprefix('Error: ')}")
        found: dict[str, Any] = json.loads((out / f"{table}.json").read_text())
        rows = [dict(zip(found["header"], row, strict=True)) for row in found["rows"]]
        title = f"{self.kind.capitalize()} {self.id[:12]} at {self.base.commit[:12]}"
        create_table_artifact(rows, key=self.kind, description=title)
        create_markdown_artifact((out / "table.md").read_text(), key=f"{self.kind}-table", description="With protocol")
        for file, description in pictures.items():
            if (out / file).is_file():
                artifacts.picture(f"{self.kind}-{Path(file).stem}", out / file, description)
        try:
            artifacts.link(recording.record_folder(f"{self.kind}-{self.id[:8]}", self.id, params, out, rows))
        except UnavailableError as error:
            logger.warning(error.message)
        logger.info("table and plot are in %s", out)
        return found


@dataclass(frozen=True)
class CellExecutor:
    """Who compresses the cells of a series."""

    series: Series
    runner: TaskRunner[Any]
    slots: Slots | None
    """Of this machine, for those who work on it; None on a cluster."""
    limits: dict[str, float]
    on_pool: bool = False

    def submit(self, name: str, *, to_register: bool = False) -> PrefectFuture[Any]:
        """Start a cell, or let it wait for its turn."""
        cell, base = self.series.cells[name], self.series.base
        given = {
            "overrides": cell.overrides,
            "commit": base.commit,
            "limits": self.limits,
            "preset": base.preset,
            "to_register": to_register,
        }
        job: Task[..., Any] = compress_here
        more: dict[str, Any] = {"slots": self.slots, "label": cell.label}
        if self.on_pool:
            job, more = compress_on_pool, {"tag": f"cell:{name}{':register' * to_register}"}
        future: PrefectFuture[Any] = self.runner.submit(job.with_options(task_run_name=cell.label), {**given, **more})
        return future

    def compress_all(self) -> dict[str, str]:
        """Compress what is not finished, note each cell as soon as it is, and say why others failed.

        One that fails takes down no other.
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
            future.wait()  # else the state is what the server last said
            name, state = futures[future], future.state
            progress = f"{done} of {len(names)} cells: {series.cells[name].label}"
            try:
                if not state.is_completed():
                    raise StageFailedError(state.message or state.name or "it did not end")
                series.finish(name, state.message or "")
                logger.info("%s, %s", progress, state.message)
            except InputError as error:
                failed[name] = error.message
                logger.warning("%s failed, %s", progress, error.message)
        return failed


@contextmanager
def open_executor(
    series: Series, runner: RunnerName, jobs: int, address: str | None, limits: dict[str, float] | None
) -> Iterator[CellExecutor]:
    """Keep other runs of the series out, and start who compresses its cells.

    Raises:
        InputError: The runner cannot be had.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; give at least 1")
    with (
        locked(series.lock, get_run_logger().info),
        open_runner(runner, jobs, address) as (task_runner, slots),
    ):
        yield CellExecutor(series, task_runner, slots, limits or {}, on_pool=runner == "pool")


def describe(series: Series, failed: Mapping[str, str]) -> list[str]:
    """Say how many cells finished, and why others did not."""
    return [
        f"{len(series.cells) - len(failed)} of {len(series.cells)} cells finished",
        *(f"{series.cells[name].label} failed: {why}" for name, why in failed.items()),
    ]
