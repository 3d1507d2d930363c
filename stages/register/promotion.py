"""A version and a policy -> a decision with reasons, a line in the ledger, and moved aliases."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import InputError
from stages.register.gate import WITHDRAWN_TAG, Candidate, check_canary, decide
from stages.register.ledger import Ledger
from stages.register.package import check_files
from stages.register.policy import Check, Policy
from stages.register.registry import CHALLENGER, CHAMPION, CONTENT_TAG, PREVIOUS, Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Decision:
    """What came of it."""

    uri: str
    """The version that it was about."""
    replaces: str | None
    """The champion before."""
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether the aliases were moved."""
        return all(check.passed for check in self.checks)


def promote(name: str, uri: str | None, policy: Policy, why: str | None) -> Decision:
    """Decide whether a version becomes champion, write that down with the reasons, and move the aliases.

    Args:
        name: The model.
        uri: The version; None for the challenger.
        policy: What it must show.
        why: In the user's words.

    Raises:
        InputError: There is no such version, it is the champion already, another act is at work, or a server is away.
    """
    registry = Registry()
    candidate = registry.find(uri or f"models:/{name}@{CHALLENGER}")
    champion = registry.by_alias(name, CHAMPION)
    if candidate.name != name:
        raise InputError(f"{uri} is no version of {name}")
    if champion is not None and champion.version == candidate.version:
        raise InputError(f"{_uri(candidate)} is the champion already")
    decision = Decision(
        _uri(candidate), _uri(champion) if champion else None, _look(registry, candidate, champion, policy)
    )
    failed = "; ".join(f"{check.name}: {check.reason}" for check in decision.checks if not check.passed)
    ledger = Ledger(registry, name)
    act = ledger.open("promote", champion, candidate, failed or why or "it passed the gate", decision.checks)
    registry.tag(candidate, gate=f"refused: {failed}" if failed else "passed")
    if failed:
        ledger.close(act, "refused")
    else:
        ledger.enter(act)
        _crown(registry, candidate, champion)
        ledger.close(act, "done")
    return decision


def roll_back(name: str, policy: Policy, why: str) -> Decision:
    """Make the previous champion the champion again, once it was seen to draw, and withdraw the one that is.

    Raises:
        InputError: There is no previous champion, it no longer draws, another act is at work, or a server is away.
    """
    registry = Registry()
    champion, previous = (registry.by_alias(name, alias) for alias in (CHAMPION, PREVIOUS))
    if champion is None or previous is None:
        raise InputError(
            f"{name} has no {CHAMPION if champion is None else PREVIOUS}, so there is nothing to go back to"
        )
    with tempfile.TemporaryDirectory() as temporary:
        candidate = _fetch(registry, previous, Path(temporary))
        check_files(candidate.folder, candidate.tags.get(CONTENT_TAG))
        check = Check("canary", passed=True, reason=check_canary(candidate, policy.canary.levels))
    ledger = Ledger(registry, name)
    act = ledger.open("rollback", champion, previous, why, [check])
    ledger.enter(act)
    registry.tag(champion, withdrawn=f"by {act.by} at {act.at}: {why}")
    registry.point(name, CHAMPION, previous.version)
    registry.point(name, PREVIOUS, _earlier(registry, ledger, previous))
    ledger.close(act, "done")
    return Decision(_uri(previous), _uri(champion), [check])


def _look(
    registry: Registry, candidate: "ModelVersion", champion: "ModelVersion | None", policy: Policy
) -> list[Check]:
    with tempfile.TemporaryDirectory() as temporary:
        ours = _fetch(registry, candidate, Path(temporary) / "candidate")
        theirs = _fetch(registry, champion, Path(temporary) / "champion") if champion else None
        return decide(ours, theirs, policy)


def _fetch(registry: Registry, version: "ModelVersion", folder: Path) -> Candidate:
    folder.mkdir(exist_ok=True)
    return Candidate(_uri(version), registry.download(version, folder), dict(version.tags))


def _crown(registry: Registry, candidate: "ModelVersion", champion: "ModelVersion | None") -> None:
    """Move the aliases; whoever asks for the champion in between gets a whole one, the old or the new."""
    name = candidate.name
    if champion is not None:
        registry.point(name, PREVIOUS, champion.version)
    registry.point(name, CHAMPION, candidate.version)
    challenger = registry.by_alias(name, CHALLENGER)
    if challenger is not None and challenger.version == candidate.version:
        registry.point(name, CHALLENGER, None)


def _earlier(registry: Registry, ledger: Ledger, version: "ModelVersion") -> str | None:
    """Find whom a second rollback would go to: the champion before this one, unless it was withdrawn."""
    number = ledger.before(str(version.version))
    if number is None or WITHDRAWN_TAG in registry.find(f"models:/{version.name}/{number}").tags:
        return None
    return number


def _uri(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"
