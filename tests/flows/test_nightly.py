"""How a nightly run finds what an earlier run decided on the version that it registered."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from flows.nightly import find_decision
from flows.tasks.notifications import REFUSED
from stages.register.ledger import Ledger
from stages.register.ledger_entry import PlannedChange
from stages.register.registry import CHAMPION, PREVIOUS, Registry
from tests.flows.test_outcome import prefect

__all__ = ["prefect"]
NAME, URI = "a", "models:/a/3"
nightly_module = sys.modules["flows.nightly"]


@pytest.fixture
def registry(mlflow_database, tmp_path):  # noqa: ARG001  # in a variable of the environment
    """A registry with the versions 1 to 3 of a model."""
    registry = Registry()
    for _ in range(3):
        registry.create(NAME, str(tmp_path), None, {}, "")
    return registry


@pytest.fixture
def decide(registry):
    """Find the decision on version 3, with a champion and tags on the version."""

    def run(champion, **tags):
        registry.set_alias(NAME, CHAMPION, champion)
        registry.tag(registry.find(URI), **tags)
        return find_decision(URI)

    return run


@pytest.fixture
def change(registry):
    """Promote a version without any check, or roll back to one; the ledger and the tags hold it."""

    def run(number, kind="promote"):
        champion, version = registry.by_alias(NAME, CHAMPION), registry.find(f"models:/{NAME}/{number}")
        previous = str(champion.version) if champion and kind == "promote" else None
        Ledger(registry, NAME).execute(PlannedChange(kind, champion, version, previous, "to see", [], ""))

    return run


def test_a_champion_stays(decide):
    """The version that is the champion needs no decision."""
    assert decide("3") == ("Completed", f"nothing has changed, {URI} is the champion already")


def test_an_interrupted_promotion_is_finished(registry, change, monkeypatch):
    """The run before ended between two aliases: the version stays champion, and can be rolled back."""
    change(2)
    set_alias = Registry.set_alias

    def stop_after_champion(self, name, alias, number):
        if alias != CHAMPION:
            raise KeyboardInterrupt
        set_alias(self, name, alias, number)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", stop_after_champion)
        with pytest.raises(KeyboardInterrupt):
            change(3)
    assert registry.by_alias(NAME, PREVIOUS) is None

    assert find_decision(URI) == ("Completed", f"nothing has changed, {URI} is the champion already")
    assert registry.by_alias(NAME, PREVIOUS).version == 2
    assert [entry.outcome for entry in Ledger(registry, NAME).entries()] == ["done", "done"]


def test_a_refusal_stands(decide):
    """The gate's tags hold the decision and its reason."""
    name, message = decide("2", gate="refused", gate_reason="fid: too high; passed")

    assert name == REFUSED
    assert message == f"nothing has changed since {URI} was refused: fid: too high; passed"


@pytest.mark.parametrize("tags", [{}, {"gate_reason": "refused"}, {"gate": "refused long ago"}])
def test_anything_else_decides_nothing(decide, tags):
    """Only the word refused is a refusal, whatever a reason says."""
    assert decide("2", **tags) is None


@pytest.mark.parametrize(("replacing", "successor"), [([2], 2), ([2, 1], 2), ([2, 3, 1], 1)])
def test_a_champion_that_was_replaced_is_decided(change, replacing, successor):
    """Whoever promoted the next one did so although this one was the champion; nothing has changed since."""
    change(3)
    for number in replacing:
        change(number)

    found = f"nothing has changed; {URI} was the champion and was replaced by models:/{NAME}/{successor}"
    assert find_decision(URI) == ("Completed", found)


def test_an_alias_that_was_moved_by_hand_replaces_a_champion(decide):
    """The ledger has no entry of it; the tags hold that the version had passed."""
    found = f"nothing has changed; {URI} was the champion and was replaced by models:/{NAME}/2"
    assert decide("2", gate="passed") == ("Completed", found)


def test_a_withdrawn_version_is_left_to_the_gate(registry, change):
    """It refuses the version with the reason of the rollback; without the tag, a user decides."""
    change(2)
    change(3)
    change(2, "rollback")
    assert registry.by_alias(NAME, PREVIOUS) is None
    assert find_decision(URI) is None
    registry.client.delete_model_version_tag(NAME, "3", "espalier.withdrawn")

    assert find_decision(URI) == (
        "Completed",
        f"nothing has changed; {URI} was the champion and was replaced by models:/{NAME}/2",
    )


@pytest.mark.usefixtures("prefect")
def test_a_policy_that_is_missing_is_noticed_before_the_compression(monkeypatch, tmp_path):
    """No stage runs for hours to find it."""

    @contextmanager
    def opened(*_):
        yield SimpleNamespace(path=tmp_path, commit="0" * 40)

    ran = []
    monkeypatch.setattr(nightly_module, "open_workspace", opened)
    monkeypatch.setattr(nightly_module, "bring_up_to_date", lambda *_: ran.append("stages"))
    state = nightly_module.nightly(policy="mlflow/promtion.yaml", return_state=True)

    assert state.is_failed()
    assert "promtion.yaml: No such file or directory" in state.message
    assert ran == []
