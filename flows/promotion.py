"""Registering, promoting, rolling back and reproducing versions -> Prefect flows."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import State, flow, task
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS, REFUSED
from flows.tasks.stages import RETRIED, UNAVAILABLE
from flows.workspaces.machine import beside_runs
from flows.workspaces.repository import REPOSITORY_VARIABLE
from stages.runtime.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from stages.register.promotion import Decision

POLICY = "mlflow/promotion.yaml"


def _name_run() -> str:
    given = flow_run.parameters
    return str(given.get("uri") or f"challenger of {given['name']}")


@flow(flow_run_name=_name_run, persist_result=False, **HOOKS)
@fail_on_input_error
def promote(name: str, uri: str | None = None, policy: str = POLICY, why: str | None = None) -> State[Any]:
    """Decide by the policy whether a version becomes the champion; a refusal is a completed state named Refused.

    Args:
        name: Name of the model in the registry.
        uri: Version, models:/NAME/3; null takes the challenger.
        policy: Path of the promotion policy.
        why: Reason, for the ledger.
    """
    from stages.register import promotion
    from stages.register.policy import load_policy

    rules = load_policy(Path(policy))
    decision = run_as_task("promote", lambda: promotion.promote(name, uri, rules, why))
    return _show_decision(decision, decision.message())


@flow(flow_run_name="{name}", persist_result=False, **HOOKS)
@fail_on_input_error
def rollback(name: str, why: str, policy: str = POLICY, *, unseen: bool = False) -> State[Any]:
    """Make the previous champion the champion again.

    Args:
        name: Name of the model in the registry.
        why: Reason, for the ledger.
        policy: Path of the promotion policy, which bounds the deviation of the previous champion's samples.
        unseen: Skip the check of the previous champion's samples, in an emergency.
    """
    from stages.register import promotion
    from stages.register.policy import load_policy

    rules = None if unseen else load_policy(Path(policy))
    decision = run_as_task("rollback", lambda: promotion.roll_back(name, rules, why))
    return _show_decision(decision, f"{decision.uri} is the champion again, {decision.replaces} is withdrawn")


@flow(flow_run_name="{uri}", persist_result=False, **HOOKS)
@fail_on_input_error
def reproduce(
    uri: str, repository: str | None = None, workspace: str | None = None, *, trust: bool = False
) -> State[Any]:
    """Repeat the work of a version without caches and compare; different results fail.

    Args:
        uri: Version, models:/NAME/3 or models:/NAME@champion.
        repository: Folder or address to clone from; null takes ESPALIER_REPOSITORY, this folder, or the version's own
            remote if ESPALIER_REMOTES allows it.
        workspace: Empty folder for the work, which is kept; null takes a temporary one.
        trust: Run the code of a model that the version's params trust, though its commit does not name it.
    """
    from stages.register.reproduce import reproduce as run_again

    source, folder = repository or os.environ.get(REPOSITORY_VARIABLE), Path(workspace) if workspace else None
    found = run_as_task("reproduce", lambda: run_again(uri, source, folder, trust=trust))
    rows = [[it.name, f"{it.then:.6g}", f"{it.now:.6g}", f"± {it.allowed:.2g}"] for it in found.metrics]
    _show("reproduction", ["metric", "then", "now", "allowed"], rows, f"{found.uri} is {found.verdict}")
    kind = Failed if found.verdict == "different" else Completed
    return kind(message=f"{found.uri} is {found.verdict}", data=found)


def run_as_task(name: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401  # the function's result
    """Call a function as a Prefect task, which is retried while MLflow is unavailable.

    Raises:
        InputError: The function raised one.
    """
    state = _call.with_options(task_run_name=name)(function, return_state=True)
    if not state.is_completed():
        raise InputError(state.message or f"{name} failed")
    return state.result()


@task(**RETRIED)
def _call(function: Callable[[], Any]) -> State[Any]:
    try:
        with beside_runs(get_run_logger().info):
            return Completed(data=function())
    except UnavailableError as error:
        return Failed(name=UNAVAILABLE, message=error.message)
    except InputError as error:
        return Failed(message=error.message)


def _show_decision(decision: "Decision", message: str) -> State[Any]:
    """Show a decision and its checks; returns its completed state, whose data is the decision."""
    rows = [["✓" if check.passed else "✗", check.name, check.reason] for check in decision.checks]
    _show("decision", ["", "check", "reason"], rows, message)
    return Completed(name="Completed" if decision.passed else REFUSED, message=message, data=decision)


def _show(key: str, header: list[str], rows: list[list[str]], description: str) -> None:
    table = [dict(zip(header, row, strict=True)) for row in rows]
    if table:
        create_table_artifact(table, key=key, description=description)
