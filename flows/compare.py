"""A preset -> the paper's table: every method with every seed, with intervals over the seeds."""

import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from pydantic import PositiveInt

from flows.tasks.errors import fail_on_input_error
from flows.tasks.names import name_comparison
from flows.tasks.notifications import HOOKS
from flows.tasks.runners import RunnerName
from flows.tasks.series import Series, compress_and_publish, open_executor
from flows.workspaces.method_rows import plan_comparison
from flows.workspaces.overrides import Overrides
from flows.workspaces.repository import ParamsSource, Repository
from stages.tools.comparison.published import METHODS

PICTURES = {
    "pareto.png": "Quality against cost, with intervals over seeds",
    "ablation.png": "SSIM by the number of timesteps used",
}


@flow(flow_run_name=name_comparison, persist_result=False, **HOOKS)
@fail_on_input_error
def compare(
    preset: str,
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006  # Prefect shows the default; it is never changed
    rows: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    runner: RunnerName = "threads",
    jobs: PositiveInt = 1,
    *,
    limits: dict[str, float] | None = None,
    ablation: bool = True,
) -> State[None]:
    """Compress a preset by every method of the paper and by ours, with every seed; finished cells are not repeated.

    Args:
        preset: Name of a preset of the commit (recipes/presets).
        seeds: Each row has one cell per seed.
        rows: Any of scratch, random, magnitude, taylor, diff-pruning-0, -0.02 and -0.05, no-cancel-taylor,
            ours; null selects all.
        overrides: Dotted keys of params.yaml -> one value, for all cells.
        commit: A branch, tag or hash.
        runner: threads of this machine, or the deployment compress on a pool of workers.
        jobs: Cells at once, on threads.
        limits: Stage -> minutes after which it is terminated.
        ablation: Whether cells that vary the number of timesteps are added.
    """
    repository, names = Repository.find(), list(METHODS) if rows is None else rows
    source = ParamsSource(repository.resolve(commit, get_run_logger().info), preset)
    cells = plan_comparison(repository, source, names, seeds, overrides or {}, ablation=ablation)
    series = Series(repository, "comparison", source, cells)
    command = shlex.join(_command(source, seeds, names, overrides or {}, ablation=ablation))
    params = {"preset": preset, "seeds": str(seeds), "rows": str(names), "commit": source.commit}
    options = ["--preset", preset, "--command", command]
    return compress_and_publish(open_executor(series, runner, jobs, limits), "method_table", options, params, PICTURES)


def _command(
    source: ParamsSource, seeds: Iterable[int], names: list[str], overrides: Overrides, *, ablation: bool
) -> Iterator[str]:
    """Write the command line that makes the same comparison."""
    yield from ("espalier", "compare", "--preset", str(source.preset), "--commit", source.commit[:12])
    yield from ("--seeds", ",".join(map(str, seeds)))
    if names != list(METHODS):
        yield from ("--rows", ",".join(names))
    for key, value in overrides.items():
        yield from ("--set", f"{key}={json.dumps(value)}")
    if not ablation:
        yield "--no-ablation"
