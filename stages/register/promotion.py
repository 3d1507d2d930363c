"""A version and a policy -> a decision with reasons, an entry in the ledger, and changed aliases."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.register.canary import check_canary
from stages.register.gate import VersionFiles, run_checks
from stages.register.ledger import Ledger
from stages.register.ledger_entry import NONE, PlannedChange
from stages.register.machine_faults import temporary_folder
from stages.register.package import check_files
from stages.register.policy import Check, Policy
from stages.register.registry import (
    CHALLENGER,
    CHAMPION,
    CONTENT,
    PREVIOUS,
    REFUSED,
    WITHDRAWN,
    Registry,
    uri_of,
)
from stages.runtime.errors import InputError
from stages.runtime.text import printable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Decision:
    """The result of a promotion or rollback."""

    uri: str
    """The version that was to become the champion."""
    replaces: str | None
    """The champion before; None if there was none."""
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check passed, so that the version is the champion."""
        return all(check.passed for check in self.checks)

    def message(self) -> str:
        """Summarise a promotion in one line."""
        failed = sum(not check.passed for check in self.checks)
        if failed:
            return f"{self.uri} was refused: {failed} of {len(self.checks)} checks failed; no alias was changed"
        return f"{self.uri} is the champion{f', replacing {self.replaces}' if self.replaces else ''}"


def promote(name: str, uri: str | None, policy: Policy, why: str | None) -> Decision:
    """Check a version against the policy, record the decision in the ledger, and make it the champion if it passes.

    A promotion of the version that was interrupted after its checks had made it the champion is finished instead.

    Args:
        name: Name of the model.
        uri: The version, models:/NAME/3; None takes the challenger.
        policy: What the version must fulfil.
        why: The user's reason.

    Raises:
        InputError: The version does not exist or is the champion already, or another promotion or rollback of the model
            is in progress.
        MachineError: This machine cannot check the version; nothing is recorded.
        UnavailableError: The server does not answer.
    """
    registry = Registry()
    named = _look_up(registry, name, uri)
    ledger = Ledger(registry, name)
    if finished := _finish_interrupted(ledger, named, uri):
        return finished
    candidate = registry.find(uri_of(named) if named else _address(name, uri))  # settling may have changed its tags
    champion = registry.by_alias(name, CHAMPION)
    if champion is not None and champion.version == candidate.version:
        raise InputError(f"{uri_of(candidate)} is the champion already")
    checks = _run_gate(registry, candidate, champion, policy)
    failed = "; ".join(f"{check.name}: {check.reason}" for check in checks if not check.passed)
    change = PlannedChange(
        kind="promote",
        start=champion,
        to=candidate,
        previous=str(champion.version) if champion else None,
        why="; ".join(part for part in (why, failed) if part) or "it passed the gate",
        checks=checks,
        policy=policy.model_dump_json(),
    )
    if failed:
        ledger.write(change, "refused")
        registry.tag(candidate, gate=REFUSED, gate_reason=failed)
    else:
        ledger.execute(change)
    return Decision(uri_of(candidate), uri_of(champion) if champion else None, checks)


def roll_back(name: str, policy: Policy | None, why: str) -> Decision:
    """Make the previous champion the champion again, and withdraw the current one.

    Args:
        name: Name of the model.
        policy: Bounds the deviation of the previous champion's samples; None skips that check, in an emergency.
        why: The user's reason.

    Raises:
        InputError: There is no previous champion, it is withdrawn, its files or samples have changed, or another
            promotion or rollback of the model is in progress.
        MachineError: This machine cannot check the samples; nothing is recorded.
        UnavailableError: The server does not answer.
    """
    if not why.strip():
        raise InputError("a rollback needs a reason for the ledger; give it with --why")
    registry = Registry()
    ledger = Ledger(registry, name)
    if finished := ledger.settle_dead():
        raise ledger.was_finished(finished[0])
    champion, previous = (registry.by_alias(name, alias) for alias in (CHAMPION, PREVIOUS))
    if champion is None or previous is None or champion.version == previous.version:
        missing = CHAMPION if champion is None else PREVIOUS
        raise InputError(f"{name} has no version with the alias {missing}, so there is nothing to roll back to")
    if withdrawn := previous.tags.get(WITHDRAWN):
        found = f"{uri_of(previous)}, the previous champion, was itself rolled back {printable(withdrawn)}"
        raise InputError(f"{found}; promote another version, or delete its tag {WITHDRAWN} to go back to it")
    checks = [_check_samples(registry, previous, policy.canary.levels)] if policy else []
    change = PlannedChange(
        kind="rollback",
        start=champion,
        to=previous,
        previous=ledger.champion_before(str(previous.version), str(champion.version)),
        why=why,
        checks=checks,
        policy=policy.model_dump_json() if policy else "",
    )
    ledger.execute(change)
    return Decision(uri_of(previous), uri_of(champion), checks)


def _address(name: str, uri: str | None) -> str:
    return uri or f"models:/{name}@{CHALLENGER}"


def _look_up(registry: Registry, name: str, uri: str | None) -> "ModelVersion | None":
    version = registry.look_up(_address(name, uri))
    if version is not None and version.name != name:
        raise InputError(f"{uri} is a version of {version.name}, not of {name}")
    return version


def _finish_interrupted(ledger: Ledger, named: "ModelVersion | None", uri: str | None) -> Decision | None:
    """Settle dead entries; returns the decision of an interrupted promotion of this version if one was finished.

    An interrupted promotion may have deleted the alias challenger already, so that it names no version.
    """
    for entry in ledger.settle_dead():
        if entry.kind == "promote" and (entry.to == str(named.version) if named else uri is None):
            replaced = None if entry.start == NONE else f"models:/{ledger.name}/{entry.start}"
            passed = [check for check in entry.checks if check.passed]  # a failed one says that they cannot be read
            return Decision(f"models:/{ledger.name}/{entry.to}", replaced, passed)
    return None


def _check_samples(registry: Registry, version: "ModelVersion", levels: float) -> Check:
    with temporary_folder() as temporary:
        previous = _download(registry, version, temporary)
        check_files(previous.folder, previous.tags.get(CONTENT))
        return Check("canary", passed=True, reason=check_canary(previous.folder, levels))


def _run_gate(
    registry: Registry, candidate: "ModelVersion", champion: "ModelVersion | None", policy: Policy
) -> list[Check]:
    with temporary_folder() as temporary:
        ours = _download(registry, candidate, temporary / "candidate")
        theirs = _download(registry, champion, temporary / "champion") if champion else None
        return run_checks(ours, theirs, policy)


def _download(registry: Registry, version: "ModelVersion", folder: Path) -> VersionFiles:
    folder.mkdir(exist_ok=True)
    return VersionFiles(uri_of(version), registry.download(version, folder), dict(version.tags))
