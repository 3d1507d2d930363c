"""A grid over params.yaml -> one compression a cell, one table, one plot, and the best as challengers."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import State, Task, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner

from flows import show
from flows.cells import RunnerName, Slots, compress_here, compress_on_pool, open_runner
from flows.commands import run
from flows.home import Home, hash_json, locked
from flows.notify import HOOKS
from flows.overrides import check_apart, plan_cells, write
from flows.pipeline import Outcome, StageFailedError
from flows.words import in_words
from stages.errors import InputError, UnavailableError


def _name_run() -> str:
    grid = flow_run.parameters.get("grid") or {}
    return " × ".join(f"{len(values)} {key.rpartition('.')[2]}" for key, values in grid.items())


class Sweep:
    """A grid at a commit, and what is finished of it on this machine.

    Args:
        home: What runs of the repository share.
        commit: The hash.
        cells: Overrides of each cell.
        keys: Those that tell cells apart.
    """

    def __init__(self, home: Home, commit: str, cells: list[dict[str, Any]], keys: Iterable[str]) -> None:
        self.commit, self.cells = commit, {hash_json([commit, cell])[:12]: cell for cell in cells}
        self.keys = tuple(keys)
        self.id = hash_json([commit, cells])
        self.folder = home.root / "sweeps" / self.id[:12]

    def label(self, name: str) -> str:
        """Write what tells a cell apart."""
        return write({key: self.cells[name][key] for key in self.keys})

    def is_finished(self, name: str) -> bool:
        """Whether a cell needs nothing more."""
        return (self.folder / "cells" / name / "cell.json").is_file()

    def finish(self, name: str, message: str) -> None:
        """Fetch a cell's evaluation from MLflow, where whatever machine it ran on has put it, and note that it is done.

        Raises:
            InputError: MLflow is away, or the cell was not recorded.
        """
        from stages import tracking

        outcome = Outcome.read(message)
        if outcome.mlflow_run is None:
            raise UnavailableError("MLflow did not take its record; run the sweep again when it is back")
        place = self.folder / "cells" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            found = tracking.fetch_report(outcome.mlflow_run, "evaluate/evaluation.json", Path(temporary))
            about = {"overrides": self.cells[name], "mlflow_run": outcome.mlflow_run, "ran": outcome.ran}
            (found.parent / "cell.json").write_text(json.dumps(about, indent=2))
            found.parent.rename(place)


@flow(flow_run_name=_name_run, persist_result=False, **HOOKS)
@in_words
def sweep(
    grid: dict[str, list[Any]],
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    runner: RunnerName = "threads",
    jobs: int = 1,
    address: str | None = None,
    limits: dict[str, float] | None = None,
    best: int = 1,
) -> State[None]:
    """Compress every combination of the grid's values; what is finished is not done again, by whatever name it ran.

    Args:
        grid: Dotted keys of params.yaml -> the values of each.
        overrides: Dotted keys -> one value, for all cells.
        commit: A branch, tag or hash.
        runner: threads of this machine, the deployment compress on a pool of workers, or a dask or ray cluster.
        jobs: Cells at once, on threads.
        address: Of the cluster's scheduler; null starts one on this machine.
        limits: Stage -> minutes after which it is ended.
        best: How many of the best become versions in MLflow's registry, the very best last, as the challenger.
    """
    tell = get_run_logger().info
    check_apart(grid, overrides or {})
    cells = [{**(overrides or {}), **cell} for cell in plan_cells(grid)]
    if jobs < 1 or best < 0:
        raise InputError(f"jobs is {jobs} and best {best}; give at least 1 and 0")
    home = Home.find()
    commit = home.resolve(commit, tell)
    home.render(commit, cells)
    work = Sweep(home, commit, cells, grid)
    with locked(home.root / "locks" / f"sweep-{work.id}.lock", tell):
        left = [name for name in work.cells if not work.is_finished(name)]
        tell(f"sweep {work.id[:12]}: {len(cells)} cells, {len(cells) - len(left)} of them finished before")
        with open_runner(runner, jobs, address) as (task_runner, slots):
            crew = Crew(task_runner, slots, commit, limits or {}, on_pool=runner == "pool")
            failed = _run_cells(work, left, crew)
            said = [f"{len(work.cells) - len(failed)} of {len(work.cells)} cells finished"]
            chosen = _compare(work, grid)[:best] if len(failed) < len(work.cells) else []
            versions = [_register(work, name, crew) for name in reversed(chosen)]
    said += [text for text, _ in versions]
    failing = failed or not all(fine for _, fine in versions)
    said += [f"{work.label(name)} failed: {why}" for name, why in failed.items()]
    return (Failed if failing else Completed)(message="; ".join(said))


@dataclass(frozen=True)
class Crew:
    """Who compresses cells."""

    runner: TaskRunner[Any]
    slots: Slots | None
    """Of this machine, for those who work on it; None on a cluster."""
    commit: str
    limits: dict[str, float]
    on_pool: bool = False

    def submit(self, work: Sweep, name: str, *, to_register: bool = False) -> PrefectFuture[Any]:
        """Start a cell, or let it wait for its turn."""
        given = {
            "overrides": work.cells[name],
            "commit": self.commit,
            "limits": self.limits,
            "to_register": to_register,
        }
        job: Task[..., Any] = compress_here
        more: dict[str, Any] = {"slots": self.slots, "label": work.label(name)}
        if self.on_pool:
            job, more = compress_on_pool, {"tag": f"cell:{name}{':register' * to_register}"}
        future: PrefectFuture[Any] = self.runner.submit(
            job.with_options(task_run_name=work.label(name)), {**given, **more}
        )
        return future


def _run_cells(work: Sweep, names: list[str], crew: Crew) -> dict[str, str]:
    """Compress the cells, note each as soon as it is finished, and say why others failed; one takes down no other."""
    logger = get_run_logger()
    futures = {crew.submit(work, name): name for name in names}
    failed: dict[str, str] = {}
    for done, future in enumerate(as_completed(list(futures)), start=1):
        future.wait()  # else the state is what the server last said
        name, state = futures[future], future.state
        try:
            if not state.is_completed():
                raise StageFailedError(state.message or state.name or "it did not end")
            work.finish(name, state.message or "")
            logger.info("%s of %s cells: %s, %s", done, len(names), work.label(name), state.message)
        except InputError as error:
            failed[name] = error.message
            logger.warning("%s of %s cells: %s failed, %s", done, len(names), work.label(name), error.message)
    return failed


def _compare(work: Sweep, grid: Mapping[str, Any]) -> list[str]:
    """Make table and plot of what is finished, show them here and in MLflow, and name the best cells in order."""
    from stages import tracking

    cells, out = work.folder / "cells", work.folder / "result"
    command = ["python", "-m", "stages.frontier", "--cells", str(cells), "--out", str(out)]
    ending = run(command, get_run_logger().info)
    if ending.code:
        raise StageFailedError(f"the cells cannot be compared: {ending.lines[-1].removeprefix('Error: ')}")
    found = json.loads((out / "frontier.json").read_text())
    rows = [dict(zip(found["header"], row, strict=True)) for row in found["rows"]]
    create_table_artifact(rows, key="sweep", description=f"Sweep {work.id[:12]} at {work.commit[:12]}")
    create_markdown_artifact((out / "table.md").read_text(), key="sweep-table", description="With the protocol")
    show.picture("sweep-pareto", out / "pareto.png", "Quality against cost")
    params = {key: str(values) for key, values in grid.items()} | {"commit": work.commit}
    try:
        show.link(tracking.record_folder(f"sweep-{work.id[:8]}", work.id, params, out))
    except UnavailableError as error:
        get_run_logger().warning(error.message)
    get_run_logger().info("table and plot are in %s", out)
    return [str(name) for name in found["best"]]


def _register(work: Sweep, name: str, crew: Crew) -> tuple[str, bool]:
    """Register a finished cell, whose outputs DVC has: what to say of it, and whether it went well."""
    future = crew.submit(work, name, to_register=True)
    future.wait()
    told = (future.state.message or "").rpartition("; ")[2]
    if not future.state.is_completed():
        return f"{work.label(name)} was not registered: {told}", False
    return f"{work.label(name)} is {told}", True
