"""A commit and overrides -> one compression, recorded, and registered if asked."""

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.tasks.compression import compress_at
from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.workspaces.overrides import write
from flows.workspaces.workspace import current_checkout, open_workspace
from stages.runtime.errors import InputError


def _name_run() -> str:
    given = flow_run.parameters
    overrides = write(given.get("overrides") or {})
    base = given.get("preset") or "params.yaml"
    return f"{given.get('commit') or 'current_checkout'}: {f'{base} with {overrides}' if overrides else base}"


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
    """Bring every stage up to date, make sure that MLflow has the result, and register it if asked.

    Args:
        overrides: Dotted keys of params.yaml -> values, such as {"prune.target.macs": "56%"}.
        commit: A branch, tag or hash, which gets a workspace of its own; null runs in the folder that the flow is
            started in, as it stands, and takes no overrides.
        limits: Stage -> minutes after which it is ended.
        preset: Which of the commit's recipes/presets stands in place of its params.yaml.
        to_register: Whether the result becomes a version in MLflow's registry, the challenger.
    """
    if commit is None:
        if overrides or preset:
            raise InputError("overrides and presets need a commit, since nobody's params.yaml is changed; give HEAD")
        return compress_at(current_checkout(), limits or {}, to_register=to_register)
    with open_workspace(commit, overrides or {}, get_run_logger().info, preset=preset) as place:
        return compress_at(place, limits or {}, to_register=to_register)
