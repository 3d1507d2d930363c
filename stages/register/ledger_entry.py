"""A promotion or rollback -> the tags of its entry in the ledger; a version with such tags -> the entry."""

import getpass
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from stages.register.policy import Check
from stages.runtime.bounded import parse_json
from stages.runtime.process_identity import describe_process
from stages.runtime.text import printable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NONE = "none"
"""Stands for the number of a version where there is none."""
Kind = Literal["promote", "rollback"]
Outcome = Literal["open", "done", "refused", "yielded", "broken off"]
FIELDS = ("act", "outcome", "from", "to", "previous", "by", "at", "why", "checks", "policy", "process", "nonce")


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


def entry_tags(change: PlannedChange, outcome: Outcome, nonce: str) -> dict[str, str]:
    """Return the tags of an entry that this process writes now."""
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
        "process": describe_process(os.getpid()),
        "nonce": nonce,
    }
    return {f"espalier.{key}": values[key] for key in FIELDS}


def read_entry(version: "ModelVersion") -> LedgerEntry:
    """Read an entry from the tags of its version; others may have written any text into them."""
    tags = {key: printable(version.tags.get(f"espalier.{key}", "")) for key in FIELDS}
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


def describe_user() -> str:
    """Name the user: MLflow user name if set, login and host."""
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        login = str(os.getuid())
    account = f"{login}@{socket.gethostname()}"
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return printable(f"{user} ({account})" if user else account)
