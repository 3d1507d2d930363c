"""The stages of a workspace -> Prefect tasks: one after the other, each by DVC, with retries, limits and progress."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import TaskRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.tasks.errors import fail_on_input_error
from flows.tasks.names import literal_name
from flows.tasks.outcome import Outcome
from flows.tasks.progress import ProgressBar
from flows.workspaces.commands import CommandResult, Log, run
from flows.workspaces.machine import at_work
from flows.workspaces.workspace import Workspace
from stages.runtime.errors import InputError

RETRY_DELAYS_S: list[float] = [5, 30, 60]
UNAVAILABLE = "Unavailable"
"""Name of a failed state that Prefect retries."""
CACHED = "Cached"
"""Name of a completed state of a stage that DVC did not run, since it had the outputs."""
NOISE = ("Generating lock file", "Updating lock file", "Use `dvc push`")
"""Lines that DVC prints at every stage, left out of the log."""


class StageFailedError(InputError):
    """A stage or a command after it failed; its output stands in the log."""


def _is_unavailable(_task: Task[..., Any], _run: TaskRun, state: State) -> bool:
    return state.name == UNAVAILABLE


class Retried(TypedDict):
    """Options of a task that Prefect retries."""

    cache_policy: CachePolicy
    persist_result: bool
    retries: int
    retry_delay_seconds: list[float]
    retry_condition_fn: Callable[[Task[..., Any], TaskRun, State], bool]


RETRIED = Retried(
    cache_policy=NO_CACHE,  # DVC owns the cache
    persist_result=False,
    retries=len(RETRY_DELAYS_S),
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=_is_unavailable,
)
"""Retries where a server was unavailable, or something outside killed the command."""


def bring_up_to_date(workspace: Workspace, limits: Mapping[str, float], label: str = "") -> Outcome:
    """Run what changed, in the order of dvc.yaml, then make sure that MLflow has the result.

    Args:
        workspace: Where the stages run.
        limits: Stage -> minutes it may take; a stage without an entry has no limit.
        label: Prefix of the task names, which distinguishes the cells of a sweep.

    Raises:
        InputError: A stage failed, or a limit is not allowed.
    """
    workspace.check_limits(limits)
    ran: list[str] = []
    if workspace.commit is not None or not _is_current(workspace):
        ran = list(_run_stages(workspace, limits, label))
    if workspace.has_remote:
        pushed = push.with_options(task_run_name=literal_name(f"{label}push"))(workspace, [], return_state=True)
        if not pushed.is_completed():
            raise StageFailedError(f"DVC's remote did not take the outputs: {pushed.message}")
    recorded = record.with_options(task_run_name=literal_name(f"{label}record"))(workspace, return_state=True)
    if recorded.is_failed() and recorded.name != UNAVAILABLE:
        raise StageFailedError(f"the compression could not be recorded: {recorded.message}")
    return Outcome(ran=tuple(ran), mlflow_run=recorded.result() if recorded.is_completed() else None)


def _run_stages(workspace: Workspace, limits: Mapping[str, float], label: str) -> Iterator[str]:
    """Bring every stage up to date; yields the names of those that computed."""
    for name, key in workspace.keys().items():
        state = run_stage.with_options(task_run_name=literal_name(f"{label}{name}"))(
            name, workspace, key, limits.get(name), return_state=True
        )
        if not state.is_completed():
            raise StageFailedError(f"stage {name} failed: {state.message}")
        if state.name == CACHED:
            continue
        yield name
        if workspace.has_remote:  # at once, for runs on other machines that need the outputs
            push.with_options(task_run_name=literal_name(f"{label}push {name}"))(workspace, [name], return_state=True)


def _is_current(workspace: Workspace) -> bool:
    """Check all stages by one call of DVC, which is quicker than stage by stage."""
    return _run(workspace, ["dvc", "status", "--quiet"], _discard).code == 0


def _run(workspace: Workspace, command: list[str], log: Log, *, alone: bool = False, **options: Any) -> CommandResult:  # noqa: ANN401  # those of `run`
    """Run a command of a workspace beside those of other runs, or alone; time spent waiting counts towards no limit."""
    with at_work(workspace.machine, log, alone=alone):
        return run(command, log, folder=workspace.path, environment=workspace.environment, **options)


@task(**RETRIED)
@fail_on_input_error
def run_stage(name: str, workspace: Workspace, key: str, limit_minutes: float | None) -> State[None]:
    """Let DVC run a stage if anything that it depends on has changed; equal work of other runs is waited for."""
    log = get_run_logger().info
    pull = ["--pull"] if workspace.has_remote else []
    with workspace.exclusive(key, log):
        result = _run(
            workspace,
            ["dvc", "--wait-for-lock", "repro", "--single-item", *pull, name],
            lambda line: None if line.startswith(NOISE) else log(line),
            alone=workspace.takes_times(name),
            limit_s=limit_minutes and limit_minutes * 60,
            on_progress=ProgressBar(name).update,
        )
    if result.timed_out:
        message = f"the stage ran past its limit of {limit_minutes:g} minutes and was terminated"
        return Failed(name="TimedOut", message=message)
    if result.code:
        pull_failed = workspace.has_remote and result.stage_code is None  # DVC itself failed, before any stage ran
        return fail(result, is_transient=pull_failed or result.is_transient)
    return Completed() if result.stage_code is not None else Completed(name=CACHED, message="DVC has its outputs")


@task(**RETRIED)
@fail_on_input_error
def push(workspace: Workspace, stages: list[str]) -> State[None]:
    """Upload the outputs of some stages, or of all, that DVC's remote lacks."""
    command = ["dvc", "push", "--run-cache", *stages]
    result = _run(workspace, command, get_run_logger().info)
    return fail(result, is_transient=True) if result.code else Completed()


@task(**RETRIED)
@fail_on_input_error
def record(workspace: Workspace) -> State[str]:
    """Record the compression in MLflow unless it is there; the state's data is the id of its run."""
    return run_for("mlflow_run", "stages.tracking", workspace)


def run_for(key: str, module: str, workspace: Workspace) -> State[Any]:
    """Run a module of the workspace that sends something to MLflow; the state's data is `key` of what it found."""
    command = ["python", "-m", module, "--unsent", str(workspace.unsent)]
    result = _run(workspace, command, get_run_logger().info)
    if result.code:
        return fail(result, is_transient=result.is_transient)
    if key not in result.found:
        return Failed(message=f"{module} of this commit does not write {key} to its result file; take a newer commit")
    return Completed(message=str(result.found[key]), data=result.found[key])


def fail(result: CommandResult, *, is_transient: bool) -> State[Any]:
    """Return the failed state of a command, with its message and exit code; Prefect retries a transient failure."""
    name = UNAVAILABLE if is_transient else "Failed"
    return Failed(name=name, message=f"{result.message} (exit code {result.exit_code})")


def _discard(_line: str) -> None:
    """Keep the lines of a command out of the log."""
