"""A version and a policy -> a decision with reasons, an act in the ledger, and moved aliases."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.register.gate import Candidate, check_canary, decide
from stages.register.ledger import Intention, Ledger
from stages.register.package import check_files
from stages.register.policy import Check, Policy
from stages.register.registry import CHALLENGER, CHAMPION, CONTENT, PREVIOUS, Registry
from stages.runtime.errors import InputError

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

    def message(self) -> str:
        """Say in one line what came of it."""
        refused = sum(not check.passed for check in self.checks)
        if refused:
            return f"{self.uri} is refused, by {refused} of {len(self.checks)} checks; no alias was moved"
        return f"{self.uri} is the champion{f', after {self.replaces}' if self.replaces else ''}"


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
    checks = _look(registry, candidate, champion, policy)
    decision = Decision(_uri(candidate), _uri(champion) if champion else None, checks)
    failed = "; ".join(f"{check.name}: {check.reason}" for check in checks if not check.passed)
    intention = Intention(
        kind="promote",
        start=champion,
        to=candidate,
        previous=str(champion.version) if champion else None,
        why="; ".join(part for part in (why, failed) if part) or "it passed the gate",
        checks=checks,
        policy=policy.model_dump_json(),
    )
    ledger = Ledger(registry, name)
    if failed:
        ledger.write(intention, "refused")
    else:
        ledger.carry_out(intention)
    registry.tag(candidate, gate=f"refused: {failed}" if failed else "passed")
    return decision


def roll_back(name: str, policy: Policy | None, why: str) -> Decision:
    """Make the previous champion the champion again, and withdraw the one that is.

    Args:
        name: The model.
        policy: Says how exactly the previous champion must still draw what it drew; None in an emergency, to not look.
        why: In the user's words.

    Raises:
        InputError: There is no previous champion, it no longer draws, another act is at work, or a server is away.
    """
    if not why.strip():
        raise InputError("a rollback needs a reason, for those who look for one later; give it with --why")
    registry = Registry()
    ledger = Ledger(registry, name)
    ledger.settle()
    champion, previous = (registry.by_alias(name, alias) for alias in (CHAMPION, PREVIOUS))
    if champion is None or previous is None or champion.version == previous.version:
        missing = CHAMPION if champion is None else PREVIOUS
        raise InputError(f"{name} has no {missing}, so there is nothing to go back to")
    checks = [_see(registry, previous, policy)] if policy else []
    intention = Intention(
        kind="rollback",
        start=champion,
        to=previous,
        previous=ledger.before(str(previous.version)),
        why=why,
        checks=checks,
        policy=policy.model_dump_json() if policy else "",
    )
    ledger.carry_out(intention)
    return Decision(_uri(previous), _uri(champion), checks)


def _see(registry: Registry, version: "ModelVersion", policy: Policy) -> Check:
    with tempfile.TemporaryDirectory() as temporary:
        candidate = _fetch(registry, version, Path(temporary))
        check_files(candidate.folder, candidate.tags.get(CONTENT))
        return Check("canary", passed=True, reason=check_canary(candidate.folder, policy.canary.levels))


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


def _uri(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"
