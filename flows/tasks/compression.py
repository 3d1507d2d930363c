"""A workspace -> its compression brought up to date, shown, and registered if asked."""

from collections.abc import Mapping

from prefect import State, task
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.tasks import artifacts
from flows.tasks.stages import RETRIED, StageFailedError, bring_up_to_date, fail
from flows.workspaces.commands import run
from flows.workspaces.workspace import Workspace


def compress_at(place: Workspace, limits: Mapping[str, float], label: str = "", *, to_register: bool) -> State[None]:
    """Compress in a workspace, show what came of it, and remove what is no longer needed.

    Args:
        place: Where.
        limits: Minutes that a stage may take.
        label: Put before the names of the tasks.
        to_register: Whether the result becomes a version.

    Raises:
        InputError: A stage failed, or the result cannot be registered.
    """
    outcome = bring_up_to_date(place, limits, label)
    artifacts.results(place, outcome)
    message = f"{outcome}; {register(place)}" if to_register else str(outcome)
    place.remove()
    return Completed(message=message)


def register(place: Workspace) -> str:
    """Make a workspace's compression a version in MLflow's registry: its address.

    Raises:
        InputError: It cannot be registered.
    """
    state = _register(place, return_state=True)
    if not state.is_completed():
        raise StageFailedError(f"it could not be registered: {state.message}")
    return str(state.message)


@task(task_run_name="register", **RETRIED)
def _register(place: Workspace) -> State[None]:
    """The message of the state is the version's address."""
    result = run(
        ["python", "-m", "stages.register", "--unsent", str(place.unsent)],
        get_run_logger().info,
        folder=place.path,
        environment=place.environment,
    )
    return fail(result) if result.code else Completed(message=result.lines[-1].partition(" ")[0])
