"""The stages of a workspace -> Prefect tasks: one after the other, each by DVC, with retries, limits and progress."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import TaskRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.tasks.progress import Progress
from flows.workspaces.commands import CommandResult, run
from flows.workspaces.workspace import Workspace
from stages.runtime.errors import InputError

RETRY_DELAYS_S: list[float] = [5, 30, 60]
UNAVAILABLE = "Unavailable"
"""The name of a failed state that another try may mend."""
NOISE = ("Generating lock file", "Updating lock file", "Use `dvc push`")
"""What DVC says at every stage and nobody needs."""
MESSAGE = re.compile(r"(?:ran (?P<ran>[^;]+)|nothing had changed); MLflow run (?P<run>\w+)")
"""Of a finished compression."""
CACHED = "Cached"
"""The name of a stage's state where DVC had the outputs."""


class StageFailedError(InputError):
    """A stage did not do its work; what it said stands in the log."""


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State) -> bool:
    return state.name == UNAVAILABLE


class Retried(TypedDict):
    """Options of a task."""

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
    retry_condition_fn=_is_transient,
)
"""Try again where a server was away, or something from outside killed it."""


@dataclass(frozen=True)
class Outcome:
    """What came of bringing a workspace up to date."""

    ran: tuple[str, ...]
    """The stages that computed; DVC had the outputs of the others."""
    mlflow_run: str | None
    """None while MLflow is away; the record waits."""

    def __str__(self) -> str:
        """Write what a run did, for the list of runs."""
        did = f"ran {', '.join(self.ran)}" if self.ran else "nothing had changed"
        return f"{did}; {f'MLflow run {self.mlflow_run}' if self.mlflow_run else 'MLflow is away, the record waits'}"

    @classmethod
    def read(cls, message: str) -> "Outcome":
        """Read what a run wrote of itself, on whatever machine."""
        found = MESSAGE.search(message)
        if not found:
            return cls((), None)
        return cls(tuple(found["ran"].split(", ")) if found["ran"] else (), found["run"])


def bring_up_to_date(place: Workspace, limits: Mapping[str, float], label: str = "") -> Outcome:
    """Run what changed, in the order of dvc.yaml, then make sure that MLflow has the result.

    Args:
        place: Where.
        limits: Minutes that a stage may take; endless where it is not named.
        label: Put before the names of the tasks, to tell the cells of a sweep apart.

    Raises:
        InputError: A stage failed, or a limit is of none.
    """
    place.check_limits(limits)
    ran: list[str] = []
    if place.commit is not None or not _is_current(place):
        ran = list(_run_stages(place, limits, label))
    if place.has_remote:
        pushed = push.with_options(task_run_name=f"{label}push")(place, [], return_state=True)
        if not pushed.is_completed():
            raise StageFailedError(f"DVC's remote did not take the outputs: {pushed.message}")
    recorded = record.with_options(task_run_name=f"{label}record")(place, return_state=True)
    if recorded.is_failed() and recorded.name != UNAVAILABLE:
        raise StageFailedError(f"it could not be recorded: {recorded.message}")
    return Outcome(tuple(ran), recorded.message if recorded.is_completed() else None)


def _run_stages(place: Workspace, limits: Mapping[str, float], label: str) -> Iterator[str]:
    """Run every stage that is out of date, and name it."""
    for name, key in place.keys().items():
        state = run_stage.with_options(task_run_name=f"{label}{name}")(
            name, place, key, limits.get(name), return_state=True
        )
        if not state.is_completed():
            raise StageFailedError(f"stage {name} failed: {state.message}")
        if state.name == CACHED:
            continue
        yield name
        if place.has_remote:  # at once, for those on other machines who need it, too
            push.with_options(task_run_name=f"{label}push {name}")(place, [name], return_state=True)


def _is_current(place: Workspace) -> bool:
    """Ask DVC once about everything, which is quicker than stage by stage."""
    return run(["dvc", "status", "--quiet"], _discard, folder=place.path).code == 0


@task(**RETRIED)
def run_stage(name: str, place: Workspace, key: str, limit_minutes: float | None) -> State[None]:
    """Let DVC run a stage if anything that it depends on has changed, while no other run is at the same."""
    log = get_run_logger().info
    pull = ["--pull"] if place.has_remote else []
    progress = Progress(name)

    def on_line(line: str) -> None:
        if not line.startswith(NOISE):
            log(line)
        progress.on_line(line)

    with place.alone(key, log):
        result = run(
            ["dvc", "--wait-for-lock", "repro", "--single-item", *pull, name],
            on_line,
            folder=place.path,
            environment=place.environment,
            limit_s=limit_minutes and limit_minutes * 60,
        )
    if result.code or result.is_late:
        return fail(result, limit_minutes)
    ran = any(line.startswith(f"Running stage '{name}'") for line in result.lines)
    return Completed() if ran else Completed(name=CACHED, message="DVC has its outputs")


@task(**RETRIED)
def push(place: Workspace, stages: list[str]) -> State[None]:
    """Send what DVC's remote lacks of some stages, or of all; what it has is not sent again."""
    command = ["dvc", "push", "--run-cache", *stages]
    result = run(command, get_run_logger().info, folder=place.path, environment=place.environment)
    return fail(result) if result.code else Completed()


@task(**RETRIED)
def record(place: Workspace) -> State[None]:
    """Record the compression in MLflow unless it is there; the message of the state is the run's id."""
    result = run(
        ["python", "-m", "stages.tracking", "--unsent", str(place.unsent)],
        get_run_logger().info,
        folder=place.path,
        environment=place.environment,
    )
    for line in result.lines:
        if result.code == 0 and (found := re.match(r"MLflow run (\w+):", line)):
            return Completed(message=found[1])
    return fail(result)


def fail(result: CommandResult, limit_minutes: float | None = None) -> State[None]:
    """Say of a command that failed why, in its own words, and whether another try makes sense."""
    if result.is_late:
        return Failed(name="TimedOut", message=f"it ran past its limit of {limit_minutes:g} minutes and was ended")
    errors = [line for line in result.lines if line.startswith(("Error: ", "ERROR: "))]
    said = (errors or [*result.lines[-1:], "it said nothing"])[0].partition(": ")[2] or "it said nothing"
    return Failed(name=UNAVAILABLE if result.is_transient else "Failed", message=f"{said} (exit code {result.code})")


def _discard(_line: str) -> None:
    """Keep a question to DVC out of the log."""
