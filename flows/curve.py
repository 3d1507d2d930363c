"""A preset -> what recovery costs: quality over steps and seconds by several recipes, with intervals over the seeds."""

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from pydantic import PositiveInt

from flows.tasks.errors import fail_on_input_error
from flows.tasks.names import name_comparison
from flows.tasks.notifications import HOOKS
from flows.tasks.runners import RunnerName
from flows.tasks.series import REPORTS, VARIANTS, Series, compress_and_publish, open_executor
from flows.workspaces.grid import PlannedCell
from flows.workspaces.overrides import Overrides
from flows.workspaces.recipe_rows import Recipes, plan_curve
from flows.workspaces.repository import ParamsSource, Repository

SNAPSHOTS, TIMES = "evaluate/snapshots.json", "finetune.provenance.json"
"""Reports of a cell beside those of every series: the curves need the first; DVC loses the second."""
PICTURES = {"curve.png": "Quality over steps and seconds, with intervals over seeds"}


@flow(flow_run_name=name_comparison, persist_result=False, **HOOKS)
@fail_on_input_error
def curve(
    preset: str,
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006  # Prefect shows the default; it is never changed
    rows: list[str] | None = None,
    steps: list[int] | None = None,
    recipes: dict[str, dict[str, Any]] | None = None,
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    runner: RunnerName = "threads",
    *,
    jobs: PositiveInt = 1,
    limits: dict[str, float] | None = None,
) -> State[None]:
    """Recover a preset's pruned model by every recipe with every seed; finished cells are not repeated.

    Args:
        preset: Name of a preset of the commit (recipes/presets).
        seeds: Each recipe has one training per seed.
        rows: Recipes in the order of the tables, the first being compared with; null selects all.
        steps: Steps at which each training is measured; the last ends it. null: shares of the preset's steps.
        recipes: Further recipes: name -> keys of the block finetune, and prune.compensate.
        overrides: Dotted keys of params.yaml -> one value, for all cells.
        commit: A branch, tag or hash.
        runner: threads of this machine, or the deployment compress on a pool of workers.
        jobs: Cells at once, on threads; with more than one no seconds are measured.
        limits: Stage -> minutes after which it is terminated.
    """
    repository = Repository.find()
    source = ParamsSource(repository.resolve(commit, get_run_logger().info), preset)
    cells = plan_curve(repository, source, rows, seeds, steps, recipes or {}, overrides or {})
    series = Series(repository, "curve", source, cells, [*REPORTS, SNAPSHOTS], [*VARIANTS, TIMES])
    names = list(dict.fromkeys(str(cell.about["row"]) for cell in cells))
    command = shlex.join(_command(source, cells, seeds, names, recipes or {}, overrides or {}))
    options = ["--preset", preset, "--rows", ",".join(names), "--command", command]
    params = {"preset": preset, "seeds": str(seeds), "rows": str(names), "commit": source.commit}
    return compress_and_publish(open_executor(series, runner, jobs, limits), "curve_table", options, params, PICTURES)


def _command(
    source: ParamsSource,
    cells: Sequence[PlannedCell],
    seeds: Sequence[int],
    names: Sequence[str],
    recipes: Recipes,
    overrides: Overrides,
) -> Iterator[str]:
    """Write the command line that makes the same comparison."""
    planned = cells[0].overrides
    steps = [*planned["finetune.snapshots"], planned["finetune.steps"]]
    yield from ("espalier", "compare", "--curve", "--preset", str(source.preset))
    yield from ("--commit", source.commit[:12], "--seeds", ",".join(map(str, seeds)))
    yield from ("--steps", ",".join(map(str, steps)), "--rows", ",".join(names))
    for name, keys in recipes.items():
        yield from ("--recipe", f"{name}={json.dumps(keys)}")
    for key, value in overrides.items():
        yield from ("--set", f"{key}={json.dumps(value)}")
