"""What a nightly run does with a version that an earlier run registered: it reads aliases and the ledger."""

from types import SimpleNamespace

import pytest

from flows.nightly import find_decision
from flows.tasks.notifications import REFUSED
from stages.register import ledger, registry
from stages.register.policy import Check

URI = "models:/a/3"


@pytest.fixture
def decide(monkeypatch):
    """Find the decision on version 3, with a champion and a ledger: acts of (kind, version, outcome, checks)."""

    def run(champion, *acts):
        def make_registry():
            return SimpleNamespace(
                find=lambda _uri: SimpleNamespace(name="a", version="3", tags={"espalier.gate": "refused: a lie"}),
                by_alias=lambda _name, _alias: champion and SimpleNamespace(version=champion),
            )

        found = [
            SimpleNamespace(kind=kind, to=version, outcome=outcome, checks=checks)
            for kind, version, outcome, checks in acts
        ]
        monkeypatch.setattr(registry, "Registry", make_registry)
        monkeypatch.setattr(ledger, "Ledger", lambda _registry, _name: SimpleNamespace(acts=lambda: found))
        return find_decision(URI)

    return run


def test_a_champion_stays(decide):
    """Nothing is to be decided on the version that is the champion."""
    assert decide("3") == ("Completed", f"nothing has changed, {URI} is the champion already")


def test_a_refusal_stands(decide):
    """The newest decision on this version counts, and its failed checks are the reason."""
    checks = [Check("fid", passed=False, reason="too high; refused"), Check("macs", passed=True, reason="fine")]
    name, message = decide("2", ("promote", "4", "done", []), ("promote", "3", "refused", checks))

    assert name == REFUSED
    assert message == f"nothing has changed since {URI} was refused: fid: too high; refused"


@pytest.mark.parametrize(
    "acts",
    [
        [],
        [("promote", "2", "refused", [])],
        [("rollback", "3", "refused", [])],
        [("promote", "3", "broken off", []), ("promote", "3", "refused", [])],
    ],
)
def test_other_acts_decide_nothing(decide, acts):
    """Acts on other versions and interrupted ones leave the decision open, whatever a tag states."""
    assert decide("2", *acts) is None
