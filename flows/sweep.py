"""A grid over params.yaml -> one compression per cell, one table, one plot, and the best as challengers."""

from collections.abc import Collection, Mapping
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import NonNegativeInt, PositiveInt

from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.tasks.runners import RunnerName
from flows.tasks.series import CellExecutor, Series, describe, open_executor
from flows.workspaces.grid import PlannedCell, plan_sweep
from flows.workspaces.repository import ParamsSource, Repository

PICTURES = {"pareto.png": "Quality against cost"}


def _name_run() -> str:
    grid = flow_run.parameters.get("grid") or {}
    return " × ".join(f"{len(values)} {key.rpartition('.')[2]}" for key, values in grid.items())


@flow(flow_run_name=_name_run, persist_result=False, **HOOKS)
@fail_on_input_error
def sweep(
    grid: dict[str, list[Any]],
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    runner: RunnerName = "threads",
    jobs: PositiveInt = 1,
    limits: dict[str, float] | None = None,
    best: NonNegativeInt = 1,
    *,
    preset: str | None = None,
) -> State[None]:
    """Compress every combination of the grid's values; cells that an earlier run finished are not repeated.

    Args:
        grid: Dotted keys of params.yaml -> the values of each.
        overrides: Dotted keys -> one value, for all cells.
        commit: A branch, tag or hash.
        runner: threads of this machine, or the deployment compress on a pool of workers.
        jobs: Cells at once, on threads.
        limits: Stage -> minutes after which it is terminated.
        best: How many of the best become versions in MLflow's registry; the very best last, as the challenger.
        preset: Name of a preset of the commit (recipes/presets) that replaces its params.yaml; null keeps it.
    """
    repository = Repository.find()
    source = ParamsSource(repository.resolve(commit, get_run_logger().info), preset)
    series = Series(repository, "sweep", source, plan_sweep(repository, source, grid, overrides or {}))
    versions: list[tuple[str, bool]] = []
    with open_executor(series, runner, jobs, limits) as executor:
        failed = executor.compress_all()
        if len(failed) < len(series.cells):
            params = {key: str(values) for key, values in grid.items()} | {"commit": source.commit}
            baseline = find_baseline(series.cells, failed)
            found = series.publish("sweep_table", ["--baseline", baseline], params, PICTURES)
            versions = [_register(executor, name) for name in reversed(found["best"][:best])]
    finished, *failures = describe(series, failed)
    all_succeeded = not failed and all(registered for _, registered in versions)
    message = "; ".join([finished, *(text for text, _ in versions), *failures])
    return (Completed if all_succeeded else Failed)(message=message)


def find_baseline(cells: Mapping[str, PlannedCell], failed: Collection[str]) -> str:
    """Return the first finished cell of the grid's first values, whatever its seed; empty if all of them failed."""
    names = [name for name, cell in cells.items() if _but_seed(cell) == _but_seed(next(iter(cells.values())))]
    return next((name for name in names if name not in failed), "")


def _but_seed(cell: PlannedCell) -> dict[str, Any]:
    return {key: value for key, value in cell.overrides.items() if key != "seed"}


def _register(executor: CellExecutor, name: str) -> tuple[str, bool]:
    """Register a finished cell, whose outputs DVC has; returns a description, and whether it succeeded."""
    future, label = executor.submit(name, to_register=True), executor.series.cells[name].label
    future.wait()
    if not future.state.is_completed():
        return f"{label} was not registered: {future.state.message}", False
    return f"{label} is {future.state.result().version}", True
