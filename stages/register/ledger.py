"""Promotions and rollbacks of a model -> numbered entries in the registry, which also decide between concurrent ones.

The ledger of the model NAME is the registered model NAME.promotions; each of its versions is one entry. The server
gives every entry another number, so of several concurrent entries the oldest proceeds and the others yield. An entry
is written before the aliases change and holds their new values, so that a later entry can finish an interrupted one.
"""

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from stages.register.policy import Check
from stages.register.registry import CHALLENGER, CHAMPION, PASSED, PREVIOUS, WITHDRAWN, Registry
from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError
from stages.runtime.text import printable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

LEASE_S = 1200
"""Age from which an open entry of an invisible process counts as dead; longer than all retries of a call."""
TIMEOUT_S = 300
"""An entry yields if it could not change the champion within this time."""
NONE = "none"
"""Stands for the number of a version where there is none."""
SUFFIX = ".promotions"
Kind = Literal["promote", "rollback"]
Outcome = Literal["open", "done", "refused", "yielded", "broken off"]
FIELDS = ("act", "outcome", "from", "to", "previous", "by", "at", "why", "checks", "policy", "process", "nonce")
MAX_DESCRIPTION = 5000
"""Longest description that MLflow accepts, in characters."""
_left_open: set[str] = set()
"""Nonces of this process's entries whose change ended without closing them; adding to a set is safe for threads."""


@dataclass(frozen=True)
class PlannedChange:
    """A promotion or rollback before it happens."""

    kind: Kind
    start: "ModelVersion | None"
    """The champion that it replaces."""
    to: "ModelVersion"
    """The new champion."""
    previous: str | None
    """Number of the version that the alias previous gets; None deletes the alias."""
    why: str
    checks: Sequence[Check]
    policy: str
    """The policy of the checks, as JSON; empty without one."""


@dataclass(frozen=True)
class LedgerEntry:
    """One promotion or rollback in the ledger."""

    version: "ModelVersion"
    """The version of NAME.promotions that holds the entry."""
    kind: str
    outcome: str
    start: str
    """Number of the champion that it replaces, or none."""
    to: str
    """Number of the new champion; it became the champion if the outcome is done."""
    previous: str
    """Number of the version that the alias previous gets, or none."""
    by: str
    """User and host, as the client reports them."""
    at: str
    """Time of the entry in ISO 8601, by the client's clock."""
    why: str
    checks: list[Check]
    process: str
    """Where the process is visible, its id and a hash of its start; shows whether it still runs."""
    nonce: str
    """Unique for every entry; two versions with one nonce are a request that the client repeated."""

    @property
    def number(self) -> int:
        """Position in the ledger."""
        return int(self.version.version)

    def line(self) -> str:
        """Describe the entry in one line: when, what, by whom and why."""
        what = f"{self.kind} {self.start} -> {self.to}: {self.outcome}"
        return f"{self.number:>4}  {self.at}  {what}, by {self.by}: {self.why}"


class Ledger:
    """The ledger of one model.

    Args:
        registry: The registry that holds it.
        name: Name of the model.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name = registry, name

    def entries(self) -> list[LedgerEntry]:
        """List all entries, the newest first."""
        return [_read_entry(version) for version in self.registry.versions(f"{self.name}{SUFFIX}")]

    def write(self, change: PlannedChange, outcome: Outcome, nonce: str | None = None) -> LedgerEntry:
        """Write an entry, without changing any alias; None gives it a new nonce."""
        values = {
            "act": change.kind,
            "outcome": outcome,
            "from": str(change.start.version) if change.start else NONE,
            "to": str(change.to.version),
            "previous": change.previous or NONE,
            "by": describe_user(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "why": printable(change.why),
            "checks": json.dumps([asdict(check) for check in change.checks]),
            "policy": change.policy,
            "process": _describe_process(os.getpid()),
            "nonce": nonce or uuid.uuid4().hex,
        }
        text = "\n".join(f"- {'✓' if check.passed else '✗'} {check.name}: {check.reason}" for check in change.checks)
        tags = {f"espalier.{key}": values[key] for key in FIELDS}
        source = f"models:/{self.name}/{change.to.version}"
        return _read_entry(self.registry.create(f"{self.name}{SUFFIX}", source, None, tags, text[:MAX_DESCRIPTION]))

    def execute(self, change: PlannedChange) -> None:
        """Write an entry, make the version the champion, set the other aliases, and close the entry.

        Raises:
            InputError: Another entry is in progress, the champion changed since the checks, or the version was rolled
                back since; then no alias is changed and the entry is closed as yielded.
            UnavailableError: The server does not answer; then the next entry finishes or closes this one.
        """
        nonce = uuid.uuid4().hex
        try:
            obstacle = self._proceed(change, nonce)
        except BaseException:
            _left_open.add(nonce)
            raise
        if obstacle:
            raise obstacle

    def _proceed(self, change: PlannedChange, nonce: str) -> InputError | None:
        """Write an entry, change the aliases and close it; returns why it yielded, if it did."""
        begin = time.monotonic()
        entry = self.write(change, "open", nonce)
        try:
            self._check_current(entry, begin)
        except InputError as error:
            self._close(entry, "yielded")
            return error
        self.registry.set_alias(self.name, CHAMPION, entry.to)
        self._finish(entry)
        return None

    def _check_current(self, entry: LedgerEntry, begin: float) -> None:
        """Settle dead older entries, and yield if one is alive or if the entry's premises no longer hold."""
        for other in self.entries():  # before the champion is read, since an entry changes it before it closes
            if other.nonce == entry.nonce and other.number != entry.number:
                self._close(other, "yielded")
            elif other.outcome == "open" and other.number < entry.number:
                self._settle_older(other, entry)
            elif other.number == entry.number and other.outcome != "open":
                raise InputError("another process took this entry for dead and closed it; nothing was changed, retry")
        champion = self._champion()
        if champion != entry.start:
            found = f"the champion of {self.name} became version {champion}, and the checks compared with {entry.start}"
            raise InputError(f"{found}; nothing was changed, retry")
        if WITHDRAWN in self.registry.find(f"models:/{self.name}/{entry.to}").tags:
            raise InputError(f"version {entry.to} of {self.name} was rolled back meanwhile; nothing was changed")
        if time.monotonic() - begin > TIMEOUT_S:
            raise InputError(f"the registry took longer than {TIMEOUT_S} s to answer; nothing was changed, retry")

    def _settle_older(self, other: LedgerEntry, entry: LedgerEntry) -> None:
        """Settle an older entry if it is dead; yield if it is alive."""
        if not _is_dead(other, entry.version.creation_timestamp):
            found = f"{self._describe(other)} is in progress"
            raise InputError(f"{found}; nothing was changed, check its outcome and retry")
        if self._settle(other) and entry.kind == "rollback":
            raise self.was_finished(other)

    def settle_dead(self) -> list[LedgerEntry]:
        """Finish or close every dead entry, so that a change starts from settled aliases; returns the finished ones.

        A finished entry may be the change that the caller wants to make.
        """
        unsettled = [it for it in self.entries() if it.outcome == "open"]
        now_ms = self.registry.now_ms(f"{self.name}{SUFFIX}") if unsettled else 0
        return [other for other in unsettled if _is_dead(other, now_ms) and self._settle(other)]

    def _settle(self, other: LedgerEntry) -> bool:
        """Finish an entry that had changed the champion, close any other; returns whether it was finished."""
        changed = self._champion() == other.to != other.start
        if changed:
            self._finish(other)
        else:
            self._close(other, "broken off")
        return changed

    def _finish(self, entry: LedgerEntry) -> None:
        """Set the other aliases and tags after the champion has changed; a second call has no effect."""
        self.registry.set_alias(self.name, PREVIOUS, None if entry.previous == NONE else entry.previous)
        challenger = self.registry.by_alias(self.name, CHALLENGER)
        if challenger is not None and str(challenger.version) == entry.to:
            self.registry.set_alias(self.name, CHALLENGER, None)
        if entry.kind == "rollback":
            withdrawn = self.registry.find(f"models:/{self.name}/{entry.start}")
            self.registry.tag(withdrawn, withdrawn=f"by {entry.by} at {entry.at}: {entry.why}")
        else:
            promoted = self.registry.find(f"models:/{self.name}/{entry.to}")
            self.registry.tag(promoted, gate=PASSED, gate_reason="every check passed")
        self._close(entry, "done")

    def _close(self, entry: LedgerEntry, outcome: Outcome) -> None:
        self.registry.tag(entry.version, outcome=outcome)

    def _champion(self) -> str:
        champion = self.registry.by_alias(self.name, CHAMPION)
        return str(champion.version) if champion else NONE

    def _describe(self, entry: LedgerEntry) -> str:
        return f"entry {entry.number} of {self.name} ({entry.kind} to version {entry.to}, by {entry.by} at {entry.at})"

    def was_finished(self, entry: LedgerEntry) -> InputError:
        """Make the error for a rollback that found an interrupted entry and finished it."""
        found = f"{self._describe(entry)} was interrupted; it is finished now"
        return InputError(f"{found}; check the ledger, and retry if another change is still wanted")

    def successor(self, number: str) -> str | None:
        """Find the version that last replaced a version as champion; None if the version was never replaced."""
        return next((it.to for it in self.entries() if (it.outcome, it.start) == ("done", number)), None)

    def champion_before(self, number: str, withdrawn: str) -> str | None:
        """Find the latest champion before a version that is neither that version, withdrawn nor deleted.

        Args:
            number: Number of the version, which a rollback makes the champion.
            withdrawn: Number of the version that the rollback withdraws.
        """
        versions = {str(version.version): version for version in self.registry.versions(self.name)}
        usable = {it for it, version in versions.items() if WITHDRAWN not in version.tags} - {number, withdrawn}
        replaced = number
        for entry in self.entries():
            if (entry.kind, entry.outcome, entry.to) == ("promote", "done", replaced):
                replaced = entry.start
                if replaced in usable:
                    return replaced
        return None


def describe_user() -> str:
    """Name the user: MLflow user name if set, login and host."""
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        login = str(os.getuid())
    account = f"{login}@{socket.gethostname()}"
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return printable(f"{user} ({account})" if user else account)


def _read_entry(version: "ModelVersion") -> LedgerEntry:
    tags = {key: printable(version.tags.get(f"espalier.{key}", "")) for key in FIELDS}  # others may have written them
    try:
        checks = [_read_check(**check) for check in parse_json((tags["checks"] or "[]").encode())]
    except (TypeError, ValueError):
        checks = [Check("the ledger", passed=False, reason="the checks of this entry are damaged")]
    return LedgerEntry(
        version=version,
        kind=tags["act"],
        outcome=tags["outcome"],
        start=tags["from"],
        to=tags["to"],
        previous=tags["previous"],
        by=tags["by"],
        at=tags["at"],
        why=tags["why"],
        checks=checks,
        process=tags["process"],
        nonce=tags["nonce"],
    )


def _read_check(name: str, *, passed: bool, reason: str) -> Check:
    return Check(printable(name), passed=passed is True, reason=printable(reason))


def _is_dead(entry: LedgerEntry, now_ms: float) -> bool:
    """Return whether no process works on an open entry any more, as far as this one can know."""
    if entry.nonce in _left_open:
        return True
    return now_ms - entry.version.creation_timestamp > 1000 * LEASE_S or _has_ended(entry.process)


def _describe_process(pid: int) -> str:
    """Name a process: where it is visible, its id, and psutil's hash of its id and start.

    The hash counts the start from the boot. A start in the time of day, such as that of create_time, would change
    whenever the clock is set, and a running process would then pass for one that has ended.
    """
    return f"{_visibility()} {pid} {hash(psutil.Process(pid)):x}"


def _visibility() -> str:
    """Name the host, the PID namespace and the user; processes of another of these may be invisible here."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else 0} {os.getuid()}"


def _has_ended(process: str) -> bool:
    """Return whether a process has ended; False if it ran where this process might not see it."""
    where, _, pid = process.rpartition(" ")[0].rpartition(" ")
    if where != _visibility() or not pid.isdigit():
        return False
    try:
        return _describe_process(int(pid)) != process
    except psutil.NoSuchProcess:
        return True
