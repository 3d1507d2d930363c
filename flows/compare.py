"""A preset -> the paper's table: every method with every seed, the same way, and how far they can be told apart."""

import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.tasks.runners import RunnerName
from flows.tasks.series import Series, describe, open_executor
from flows.workspaces.method_rows import plan_comparison
from flows.workspaces.overrides import Overrides
from flows.workspaces.repository import Base, Repository
from stages.tools.published import METHODS

PICTURES = {
    "pareto.png": "Quality against cost, with intervals over seeds",
    "ablation.png": "SSIM by the number of timesteps used",
}


def _name_run() -> str:
    given = flow_run.parameters
    return f"{given.get('preset')}, {len(given.get('seeds') or ())} seeds"


@flow(flow_run_name=_name_run, persist_result=False, **HOOKS)
@fail_on_input_error
def compare(
    preset: str,
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006  # Prefect shows it; nobody changes it
    rows: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    runner: RunnerName = "threads",
    jobs: int = 1,
    address: str | None = None,
    *,
    limits: dict[str, float] | None = None,
    ablation: bool = True,
) -> State[None]:
    """Compress a preset by every method of the paper and by ours, with every seed; what is finished is not done again.

    Args:
        preset: Of the commit's recipes/presets.
        seeds: Each row is made with each of them.
        rows: Some of scratch, random, magnitude, taylor, diff-pruning-0, -0.02 and -0.05, ours; null takes all.
        overrides: Dotted keys of params.yaml -> one value, for all cells.
        commit: A branch, tag or hash.
        runner: threads of this machine, the deployment compress on a pool of workers, or a dask or ray cluster.
        jobs: Cells at once, on threads.
        address: Of the cluster's scheduler; null starts one on this machine.
        limits: Stage -> minutes after which it is ended.
        ablation: Whether the number of timesteps used is varied, too.
    """
    repository, names = Repository.find(), list(METHODS) if rows is None else rows
    base = Base(repository.resolve(commit, get_run_logger().info), preset)
    cells = plan_comparison(repository, base, names, seeds, overrides or {}, ablation=ablation)
    series = Series(repository, "comparison", base, cells)
    with open_executor(series, runner, jobs, address, limits) as executor:
        failed = executor.compress_all()
        if len(failed) < len(cells):
            command = shlex.join(_command(base, seeds, names, overrides or {}, ablation=ablation))
            params = {"preset": preset, "seeds": str(seeds), "rows": str(names), "commit": base.commit}
            series.publish("method_table", ["--preset", preset, "--command", command], params, PICTURES)
    return (Failed if failed else Completed)(message="; ".join(describe(series, failed)))


def _command(
    base: Base, seeds: Iterable[int], names: list[str], overrides: Overrides, *, ablation: bool
) -> Iterator[str]:
    """Write how the same is had again."""
    yield from ("python", "-m", "flows", "compare", "--preset", str(base.preset), "--commit", base.commit[:12])
    yield from ("--seeds", ",".join(map(str, seeds)))
    if names != list(METHODS):
        yield from ("--rows", ",".join(names))
    for key, value in overrides.items():
        yield from ("--set", f"{key}={json.dumps(value)}")
    if not ablation:
        yield "--no-ablation"
