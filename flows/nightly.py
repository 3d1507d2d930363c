"""The base of today -> a version, and a champion if it is better."""

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.promotion import POLICY, act, promote
from flows.tasks import artifacts
from flows.tasks.compression import register
from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS, REFUSED
from flows.tasks.stages import bring_up_to_date
from flows.workspaces.overrides import write
from flows.workspaces.workspace import open_workspace


@flow(flow_run_name="{commit}", persist_result=False, on_failure=HOOKS["on_failure"], on_crashed=HOOKS["on_crashed"])
@fail_on_input_error
def nightly(
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    policy: str = POLICY,
    limits: dict[str, float] | None = None,
) -> State[Any]:
    """Compress the current base, register the result, and promote it, or say why not.

    Args:
        overrides: Dotted keys of params.yaml -> values.
        commit: A branch, tag or hash.
        policy: What a version must show; a path in the commit.
        limits: Stage -> minutes after which it is ended.
    """
    with open_workspace(commit, overrides or {}, get_run_logger().info) as place:
        outcome = bring_up_to_date(place, limits or {})
        artifacts.results(place, outcome)
        uri = register(place)
        kind = Completed
        found: tuple[str, str] | None = act("look up", lambda: _look_up(uri))
        if found:
            name, message = found
        else:
            model = uri.removeprefix("models:/").partition("/")[0]
            why = f"nightly of {str(place.commit)[:12]}, {write(overrides or {}) or 'as in params.yaml'}"
            decided = promote(model, uri, str(place.path / policy), why, return_state=True)
            kind = Completed if decided.is_completed() else Failed
            name, message = decided.name or "", decided.message or ""
        place.remove()
        return kind(name=name, message=message)  # a state of its own, or Prefect words it anew


def _look_up(uri: str) -> tuple[str, str] | None:
    """Give name and message of what became of a version that an earlier run made: nothing was changed since."""
    from stages.register.registry import CHAMPION, GATE, Registry

    registry = Registry()
    version = registry.find(uri)
    champion = registry.by_alias(version.name, CHAMPION)
    if champion is not None and champion.version == version.version:
        return "Completed", f"nothing has changed, {uri} is the champion already"
    verdict = version.tags.get(GATE, "")
    if verdict.startswith("refused"):
        return REFUSED, f"nothing has changed since {uri} was {verdict}"
    return None
