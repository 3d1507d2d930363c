"""KEY=VALUE -> params.yaml, checked, with its comments."""

import pytest
from hypothesis import given, strategies
from ruamel.yaml import YAML

from flows.workspaces.grid import combine
from flows.workspaces.overrides import apply, parse_grid, parse_overrides
from stages.runtime.errors import InputError


def read(root, *texts):
    """Apply overrides to the project's own params."""
    return YAML(typ="safe").load(apply(parse_overrides(texts), root / "params.yaml").decode())


def test_nothing_else_changes(root):
    """Overrides of values that stand there already leave every key, order and comment as it is."""
    before = (root / "params.yaml").read_text()
    after = apply({"finetune.steps": 450, "prune.target.ratio": 0.3}, root / "params.yaml").decode()

    assert YAML(typ="safe").load(after) == YAML(typ="safe").load(before)
    assert [line for line in after.splitlines() if line.startswith("#")] == [
        line for line in before.splitlines() if line.startswith("#")
    ]


def test_a_choice_replaces_the_one_that_it_excludes(root):
    """Targets exclude each other, and a source has keys of its own: both blocks are replaced, and nothing else."""
    found = read(root, "prune.target.macs=0.5", "finetune.steps=7", "fetch.model.source=folder", "fetch.model.path=/m")

    assert found["prune"]["target"] == {"macs": 0.5}
    assert found["prune"]["order"] == "interleaved"
    assert found["finetune"]["steps"] == 7
    assert found["fetch"]["model"] == {"source": "folder", "path": "/m"}
    assert found["fetch"]["data"] == {"source": "bundled", "name": "digits"}


def test_the_same_source_keeps_its_other_keys(root):
    """A block is replaced only if the source becomes another one."""
    assert read(root, "fetch.model.source=bundled")["fetch"]["model"] == {"source": "bundled", "name": "digits"}
    assert read(root, "prune.target.ratio=0.2")["prune"]["target"] == {"ratio": 0.2}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["prune.tarjet.macs=1"], "prune.tarjet is not a known key"),
        (["nothing=1"], "nothing is not a known key"),
        (["seed.x=1"], "seed: input should be a valid integer"),
        (["finetune.steps=1.5"], "finetune.steps is 1.5"),
        (["finetune.steps=many"], "finetune.steps is 'many'"),
        (["prune.target.macs=56%", "prune.target.ratio=0.3"], "give exactly one of ratio, macs, params, latency_ms"),
        (["finetune.steps"], "is not KEY=VALUE"),
        (["=1"], "is not KEY=VALUE"),
        (["finetune.steps=[1"], "is not valid YAML"),
        (["finetune.steps=1", "finetune.steps=2"], "is given twice"),
        (["seed=2026-01-01"], "--set seed is not a number, text, switch, list or block of these"),
        (["a.b.c.d.e.f.g.h.i.j=1"], r"'a\.b\..*' is not a key of params.yaml; keys have at most 9 parts"),
    ],
)
def test_what_is_not_allowed_is_one_line(root, texts, message):
    """It names the key, and nothing is written."""
    with pytest.raises(InputError, match=message) as found:
        read(root, *texts)
    assert len(found.value.message.splitlines()) == 1


@given(
    strategies.dictionaries(
        strategies.sampled_from("abc"), strategies.lists(strategies.integers(), min_size=1, max_size=6)
    )
)
def test_a_grid_has_each_combination_once(grid):
    """The number of cells is the product of the numbers of different values."""
    if not grid:
        return
    cells = combine(grid)
    expected = 1
    for values in grid.values():
        expected *= len(set(values))
    assert len(cells) == expected == len({tuple(cell.items()) for cell in cells})


@pytest.mark.parametrize("texts", [[], ["a="], ["a=[]"]])
def test_a_grid_without_cells_is_refused(texts):
    """Nothing to do is a mistake."""
    with pytest.raises(InputError, match="the grid has no cells"):
        combine(parse_grid(texts))


def test_a_grid_reads_lists_and_commas():
    """Both notations are read, with values of any type."""
    found = parse_grid(["prune.target.macs=44%,0.5", "prune.compensate=[null, {num_images: 2}]"])
    assert found == {"prune.target.macs": ["44%", 0.5], "prune.compensate": [None, {"num_images": 2}]}
