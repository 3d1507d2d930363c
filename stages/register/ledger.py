"""Acts on a model -> a numbered ledger in the registry, which is also the queue of those who act.

The ledger of a model NAME is the registered model NAME.promotions; each of its versions is one act. The server numbers
them, no two alike, so of several at once the oldest goes on and the others yield.
"""

import getpass
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from stages.errors import InputError
from stages.register.policy import Check
from stages.register.registry import CHAMPION, Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

LEASE_S = 120
"""After this long an open act counts as broken off; one that is alive gives up after half of it."""
NONE = "none"
Kind = Literal["promote", "rollback"]
Outcome = Literal["open", "done", "refused", "yielded", "broken off"]
FIELDS = ("act", "outcome", "from", "to", "by", "at", "why", "checks")
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
    by: str
    at: str
    """In ISO 8601, by the clock of the one who acted."""
    why: str
    checks: list[Check]

    @property
    def number(self) -> int:
        """Its place in the ledger."""
        return int(self.version.version)


class Ledger:
    """The ledger of one model.

    Args:
        registry: Where it is kept.
        name: The model.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name, self.place = registry, name, f"{name}.promotions"

    def acts(self) -> list[Act]:
        """Read all acts, the newest first."""
        return [_read(version) for version in self.registry.versions(self.place)]

    def open(
        self, kind: Kind, start: "ModelVersion | None", to: "ModelVersion", why: str, checks: Sequence[Check]
    ) -> Act:
        """Write an act down before it happens: who, when, why, from what, to what."""
        values = {
            "act": kind,
            "outcome": "open",
            "from": str(start.version) if start else NONE,
            "to": str(to.version),
            "by": _who(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "why": why,
            "checks": json.dumps([asdict(check) for check in checks]),
        }
        text = "\n".join(f"- {'✓' if check.passed else '✗'} {check.name}: {check.reason}" for check in checks)
        tags = {f"espalier.{key}": values[key] for key in FIELDS}
        source = f"models:/{to.name}/{to.version}"
        return _read(self.registry.create(self.place, source, None, tags, text[:LONGEST_TEXT]))

    def enter(self, act: Act) -> None:
        """Let an act go on, if no older one is at work and the champion is still the one that it began with.

        Raises:
            InputError: It must yield, and is closed as such.
        """
        try:
            self._look_around(act)
        except InputError:
            self.close(act, "yielded")
            raise

    def _look_around(self, act: Act) -> None:
        begin, champion = time.monotonic(), self.registry.by_alias(self.name, CHAMPION)
        now = str(champion.version) if champion else NONE
        for other in self.acts():
            if other.number < act.number and other.outcome == "open":
                if act.version.creation_timestamp - other.version.creation_timestamp < 1000 * LEASE_S:
                    found = f"{other.by} is at work on {self.name} since {other.at} ({other.kind} to {other.to})"
                    raise InputError(f"{found}; nothing was changed, look at the outcome and try again")
                self.close(other, "done" if other.to == now else "broken off")
        if now != act.start:
            found = f"the champion of {self.name} became version {now} while this was decided against {act.start}"
            raise InputError(f"{found}; nothing was changed, decide again")
        if time.monotonic() - begin > LEASE_S / 2:
            raise InputError(f"the registry took longer than {LEASE_S / 2:.0f} s to answer; try again")

    def close(self, act: Act, outcome: Outcome) -> None:
        """Write down how an act ended."""
        self.registry.tag(act.version, outcome=outcome)

    def before(self, number: str) -> str | None:
        """Find who was champion before a version became it; None where nobody was."""
        for act in self.acts():
            if (act.kind, act.outcome, act.to) == ("promote", "done", number):
                return None if act.start == NONE else act.start
        return None


def _read(version: "ModelVersion") -> Act:
    tags = {key: version.tags.get(f"espalier.{key}", "") for key in FIELDS}
    return Act(
        version=version,
        kind=tags["act"],
        outcome=tags["outcome"],
        start=tags["from"],
        to=tags["to"],
        by=tags["by"],
        at=tags["at"],
        why=tags["why"],
        checks=[Check(**check) for check in json.loads(tags["checks"] or "[]")],
    )


def _who() -> str:
    here = f"{getpass.getuser()}@{socket.gethostname()}"
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return f"{user} ({here})" if user else here
