"""A grid over params.yaml -> one compression a cell, one table, one plot, and the best as challengers."""

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.cells import RunnerName
from flows.home import Base, Home
from flows.notify import HOOKS
from flows.overrides import Cell, check_apart, plan_cells, write
from flows.series import Crew, Series, describe, open_crew
from flows.words import in_words
from stages.errors import InputError

PICTURES = {"pareto.png": "Quality against cost"}


def _name_run() -> str:
    grid = flow_run.parameters.get("grid") or {}
    return " × ".join(f"{len(values)} {key.rpartition('.')[2]}" for key, values in grid.items())


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
    cells = [Cell(write(cell), {**(overrides or {}), **cell}) for cell in plan_cells(grid)]
    home = Home.find()
    base = Base(home.resolve(commit, get_run_logger().info), preset)
    home.render(base.commit, [cell.overrides for cell in cells], preset)
    series = Series(home, "sweep", base, cells)
    versions: list[tuple[str, bool]] = []
    with open_crew(series, runner, jobs, address, limits) as crew:
        failed = crew.compress_all()
        if len(failed) < len(cells):
            params = {key: str(values) for key, values in grid.items()} | {"commit": base.commit}
            found = series.publish("frontier", [], params, PICTURES)
            versions = [_register(crew, name) for name in reversed(found["best"][:best])]
    done, *failures = describe(series, failed)
    failing = failed or not all(fine for _, fine in versions)
    message = "; ".join([done, *(text for text, _ in versions), *failures])
    return (Failed if failing else Completed)(message=message)


def _register(crew: Crew, name: str) -> tuple[str, bool]:
    """Register a finished cell, whose outputs DVC has: what to say of it, and whether it went well."""
    future, label = crew.submit(name, to_register=True), crew.series.cells[name].label
    future.wait()
    told = (future.state.message or "").rpartition("; ")[2]
    if not future.state.is_completed():
        return f"{label} was not registered: {told}", False
    return f"{label} is {told}", True
