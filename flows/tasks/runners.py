"""The cells of a series -> tasks that compress them on threads or on a work pool."""

import contextlib
import os
import queue
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.tasks.compression import compress_at
from flows.tasks.errors import fail_on_input_error
from flows.tasks.outcome import Outcome, read_outcome
from flows.workspaces.commands import allow_commands, pause, stop_commands
from flows.workspaces.overrides import Overrides
from flows.workspaces.workspace import open_workspace
from stages.runtime.cores import count_cores
from stages.runtime.environment import SHARED_VARIABLE
from stages.runtime.errors import InputError

RunnerName = Literal["threads", "pool"]
DEPLOYMENT = "compress/compress"
"""The deployment that compresses one cell on a work pool."""
POLL_S = 2.0
Slots = queue.Queue[dict[str, str]]
"""Free shares of this machine: the environment variables of each."""


@contextmanager
def open_runner(name: RunnerName, jobs: int) -> Iterator[tuple[TaskRunner[Any], Slots | None]]:
    """Start the runner of cells; yields it with the slots of this machine, None where cells run elsewhere.

    Args:
        name: threads of this process, or workers of a work pool.
        jobs: Cells at once, on threads; a pool has limits of its own.

    Raises:
        InputError: The server lacks the deployment, or several jobs are asked of a pool.
    """
    if name == "pool":
        if jobs > 1:
            raise InputError(
                f"jobs {jobs} is for cells on this machine; on a pool set its concurrency limit, or leave jobs out"
            )
        _require_deployment()
    slots = _slots(jobs) if name == "threads" else None
    runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=jobs if slots else 1000)  # a pool's threads only wait
    try:
        with runner:
            try:
                yield runner, slots
            except Exception:
                raise
            except BaseException:  # a signal, of which the threads do not hear
                stop_commands()
                raise
    finally:
        allow_commands()


def _slots(jobs: int) -> Slots:
    """Divide the cores and GPUs of this machine: two processes that each use all cores slow each other down."""
    cores, gpus = count_cores(), _gpus()
    slots: Slots = queue.Queue()
    for index in range(jobs):
        slot = {} if jobs == 1 else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))}
        if jobs > 1:
            slot[SHARED_VARIABLE] = "1"
        if gpus and jobs > 1:
            slot["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        slots.put(slot)
    return slots


def _gpus() -> list[str]:
    """List the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    result = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)  # noqa: S607
    gpus = [line for line in result.stdout.splitlines() if line.startswith("GPU ")]  # below it those of MIG, indented
    return [str(index) for index in range(len(gpus))]


@task(cache_policy=NO_CACHE, persist_result=False)
@fail_on_input_error
def compress_here(
    overrides: Overrides,
    commit: str,
    limits: dict[str, float],
    preset: str | None,
    label: str,
    slots: Slots | None,
    *,
    to_register: bool,
) -> State[Outcome]:
    """Compress one cell in a workspace of its own, in this process; the state's data is the outcome."""
    slot = slots.get() if slots else {}
    try:
        with open_workspace(commit, overrides, get_run_logger().info, slot, preset) as workspace:
            outcome = compress_at(workspace, limits, f"{label}: ", to_register=to_register)
        return Completed(message=str(outcome), data=outcome)
    finally:
        if slots:
            slots.put(slot)


@task(cache_policy=NO_CACHE, persist_result=False)
@fail_on_input_error
def compress_on_pool(
    overrides: Overrides, commit: str, limits: dict[str, float], preset: str | None, tag: str, *, to_register: bool
) -> State[Outcome]:
    """Let a worker compress one cell, or wait for a run of it that an earlier attempt started.

    The state's data is the outcome.
    """
    run = _find_run(tag)
    if run is None:
        parameters = {
            "overrides": overrides,
            "commit": commit,
            "preset": preset,
            "to_register": to_register,
            **({"limits": limits} if limits else {}),  # otherwise those of the deployment
        }
        run = cast("FlowRun", run_deployment(DEPLOYMENT, parameters=parameters, tags=[tag], timeout=0))
    get_run_logger().info("waiting for the run %s", run.name)
    with get_client(sync_client=True) as client:
        while not ((run := client.read_flow_run(run.id)).state and run.state.is_final()):
            pause(POLL_S)
    if run.state.is_completed():
        return Completed(message=run.state.message, data=read_outcome(run))
    return Failed(message=run.state.message or f"run {run.name} ended as {run.state.name}")


def _find_run(tag: str) -> FlowRun | None:
    """Find a run with this tag that has not ended."""
    open_states = [kind for kind in StateType if kind.name in ("SCHEDULED", "PENDING", "RUNNING", "PAUSED")]
    unfinished = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[tag]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=open_states)),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=unfinished, limit=1)
    return found[0] if found else None


def _require_deployment() -> None:
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        client.read_deployment_by_name(DEPLOYMENT)
        return
    raise InputError(f"the server has no deployment {DEPLOYMENT}; deploy it first: espalier deploy")
