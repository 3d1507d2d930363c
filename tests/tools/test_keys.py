"""The list of the keys of params.yaml."""

import pytest
from click.testing import CliRunner

from flows.initialise import init
from stages.params import Params
from stages.runtime.errors import InputError
from stages.runtime.suggest import known_keys
from stages.tools.initialise.keys import list_keys


def test_every_key_is_listed_with_a_meaning():
    """What it may be and what it is for; a block whose keys follow needs no words of its own, nor does a source."""
    known = known_keys(Params)
    for block in Params.model_fields:
        lines = [*list_keys(block).splitlines(), ""]
        heads = [at for at, line in enumerate(lines[:-1]) if not line.startswith(" ")]
        listed = {at: lines[at].partition(":")[0].partition(" (")[0] for at in heads}
        assert {*listed.values()} == {key for key in known if key == block or key.startswith(f"{block}.")}
        for at, key in listed.items():
            is_block = any(other.startswith(f"{key}.") for other in known)
            assert is_block or key.endswith(".source") or lines[at + 1].startswith("    "), key


def test_a_key_says_its_kind_its_default_and_its_meaning():
    """Bounds and choices too; of a source those keys that it has."""
    text = list_keys("finetune")

    assert "finetune.steps: a whole number from 1; required" in text
    assert "finetune.schedule: one of " in text
    assert "fetch.model.path (source folder): a path; required" in list_keys("fetch")
    head, meaning, *_ = list_keys("prune.target.ratio").splitlines()
    assert head == "prune.target.ratio: a number from 0 below 1 or null; null by default"
    assert meaning.startswith("    Share of the channels to remove; with ranking uniform, of every group")
    sha256 = "fetch.model.sha256 (source folder): a text that matches ^[0-9a-f]{64}$ or null; null by default"
    assert sha256 in list_keys("fetch")


def test_a_key_that_does_not_exist_is_refused_with_the_nearest():
    """Below init, which then writes nothing and asks for nothing else."""
    with pytest.raises(InputError, match=r"prune\.ratio is no key of params\.yaml; choose prune\.target\.ratio"):
        list_keys("prune.ratio")
    result = CliRunner().invoke(init, ["--keys", "costs"])
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "costs: a block, {} for its defaults; required")
