"""A grid over params.yaml -> one compression a cell, one table, one plot, and the best as challengers."""

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.tasks.runners import RunnerName
from flows.tasks.series import CellExecutor, Series, describe, open_executor
from flows.workspaces.overrides import PlannedCell, check_apart, plan_cells, write
from flows.workspaces.repository import Base, Repository
from stages.runtime.errors import InputError

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
    jobs: int = 1,
    address: str | None = None,
    limits: dict[str, float] | None = None,
    best: int = 1,
    *,
    preset: str | None = None,
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
        preset: Which of the commit's recipes/presets stands in place of its params.yaml.
    """
    check_apart(grid, overrides or {})
    if best < 0:
        raise InputError(f"best is {best}; give at least 0")
    cells = [PlannedCell(write(cell), {**(overrides or {}), **cell}) for cell in plan_cells(grid)]
    repository = Repository.find()
    base = Base(repository.resolve(commit, get_run_logger().info), preset)
    repository.render(base.commit, [cell.overrides for cell in cells], preset)
    series = Series(repository, "sweep", base, cells)
    versions: list[tuple[str, bool]] = []
    with open_executor(series, runner, jobs, address, limits) as executor:
        failed = executor.compress_all()
        if len(failed) < len(cells):
            params = {key: str(values) for key, values in grid.items()} | {"commit": base.commit}
            found = series.publish("sweep_table", [], params, PICTURES)
            versions = [_register(executor, name) for name in reversed(found["best"][:best])]
    done, *failures = describe(series, failed)
    failing = failed or not all(fine for _, fine in versions)
    message = "; ".join([done, *(text for text, _ in versions), *failures])
    return (Failed if failing else Completed)(message=message)


def _register(executor: CellExecutor, name: str) -> tuple[str, bool]:
    """Register a finished cell, whose outputs DVC has: what to say of it, and whether it went well."""
    future, label = executor.submit(name, to_register=True), executor.series.cells[name].label
    future.wait()
    told = (future.state.message or "").rpartition("; ")[2]
    if not future.state.is_completed():
        return f"{label} was not registered: {told}", False
    return f"{label} is {told}", True
