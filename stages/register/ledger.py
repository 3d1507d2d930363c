"""Promotions and rollbacks of a model -> numbered entries in the registry, which also decide between concurrent ones.

The ledger of the model NAME is the registered model NAME.promotions; each of its versions is one entry. The server
gives every entry another number, so of several concurrent entries the oldest proceeds and the others yield. An entry
is written before the aliases change and holds their new values, so that a later entry can finish an interrupted one.
"""

import time
import uuid

from stages.register.ledger_entry import NONE, LedgerEntry, Outcome, PlannedChange, entry_tags, read_entry
from stages.register.registry import CHALLENGER, CHAMPION, GATE, PASSED, PREVIOUS, WITHDRAWN, Registry, check_name
from stages.runtime.errors import InputError
from stages.runtime.process_identity import has_ended

LEASE_S = 1200
"""Age from which an open entry of an invisible process counts as dead; longer than all retries of a call."""
TIMEOUT_S = 300
"""An entry yields if it could not change the champion within this time."""
SUFFIX = ".promotions"
MAX_DESCRIPTION = 5000
"""Longest description that MLflow accepts, in characters."""
_left_open: set[str] = set()
"""Nonces of this process's entries whose change ended without closing them; adding to a set is safe for threads."""


class Ledger:
    """The ledger of one model.

    Args:
        registry: The registry that holds it.
        name: Name of the model.

    Raises:
        InputError: MLflow takes no such name.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        check_name(name)
        self.registry, self.name = registry, name

    def entries(self) -> list[LedgerEntry]:
        """List all entries, the newest first."""
        return [read_entry(version) for version in self.registry.versions(f"{self.name}{SUFFIX}")]

    def write(self, change: PlannedChange, outcome: Outcome, nonce: str | None = None) -> LedgerEntry:
        """Write an entry, without changing any alias; None gives it a new nonce."""
        text = "\n".join(f"- {'✓' if check.passed else '✗'} {check.name}: {check.reason}" for check in change.checks)
        tags = entry_tags(change, outcome, nonce or uuid.uuid4().hex)
        source = f"models:/{self.name}/{change.to.version}"
        return read_entry(self.registry.create(f"{self.name}{SUFFIX}", source, None, tags, text[:MAX_DESCRIPTION]))

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
            self._restore_challenger(int(entry.to))
        if entry.kind == "rollback":
            withdrawn = self.registry.find(f"models:/{self.name}/{entry.start}")
            self.registry.tag(withdrawn, withdrawn=f"by {entry.by} at {entry.at}: {entry.why}")
        else:
            promoted = self.registry.find(f"models:/{self.name}/{entry.to}")
            self.registry.tag(promoted, gate=PASSED, gate_reason="every check passed")
        self._close(entry, "done")

    def _restore_challenger(self, number: int) -> None:
        """Make the newest version behind `number` the challenger, if it was registered while the alias was deleted."""
        newer = [it for it in self.registry.versions(self.name) if int(it.version) > number and GATE not in it.tags]
        if newer:
            self.registry.set_alias(self.name, CHALLENGER, str(max(int(it.version) for it in newer)))

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


def _is_dead(entry: LedgerEntry, now_ms: float) -> bool:
    """Return whether no process works on an open entry any more, as far as this one can know."""
    if entry.nonce in _left_open:
        return True
    return now_ms - entry.version.creation_timestamp > 1000 * LEASE_S or has_ended(entry.process)
