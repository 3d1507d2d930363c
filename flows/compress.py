"""A commit and overrides -> one compression, recorded in MLflow, and registered if requested."""

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.tasks import artifacts
from flows.tasks.compression import compress_at
from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.tasks.outcome import attach_outcome
from flows.workspaces.checkout import lock_checkout
from flows.workspaces.overrides import write
from flows.workspaces.workspace import current_checkout, open_workspace
from stages.runtime.errors import InputError

MAX_NAME = 60
"""Most characters of the name of a run, of which Prefect's lists show no more; the artifact `changes` has every key."""


def _name_run() -> str:
    """Name a run by commit, preset and changed params, such as "HEAD · macs 44%"."""
    given = flow_run.parameters
    parts = [given.get("commit") or "checkout", given.get("preset"), write(given.get("overrides") or {})]
    name = " · ".join(str(part) for part in parts if part)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


@flow(flow_run_name=_name_run, persist_result=False, log_prints=False, **HOOKS)
@fail_on_input_error
def compress(
    overrides: dict[str, Any] | None = None,
    commit: str | None = "HEAD",
    limits: dict[str, float] | None = None,
    *,
    preset: str | None = None,
    to_register: bool = False,
) -> State[None]:
    """Bring every stage up to date, record the result in MLflow, and register it if requested.

    Args:
        overrides: Dotted keys of params.yaml -> values, such as {"prune.target.macs": "56%"}.
        commit: A branch, tag or hash, which runs in a workspace of its own; null runs in the current folder as it
            stands, and allows no overrides.
        limits: Stage -> minutes after which it is terminated.
        preset: Name of a preset of the commit (recipes/presets) that replaces its params.yaml; null keeps it.
        to_register: Whether the result becomes a version in MLflow's registry, the challenger.
    """
    if commit is None:
        if overrides or preset is not None:
            raise InputError("overrides and presets need a commit, since the checkout's params.yaml stays; give HEAD")
        checkout = current_checkout()
        with lock_checkout(checkout.path, get_run_logger().info):
            outcome = compress_at(checkout, limits or {}, to_register=to_register)
    else:
        artifacts.changes(overrides or {}, preset)
        with open_workspace(commit, overrides or {}, get_run_logger().info, preset=preset) as workspace:
            outcome = compress_at(workspace, limits or {}, to_register=to_register)
    attach_outcome(outcome)
    return Completed(message=str(outcome))
