"""Acts on a model -> a numbered ledger in the registry, which is also the queue of those who act.

The ledger of a model NAME is the registered model NAME.promotions; each of its versions is one act. The server numbers
them, no two alike, so of several at once the oldest goes on and the others yield. An act says beforehand what it wants
the aliases to be, so that anybody can finish one that died after it had moved the champion.
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
from typing import TYPE_CHECKING, Literal

import psutil

from stages.register.policy import Check
from stages.register.registry import CHALLENGER, CHAMPION, PREVIOUS, WITHDRAWN, Registry
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

LEASE_S = 1200
"""After this long an open act of another machine counts as dead; longer than all retries of a call to the server."""
PATIENCE_S = 300
"""An act that did not get to move the champion in this time gives up."""
NONE = "none"
SUFFIX = ".promotions"
Kind = Literal["promote", "rollback"]
Outcome = Literal["open", "done", "refused", "yielded", "broken off"]
FIELDS = ("act", "outcome", "from", "to", "previous", "by", "at", "why", "checks", "policy", "process", "nonce")
LONGEST_TEXT = 5000
"""Of a description; MLflow takes no more."""


@dataclass(frozen=True)
class Act:
    """One line of the ledger."""

    version: "ModelVersion"
    """Where it stands."""
    kind: str
    outcome: str
    start: str
    """The champion before: its number, or none."""
    to: str
    """The champion after, where the outcome is done."""
    previous: str
    """Where a rollback goes afterwards: a number, or none."""
    by: str
    at: str
    """In ISO 8601, by the clock of the one who acted."""
    why: str
    checks: list[Check]
    process: str
    """Host, process and its start, to tell whether it lives."""
    nonce: str
    """One for each act, also where a lost answer made the server write it twice."""

    @property
    def number(self) -> int:
        """Its place in the ledger."""
        return int(self.version.version)


@dataclass(frozen=True)
class Intention:
    """What an act is to be."""

    kind: Kind
    start: "ModelVersion | None"
    to: "ModelVersion"
    previous: str | None
    why: str
    checks: Sequence[Check]
    policy: str
    """The policy that was in force, as JSON."""


class Ledger:
    """The ledger of one model.

    Args:
        registry: Where it is kept.
        name: The model.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name, self.place = registry, name, f"{name}{SUFFIX}"

    def acts(self) -> list[Act]:
        """Read all acts, the newest first."""
        return [_read(version) for version in self.registry.versions(self.place)]

    def write(self, intention: Intention, outcome: Outcome) -> Act:
        """Write an act down before it happens: who, when, why, from what, to what."""
        to, checks = intention.to, intention.checks
        values = {
            "act": intention.kind,
            "outcome": outcome,
            "from": str(intention.start.version) if intention.start else NONE,
            "to": str(to.version),
            "previous": intention.previous or NONE,
            "by": who(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "why": intention.why,
            "checks": json.dumps([asdict(check) for check in checks]),
            "policy": intention.policy,
            "process": _describe_process(os.getpid()),
            "nonce": uuid.uuid4().hex,
        }
        text = "\n".join(f"- {'✓' if check.passed else '✗'} {check.name}: {check.reason}" for check in checks)
        tags = {f"espalier.{key}": values[key] for key in FIELDS}
        return _read(
            self.registry.create(self.place, f"models:/{self.name}/{to.version}", None, tags, text[:LONGEST_TEXT])
        )

    def carry_out(self, intention: Intention) -> None:
        """Write an act down, wait for no one, move the champion, and finish.

        Raises:
            InputError: Another act is at work, the champion is no longer the one that this was decided against, or the
                version was rolled back meanwhile; then nothing is changed and the act is closed as yielded. Or the
                server fails on the way; then the next act finishes or closes this one.
        """
        begin = time.monotonic()
        act = self.write(intention, "open")
        try:
            self._look_around(act, begin)
        except InputError:
            self._close(act, "yielded")
            raise
        self.registry.point(self.name, CHAMPION, act.to)
        self._finish(act)

    def _look_around(self, act: Act, begin: float) -> None:
        """Yield to whoever was first; clear away what died."""
        for other in self.acts():  # before the champion is read: who closes in between has moved it already
            if other.nonce == act.nonce and other.number != act.number:
                self._close(other, "yielded")
            elif other.outcome == "open" and other.number < act.number:
                self._outlive(other, act)
            elif other.number == act.number and other.outcome != "open":
                raise InputError("this act was taken for dead and closed; nothing was changed, try again")
        champion = self._champion()
        if champion != act.start:
            found = f"the champion of {self.name} became version {champion} while this was decided against {act.start}"
            raise InputError(f"{found}; nothing was changed, decide again")
        if act.kind == "promote" and WITHDRAWN in self.registry.find(f"models:/{self.name}/{act.to}").tags:
            raise InputError(f"version {act.to} of {self.name} was rolled back meanwhile; nothing was changed")
        if time.monotonic() - begin > PATIENCE_S:
            raise InputError(f"the registry took longer than {PATIENCE_S} s to answer; nothing was changed, try again")

    def _outlive(self, other: Act, act: Act) -> None:
        """Settle an older act that died; yield to one that lives."""
        if not _is_dead(other, act.version.creation_timestamp):
            found = f"{other.by} is at work on {self.name} since {other.at} ({other.kind} to {other.to})"
            raise InputError(f"{found}; nothing was changed, look at the outcome and try again")
        if self._settle(other) and act.kind == "rollback":
            raise InputError(_tell_finished(other))

    def settle(self) -> None:
        """Finish or close the acts that died, before somebody decides on what they left.

        Raises:
            InputError: One was finished, so what was asked for may be done already.
        """
        now_ms = time.time() * 1000
        for other in self.acts():
            if other.outcome == "open" and _is_dead(other, now_ms) and self._settle(other):
                raise InputError(_tell_finished(other))

    def _settle(self, other: Act) -> bool:
        """Finish an act that had moved the champion, or close it: whether it was finished."""
        moved = self._champion() == other.to != other.start
        if moved:
            self._finish(other)
        else:
            self._close(other, "broken off")
        return moved

    def _finish(self, act: Act) -> None:
        """Do what follows once the champion has moved; doing it twice changes nothing."""
        self.registry.point(self.name, PREVIOUS, None if act.previous == NONE else act.previous)
        challenger = self.registry.by_alias(self.name, CHALLENGER)
        if challenger is not None and str(challenger.version) == act.to:
            self.registry.point(self.name, CHALLENGER, None)
        if act.kind == "rollback":
            withdrawn = self.registry.find(f"models:/{self.name}/{act.start}")
            self.registry.tag(withdrawn, withdrawn=f"by {act.by} at {act.at}: {act.why}")
        self._close(act, "done")

    def _close(self, act: Act, outcome: Outcome) -> None:
        self.registry.tag(act.version, outcome=outcome)

    def _champion(self) -> str:
        champion = self.registry.by_alias(self.name, CHAMPION)
        return str(champion.version) if champion else NONE

    def before(self, number: str) -> str | None:
        """Find who was champion before a version became it; None where nobody was, or it is gone or withdrawn."""
        acts = (act for act in self.acts() if (act.kind, act.outcome, act.to) == ("promote", "done", number))
        earlier = next((act.start for act in acts), NONE)
        known = {str(version.version): version for version in self.registry.versions(self.name)}
        return earlier if earlier in known and WITHDRAWN not in known[earlier].tags else None


def _is_dead(act: Act, now_ms: float) -> bool:
    return now_ms - act.version.creation_timestamp > 1000 * LEASE_S or _has_ended(act.process)


def _tell_finished(act: Act) -> str:
    found = f"the {act.kind} to version {act.to} that {act.by} began at {act.at} had not ended; it was finished now"
    return f"{found}; look at the ledger, and ask again if this is still wanted"


def _read(version: "ModelVersion") -> Act:
    tags = {key: version.tags.get(f"espalier.{key}", "") for key in FIELDS}
    try:
        checks = [Check(**check) for check in json.loads(tags["checks"] or "[]")]
    except (TypeError, ValueError):
        checks = [Check("the ledger", passed=False, reason="the checks of this act were damaged")]
    return Act(
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


def who() -> str:
    """Name the one who acts: the name given to the server, and login and host."""
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        login = str(os.getuid())
    here = f"{login}@{socket.gethostname()}"
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return f"{user} ({here})" if user else here


def _describe_process(pid: int) -> str:
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time():.2f}"


def _has_ended(process: str) -> bool:
    """Whether a process of this machine is no more; of another machine's nobody here can tell."""
    host, _, rest = process.partition(" ")
    pid = rest.split(" ")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        return _describe_process(int(pid)) != process
    except psutil.NoSuchProcess:
        return True
