"""A commit and overrides -> one compression, recorded, and registered if asked."""

from collections.abc import Mapping
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import show
from flows.notify import HOOKS
from flows.overrides import write
from flows.pipeline import bring_up_to_date
from flows.registry import register
from flows.words import in_words
from flows.workspace import Workspace, here, open_workspace
from stages.errors import InputError


def _name_run() -> str:
    given = flow_run.parameters
    overrides = write(given.get("overrides") or {})
    base = given.get("preset") or "params.yaml"
    return f"{given.get('commit') or 'here'}: {f'{base} with {overrides}' if overrides else base}"


@flow(flow_run_name=_name_run, persist_result=False, log_prints=False, **HOOKS)
@in_words
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
        return compress_at(here(), limits or {}, to_register=to_register)
    with open_workspace(commit, overrides or {}, get_run_logger().info, preset=preset) as place:
        return compress_at(place, limits or {}, to_register=to_register)


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
    show.results(place, outcome)
    message = f"{outcome}; {register(place)}" if to_register else str(outcome)
    place.remove()
    return Completed(message=message)
