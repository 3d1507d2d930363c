"""Back to the previous champion, and what was withdrawn stays so."""

from pathlib import Path

import pytest

from stages.register import promotion
from stages.register.promotion import promote, roll_back
from stages.register.registry import WITHDRAWN
from stages.runtime.errors import InputError
from tests.register.conftest import NAME, outcomes, refusals

pytestmark = pytest.mark.usefixtures("quick_canary")


def test_rollback_restores_the_previous_champion(publish, policy, aliases, registry):
    """The replaced one is withdrawn and refused from then on; rollbacks can be repeated up to the first champion."""
    for _ in range(3):
        publish()
        assert promote(NAME, None, policy, None).passed
    roll_back(NAME, policy, "it draws sevens as ones")
    assert aliases() == {"champion": 2, "previous": 1}
    assert "it draws sevens as ones" in registry.find(f"models:/{NAME}/3").tags["espalier.withdrawn"]

    decision = promote(NAME, f"models:/{NAME}/3", policy, None)
    assert "it draws sevens as ones; delete its tag" in refusals(decision)["not withdrawn"]

    roll_back(NAME, policy, "worse still")
    assert aliases() == {"champion": 1}
    with pytest.raises(InputError, match="has no version with the alias previous"):
        roll_back(NAME, policy, "once more")
    assert outcomes(registry) == [
        ("promote", "none", "1", "done"),
        ("promote", "1", "2", "done"),
        ("promote", "2", "3", "done"),
        ("rollback", "3", "2", "done"),
        ("promote", "2", "3", "refused"),
        ("rollback", "2", "1", "done"),
    ]


@pytest.mark.parametrize(
    ("promoted", "previous"), [([1, 2, 1], None), ([1, 2, 3, 2], 1), ([1, 2, 1, 2], None), ([1, 2, 3, 1, 3], 2)]
)
def test_no_rollback_leads_to_a_withdrawn_version(publish, policy, aliases, registry, promoted, previous):
    """The new previous champion is the latest before it that is neither withdrawn nor the champion itself."""
    for number in range(1, max(promoted) + 1):
        publish()
        assert int(registry.find(f"models:/{NAME}@challenger").version) == number
    for number in promoted:
        assert promote(NAME, f"models:/{NAME}/{number}", policy, None).passed
    roll_back(NAME, None, "bad")

    expected = {"champion": promoted[-2]} | ({"previous": previous} if previous else {})
    assert {name: number for name, number in aliases().items() if name != "challenger"} == expected
    if previous is None:
        with pytest.raises(InputError, match="has no version with the alias previous"):
            roll_back(NAME, None, "worse still")


def test_a_rollback_to_a_withdrawn_version_is_refused(publish, policy, aliases, registry):
    """The line names the tag, which somebody has to delete first; no alias is changed and no entry written."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    version = registry.find(f"models:/{NAME}/1")
    registry.tag(version, withdrawn="by me at noon: it draws sevens\nas ones")
    with pytest.raises(InputError) as refused:
        roll_back(NAME, policy, "bad")

    assert refused.value.message == (
        f"models:/{NAME}/1, the previous champion, was itself rolled back by me at noon: it draws sevens\\nas ones; "
        "promote another version, or delete its tag espalier.withdrawn to go back to it"
    )
    assert aliases() == {"champion": 2, "previous": 1}
    assert len(outcomes(registry)) == 2
    registry.client.delete_model_version_tag(NAME, version.version, WITHDRAWN)
    roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 1}


def test_a_version_that_is_withdrawn_during_a_rollback_stays_so(publish, policy, aliases, registry, monkeypatch):
    """The tag is read again once the entry is written."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    check_samples = promotion._check_samples

    def check_slowly(*arguments):
        registry.tag(registry.find(f"models:/{NAME}/1"), withdrawn="by another")
        return check_samples(*arguments)

    monkeypatch.setattr(promotion, "_check_samples", check_slowly)
    with pytest.raises(InputError, match="version 1 of tiny was rolled back meanwhile; nothing was changed"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1}


def test_a_version_that_was_withdrawn_during_the_checks_is_refused(publish, policy, aliases, monkeypatch):
    """Another process promoted it and rolled it back meanwhile."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    run_checks = promotion.run_checks

    def check_slowly(*arguments):
        checks = run_checks(*arguments)
        monkeypatch.setattr(promotion, "run_checks", run_checks)
        promote(NAME, f"models:/{NAME}/2", policy, None)
        roll_back(NAME, policy, "bad")
        return checks

    monkeypatch.setattr(promotion, "run_checks", check_slowly)
    with pytest.raises(InputError, match="was rolled back meanwhile"):
        promote(NAME, f"models:/{NAME}/2", policy, None)
    assert aliases() == {"champion": 1}


def test_a_deleted_version_does_not_block_a_rollback(publish, policy, aliases, registry):
    """After it there is no previous champion, since the one before was deleted."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    registry.remove(registry.find(f"models:/{NAME}/1"))
    roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2}


def test_a_rollback_without_policy_runs_no_canary(publish, policy, aliases, registry):
    """In an emergency the previous champion may be one that this machine cannot load; a reason is still needed."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    (Path(registry.find(f"models:/{NAME}/1").source) / "draw.py").unlink()
    with pytest.raises(InputError, match="tampered with"):
        roll_back(NAME, policy, "on fire")
    roll_back(NAME, None, "on fire")

    assert aliases() == {"champion": 1}
    with pytest.raises(InputError, match="needs a reason"):
        roll_back(NAME, None, " ")
