"""Entries of promotions and rollbacks: concurrent, interrupted and repeated ones."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from flows.__main__ import main
from stages.register import ledger as ledger_module
from stages.register import promotion
from stages.register.ledger import Ledger
from stages.register.promotion import promote, roll_back
from stages.register.registry import CHALLENGER, WITHDRAWN, Registry
from stages.runtime.errors import InputError
from stages.runtime.process_identity import describe_process
from tests.register.conftest import NAME, outcomes

pytestmark = pytest.mark.usefixtures("quick_canary")


def test_no_text_forges_a_line_of_the_ledger(publish, policy, registry):
    """Neither a reason given here nor tags that another client wrote: one entry is one line."""
    publish()
    promote(NAME, None, policy, "good\n  99  2026-01-01  promote 1 -> 2: done, by root\x1b[2K")
    entry = Ledger(registry, NAME).entries()[0]
    assert entry.version.tags["espalier.why"].startswith("good\\n  99")
    registry.tag(entry.version, by="root\nroot", checks='[{"name": "a\\nb", "passed": 1, "reason": "\\u001b"}]')
    found = CliRunner().invoke(main, ["ledger", NAME])

    assert found.exit_code == 0
    assert len(found.output.splitlines()) == 1
    assert found.output[:-1].isprintable()
    (check,) = Ledger(registry, NAME).entries()[0].checks
    assert (check.name, check.passed, check.reason) == ("a\\nb", False, "\\x1b")


@pytest.mark.parametrize("registry", ["sqlite", "postgresql"], indirect=True)
def test_of_two_concurrent_promotions_one_yields(publish, policy, aliases, registry, monkeypatch):
    """Both passed the gate against the same champion; one yields in one line, and the ledger holds both."""
    publish()
    promote(NAME, None, policy, None)
    publish(fids=[0.95, 1.0, 0.9])
    publish(fids=[0.9, 1.0, 0.85])
    barrier, run_checks = threading.Barrier(2), promotion.run_checks

    def check_together(*arguments):
        checks = run_checks(*arguments)
        barrier.wait(60)
        return checks

    monkeypatch.setattr(promotion, "run_checks", check_together)
    results = {}

    def run(number):
        try:
            results[number] = "done" if promote(NAME, f"models:/{NAME}/{number}", policy, None).passed else "refused"
        except InputError as error:
            results[number] = error.message

    threads = [threading.Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [number for number, result in results.items() if result == "done"]
    loser = 5 - winner
    assert "nothing was changed" in results[loser]
    assert aliases()["champion"] == winner
    assert aliases()["previous"] == 1
    assert sorted(outcome for *_, outcome in outcomes(registry)[1:]) == ["done", "yielded"]


@pytest.fixture
def die_at(monkeypatch):
    """Interrupt the process before it sets the n-th alias, counted from 0."""

    @contextmanager
    def die(number):
        calls, set_alias = [], Registry.set_alias

        def count(self, *arguments):
            calls.append(arguments)
            if len(calls) > number:
                raise KeyboardInterrupt
            set_alias(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Registry, "set_alias", count)
            yield

    return die


@pytest.fixture
def leave_open(die_at, policy, registry, monkeypatch):
    """Interrupt a promotion before it sets the first alias, as if another process that still runs had begun it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def leave():
        with die_at(0), pytest.raises(KeyboardInterrupt):
            promote(NAME, None, policy, None)
        entry = Ledger(registry, NAME).entries()[0]
        registry.tag(entry.version, process=describe_process(process.pid))
        monkeypatch.setattr(ledger_module, "_left_open", set())

    yield leave
    process.communicate(b"")


def test_an_open_entry_makes_later_ones_yield(publish, policy, aliases, registry, leave_open, monkeypatch):
    """Once its process has ended or its lease is over, the next entry closes it and proceeds."""
    publish()
    leave_open()
    assert aliases() == {"challenger": 1}
    with pytest.raises(InputError, match=r"^entry 1 of tiny \(promote to version 1, by .*\) is in progress;"):
        promote(NAME, None, policy, None)

    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    assert promote(NAME, None, policy, None).passed
    assert [outcome for *_, outcome in outcomes(registry)] == ["broken off", "yielded", "done"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_promotion_is_finished_or_closed(publish, policy, aliases, registry, die_at, monkeypatch, moved):
    """The next entry finishes it if the champion had changed, and closes it otherwise."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    publish()
    with die_at(moved), pytest.raises(KeyboardInterrupt):
        promote(NAME, None, policy, None)
    assert aliases()["champion"] == (4 if moved else 3)

    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    publish()
    promote(NAME, None, policy, None)
    assert aliases() == {"champion": 5, "previous": 4 if moved else 3}
    assert outcomes(registry)[3] == ("promote", "3", "4", "done" if moved else "broken off")
    roll_back(NAME, policy, "to see")
    assert aliases() == {"champion": 4 if moved else 3, "previous": 3 if moved else 2}


@pytest.mark.parametrize("moved", [0, 1])
def test_a_repeated_rollback_goes_back_one_version_only(publish, policy, aliases, registry, die_at, monkeypatch, moved):
    """After an interruption it is done or finished, and no other version is withdrawn."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    with die_at(moved), pytest.raises(KeyboardInterrupt):
        roll_back(NAME, policy, "bad")
    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    if moved:
        with pytest.raises(InputError, match="was interrupted; it is finished now; check the ledger"):
            roll_back(NAME, policy, "bad")
    else:
        roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2, "previous": 1}
    withdrawn = [number for number in (1, 2, 3) if WITHDRAWN in registry.find(f"models:/{NAME}/{number}").tags]
    assert withdrawn == [3]


@pytest.mark.parametrize("uri", [None, f"models:/{NAME}/2"])
@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_promotion_is_repeated_in_the_same_process(publish, policy, aliases, registry, die_at, moved, uri):
    """A flow does so after an outage: it is finished if the champion had changed, and done anew otherwise."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    with die_at(moved), suppress(KeyboardInterrupt):
        promote(NAME, uri, policy, None)
    if moved == 3:  # the aliases were set, and the process ended before the tags
        reopen(registry)
    decision = promote(NAME, uri, policy, None)

    assert decision.passed
    assert decision.message() == f"models:/{NAME}/2 is the champion, replacing models:/{NAME}/1"
    assert "canary" in [check.name for check in decision.checks]
    assert aliases() == {"champion": 2, "previous": 1}
    assert registry.find(f"models:/{NAME}/2").tags["espalier.gate"] == "passed"
    assert [outcome for *_, outcome in outcomes(registry)[1:]] == (["done"] if moved else ["broken off", "done"])
    with pytest.raises(InputError, match="2 is the champion already"):
        promote(NAME, f"models:/{NAME}/2", policy, None)


def reopen(registry):
    """Take back the end of the latest change, as if it had been interrupted before its tags."""
    entry = Ledger(registry, NAME).entries()[0]
    registry.tag(entry.version, outcome="open")
    registry.client.delete_model_version_tag(NAME, entry.to, "espalier.gate")
    ledger_module._left_open.add(entry.nonce)


def test_an_outage_between_the_aliases_leaves_a_rollback_that_is_finished(publish, policy, aliases, registry, die_at):
    """The same process repeats it; no other version is withdrawn."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    with die_at(1), pytest.raises(KeyboardInterrupt):
        roll_back(NAME, policy, "bad")
    with pytest.raises(InputError, match="was interrupted; it is finished now; check the ledger"):
        roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2, "previous": 1}
    assert outcomes(registry)[-1] == ("rollback", "3", "2", "done")


def test_a_promotion_that_yielded_is_not_left_open(publish, policy, registry, leave_open):
    """It closes its entry itself, so that no other may take it for dead."""
    publish()
    leave_open()
    with pytest.raises(InputError, match="is in progress"):
        promote(NAME, None, policy, None)

    assert ledger_module._left_open == set()
    assert [outcome for *_, outcome in outcomes(registry)] == ["open", "yielded"]


def test_a_lease_is_measured_by_the_clock_of_the_server(publish, policy, aliases, registry, leave_open, monkeypatch):
    """A rollback from a machine whose clock is a day ahead closes no entry that is in progress."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    publish()
    leave_open()
    ahead = SimpleNamespace(time=lambda: time.time() + 86400, monotonic=time.monotonic)
    monkeypatch.setattr(ledger_module, "time", ahead)

    with pytest.raises(InputError, match="is in progress; nothing was changed"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    assert outcomes(registry)[2] == ("promote", "2", "3", "open")


def test_the_time_of_the_server_keeps_what_a_model_says(registry):
    """It is an update of the model, whose description stays."""
    registry.create_model(NAME)
    registry.client.update_registered_model(NAME, "ours")
    begin = time.time()
    now = registry.now_ms(NAME) / 1000

    assert begin - 1 < now < time.time() + 1
    assert registry.client.get_registered_model(NAME).description == "ours"


def test_entries_are_read_before_the_champion(publish, policy, aliases, monkeypatch):
    """An entry that is done between the two reads has changed the champion before the second."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    publish()
    entries, calls = Ledger.entries, []

    def be_overtaken(self):
        found = entries(self)
        calls.append(None)
        if len(calls) == 2:  # the first call settles dead entries, before the checks
            promote(NAME, f"models:/{NAME}/2", policy, None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "entries", be_overtaken)
        patch.setattr(ledger_module, "has_ended", lambda _: True)
        with pytest.raises(InputError, match="became version 2, and the checks compared with 1"):
            promote(NAME, f"models:/{NAME}/3", policy, None)
    assert aliases()["champion"] == 2


def test_an_entry_that_was_written_twice_does_not_block_itself(publish, policy, aliases, registry, monkeypatch):
    """The client repeats a request whose answer was lost; both entries have one nonce."""
    create = Registry.create

    def create_twice(self, *arguments):
        create(self, *arguments)
        return create(self, *arguments)

    publish()
    monkeypatch.setattr(Registry, "create", create_twice)
    assert promote(NAME, None, policy, None).passed
    assert aliases() == {"champion": 1}
    assert [outcome for *_, outcome in outcomes(registry)] == ["yielded", "done"]


def test_a_promotion_that_was_taken_for_dead_changes_nothing(publish, policy, aliases, monkeypatch):
    """Its machine slept for longer than the lease, and another process closed its entry meanwhile."""
    publish()
    write = Ledger.write

    def write_and_lose(self, *arguments):
        entry = write(self, *arguments)
        self._close(entry, "broken off")
        return entry

    monkeypatch.setattr(Ledger, "write", write_and_lose)
    with pytest.raises(InputError, match="another process took this entry for dead and closed it; nothing was changed"):
        promote(NAME, None, policy, None)
    assert aliases() == {"challenger": 1}


def test_a_promotion_that_the_registry_delays_changes_nothing(publish, policy, aliases, registry, monkeypatch):
    """Its checks are too old by then."""
    publish()
    monkeypatch.setattr(ledger_module, "TIMEOUT_S", 0)
    with pytest.raises(InputError, match="the registry took longer than 0 s to answer; nothing was changed, retry"):
        promote(NAME, None, policy, None)

    assert aliases() == {"challenger": 1}
    assert [outcome for *_, outcome in outcomes(registry)] == ["yielded"]


def test_a_version_registered_during_a_promotion_is_the_challenger(publish, policy, aliases, registry, monkeypatch):
    """The newest without a decision; its alias is set between the look at that of the promoted one and its removal."""
    publish()
    set_alias, done = Registry.set_alias, []

    def set_and_register(self, name, alias, number):
        if alias == CHALLENGER and number is None and not done:
            done.append(True)
            *_, refused = [publish(fids=[0.9, 1.0, 0.85]) for _ in range(3)]
            registry.tag(refused, gate="refused")
        set_alias(self, name, alias, number)

    monkeypatch.setattr(Registry, "set_alias", set_and_register)
    assert promote(NAME, None, policy, None).passed

    assert done
    assert {name: aliases()[name] for name in ("champion", "challenger")} == {"champion": 1, "challenger": 3}
