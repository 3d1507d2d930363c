"""How a nightly run finds what an earlier run decided on the version that it registered."""

from types import SimpleNamespace

import pytest

from flows.nightly import find_decision
from flows.tasks.notifications import REFUSED
from stages.register import registry

URI = "models:/a/3"


@pytest.fixture
def decide(monkeypatch):
    """Find the decision on version 3, with a champion and tags on the version."""

    def run(champion, **tags):
        named = {f"espalier.{name}": value for name, value in tags.items()}
        found = SimpleNamespace(name="a", version="3", tags=named)
        client = SimpleNamespace(
            find=lambda _uri: found,
            by_alias=lambda _name, _alias: champion and SimpleNamespace(version=champion),
        )
        monkeypatch.setattr(registry, "Registry", lambda: client)
        return find_decision(URI)

    return run


def test_a_champion_stays(decide):
    """The version that is the champion needs no decision."""
    assert decide("3") == ("Completed", f"nothing has changed, {URI} is the champion already")


def test_a_refusal_stands(decide):
    """The gate's tags hold the decision and its reason."""
    name, message = decide("2", gate="refused", gate_reason="fid: too high; passed")

    assert name == REFUSED
    assert message == f"nothing has changed since {URI} was refused: fid: too high; passed"


@pytest.mark.parametrize("tags", [{}, {"gate": "passed"}, {"gate_reason": "refused"}, {"gate": "refused long ago"}])
def test_anything_else_decides_nothing(decide, tags):
    """Only the word refused is a refusal, whatever a reason says."""
    assert decide("2", **tags) is None
