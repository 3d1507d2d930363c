"""The current base -> a version, which becomes the champion if it is better."""

from typing import TYPE_CHECKING, Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.promotion import POLICY, promote, run_as_task
from flows.tasks import artifacts
from flows.tasks.compression import register
from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS, REFUSED
from flows.tasks.stages import bring_up_to_date
from flows.workspaces.overrides import write
from flows.workspaces.workspace import open_workspace

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from stages.register.ledger import Ledger


@flow(flow_run_name="{commit}", persist_result=False, on_failure=HOOKS["on_failure"], on_crashed=HOOKS["on_crashed"])
@fail_on_input_error
def nightly(
    overrides: dict[str, Any] | None = None,
    commit: str = "HEAD",
    policy: str = POLICY,
    limits: dict[str, float] | None = None,
) -> State[Any]:
    """Compress the current base, register the result, and promote it or report why not.

    Args:
        overrides: Dotted keys of params.yaml -> values.
        commit: A branch, tag or hash.
        policy: Path of the promotion policy in the commit.
        limits: Stage -> minutes after which it is terminated.
    """
    from stages.register.policy import load_policy

    with open_workspace(commit, overrides or {}, get_run_logger().info) as workspace:
        load_policy(workspace.path / policy)  # refused now rather than after the compression
        outcome = bring_up_to_date(workspace, limits or {})
        artifacts.results(workspace, outcome)
        uri = register(workspace)
        decision: tuple[str, str] | None = run_as_task("find decision", lambda: find_decision(uri))
        state_type = Completed
        if decision is None:
            model = uri.removeprefix("models:/").partition("/")[0]
            why = f"nightly of {str(workspace.commit)[:12]}, {write(overrides or {}) or 'as in params.yaml'}"
            promoted = promote(model, uri, str(workspace.path / policy), why, return_state=True)
            state_type = Completed if promoted.is_completed() else Failed
            decision = promoted.name or "", promoted.message or ""
        workspace.remove()
        name, message = decision
        return state_type(
            name=name, message=message
        )  # a new state, since Prefect rewrites the message of another run's


def find_decision(uri: str) -> tuple[str, str] | None:
    """Find what an earlier run decided on a version: state name and message; None where it is still to be decided.

    A decision that was interrupted after it had moved the champion is finished first.
    """
    from stages.register.ledger import Ledger
    from stages.register.registry import CHAMPION, WITHDRAWN, Registry, refusal_reason

    registry = Registry()
    version = registry.find(uri)
    ledger = Ledger(registry, version.name)
    if ledger.settle_dead():
        version = registry.find(uri)  # with its new tags
    champion = registry.by_alias(version.name, CHAMPION)
    if champion is not None and champion.version == version.version:
        return "Completed", f"nothing has changed, {uri} is the champion already"
    reason = refusal_reason(version)
    if reason is not None:
        return REFUSED, f"nothing has changed since {uri} was refused: {reason}"
    successor = _find_successor(ledger, version, champion)
    if successor is not None and WITHDRAWN not in version.tags:  # the gate refuses a withdrawn one, with its reason
        found = f"{uri} was the champion and was replaced by models:/{version.name}/{successor}"
        return "Completed", f"nothing has changed; {found}"
    return None


def _find_successor(ledger: "Ledger", version: "ModelVersion", champion: "ModelVersion | None") -> str | None:
    """Find the number of the version that replaced an earlier champion; an alias moved by hand leaves no entry."""
    from stages.register.registry import GATE, PASSED

    successor = ledger.successor(str(version.version))
    if successor is None and champion is not None and version.tags.get(GATE) == PASSED:
        return str(champion.version)
    return successor
