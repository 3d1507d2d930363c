"""A workspace -> its compression brought up to date, shown, and registered if requested."""

from collections.abc import Mapping
from typing import Any

from prefect import State, task

from flows.tasks import artifacts
from flows.tasks.errors import fail_on_input_error
from flows.tasks.outcome import Outcome
from flows.tasks.stages import RETRIED, StageFailedError, bring_up_to_date, run_for
from flows.workspaces.workspace import Workspace


def compress_at(workspace: Workspace, limits: Mapping[str, float], label: str = "", *, to_register: bool) -> Outcome:
    """Compress in a workspace, show the results, and remove what is no longer needed.

    Args:
        workspace: Where the stages run.
        limits: Stage -> minutes it may take.
        label: Prefix of the task names.
        to_register: Whether the result becomes a version.

    Raises:
        InputError: A stage failed, or the result cannot be registered.
    """
    outcome = bring_up_to_date(workspace, limits, label)
    artifacts.results(workspace, outcome)
    if to_register:
        outcome = outcome.model_copy(update={"version": register(workspace)})
    workspace.remove()
    return outcome


def register(workspace: Workspace) -> str:
    """Make a workspace's compression a version in MLflow's registry; returns its address, models:/NAME/3.

    Raises:
        InputError: It cannot be registered.
    """
    state = _register(workspace, return_state=True)
    if not state.is_completed():
        raise StageFailedError(f"the compression could not be registered: {state.message}")
    return str(state.result())


@task(task_run_name="register", **RETRIED)
@fail_on_input_error
def _register(workspace: Workspace) -> State[Any]:
    return run_for("uri", "stages.register", workspace)
