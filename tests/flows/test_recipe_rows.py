"""A preset -> the cells that show what recovery costs: equal but for recipe and seed."""

import pytest
from ruamel.yaml import YAML

from flows.workspaces.recipe_rows import RECIPES, parse_recipes, parse_steps, plan_curve
from flows.workspaces.repository import ParamsSource
from stages.finetune.params import MuonParams
from stages.params import Params, load_params
from stages.prune.params import CompensateParams
from stages.runtime.errors import InputError
from tests.flows.test_method_rows import PRESETS, repository
from tests.servers import ROOT

__all__ = ["repository"]
PRESET, QUICK = ROOT / "recipes" / "presets", ("digits", "imagenet-ldm")


@pytest.fixture
def plan(repository):
    """Plan curves: the cells, with the params of each."""

    def do(preset="digits", names=None, seeds=(0, 1), steps=None, recipes=None, overrides=None):
        source = ParamsSource(repository.resolve("HEAD", print), preset)
        cells = plan_curve(repository, source, names, seeds, steps, recipes or {}, overrides or {})
        texts = repository.render(source, [cell.overrides for cell in cells])
        return cells, [Params.model_validate(YAML(typ="safe").load(text.decode())) for text in texts]

    return do


@pytest.mark.parametrize("preset", [pytest.param(it, marks=[pytest.mark.e2e] * (it not in QUICK)) for it in PRESETS])
def test_every_recipe_is_allowed_for_every_preset(plan, preset):
    """All cells of a seed prune alike and are measured at the same steps; the last is the preset's own."""
    cells, params = plan(preset, seeds=[3])

    assert [cell.about["row"] for cell in cells] == list(RECIPES)
    assert len({str((it.fetch, it.reference, it.importance, it.prune, it.finetune.snapshots)) for it in params}) == 1
    assert {it.seed for it in params} == {3}
    assert params[0].prune.compensate is None
    first = params[0].finetune
    assert {it.finetune.steps for it in params} == {load_params(PRESET / f"{preset}.yaml").finetune.steps}
    assert [*first.snapshots] == [round(first.steps / it) for it in (16, 8, 4, 2)]


def test_recipes_are_what_their_names_state(plan):
    """Losses, fresh weights and EMAs; a loss that a name leaves out is off, whatever the preset has."""
    cells, params = plan(seeds=[0])
    found = {cell.about["row"]: it.finetune for cell, it in zip(cells, params, strict=True)}
    losses = {name: (it.loss.noise, it.loss.output, it.loss.feature) for name, it in found.items()}

    assert losses == {
        "noise": (1, 0, 0),
        "noise+output": (1, 1, 0),
        "output": (0, 1, 0),
        "output+feature": (0, 1, 0.1),
        "output+feature+muon": (0, 1, 0.1),
        "scratch": (1, 0, 0),
    }
    assert [name for name, it in found.items() if it.init == "scratch"] == ["scratch"]
    assert [name for name, it in found.items() if it.ema_decays == (0.9999,)] == ["noise", "scratch"]
    assert {it.ema_decays for name, it in found.items() if "output" in name} == {(0.9, 0.95, 0.9999)}
    assert [name for name, it in found.items() if it.muon] == ["output+feature+muon"]


def test_muon_has_the_presets_rate(plan):
    """Or twice Adam's, beside a preset that uses Adam alone."""
    (_, (given,)), (_, (default,)) = (plan(it, ["output+feature+muon"], [0]) for it in ("digits", "cifar10"))

    assert given.finetune.muon == load_params(PRESET / "digits.yaml").finetune.muon
    assert default.finetune.muon == MuonParams(learning_rate=2 * default.finetune.learning_rate)


def test_rows_steps_and_recipes_are_those_given(plan):
    """In the order of the rows, which decides what is compared with; a new recipe has its own losses and Muon alone."""
    recipes = parse_recipes(["mine={finetune.loss.output: 2, finetune.learning_rate: 0.001}"])
    cells, params = plan(
        names=["output", "mine"], seeds=[5], steps=[10, 30], recipes=recipes, overrides={"fetch.heldout": 0.3}
    )
    output, mine = (it.finetune for it in params)

    assert [cell.label for cell in cells] == ["output, seed 5", "mine, seed 5"]
    assert {(it.steps, it.snapshots) for it in (output, mine)} == {(30, (10,))}
    assert (mine.loss.noise, mine.loss.output, mine.loss.feature, mine.learning_rate) == (0, 2, 0, 0.001)
    assert mine.muon is None
    assert {it.fetch.heldout for it in params} == {0.3}


def test_a_recipe_may_compensate_the_cut_before_it(plan):
    """All others train the model as it was cut, whatever the preset does."""
    compensate = {"num_images": 4, "num_timesteps": 5, "damping": 0.1}
    recipes = {
        "mine": {"finetune.loss": {"noise": 1}, "prune.compensate": compensate},
        "other": {"finetune.loss.output": 1},
    }
    cells, params = plan(names=["noise"], seeds=[0], recipes=recipes)
    found = {cell.about["row"]: it.prune.compensate for cell, it in zip(cells, params, strict=True)}

    assert found.pop("mine") == CompensateParams(**compensate)
    assert found == {"noise": None, "other": None}
    with pytest.raises(
        InputError, match=r"--recipe a sets prune\.compensate\.damping; a recipe sets prune\.compensate or"
    ):
        parse_recipes(["a={prune.compensate.damping: 1}"])


def test_what_is_set_is_checked_with_the_steps_of_the_trainings(plan):
    """A warm-up may be longer than the preset's own training."""
    _, params = plan(names=["noise"], seeds=[0], steps=[500, 1000], overrides={"finetune.warmup_steps": 600})

    assert [(it.finetune.warmup_steps, it.finetune.steps) for it in params] == [(600, 1000)]


@pytest.mark.parametrize(("names", "rows"), [(["noise"], ["noise", "mine"]), (["mine", "noise"], ["mine", "noise"])])
def test_a_recipe_is_a_row_whether_it_is_named_among_them_or_not(plan, names, rows):
    """It comes last unless the rows place it."""
    cells, _ = plan(names=names, seeds=[0], recipes=parse_recipes(["mine={finetune.loss.output: 2}"]))

    assert [cell.about["row"] for cell in cells] == rows


def test_names_of_recipes_are_no_keys():
    """One may be the beginning of another."""
    texts = ["v1={finetune.loss.output: 1}", "v1.5={finetune.loss: {output: 1}, finetune.loss.feature: 2}"]
    assert list(parse_recipes(texts)) == ["v1", "v1.5"]


def test_methods_are_rows_like_those_of_the_table(plan):
    """Criteria after few steps, from one training each; a key that no chosen row sets is free."""
    names = ["diff-pruning-0.05", "random", "no-cancel-taylor", "ours"]
    cells, params = plan(names=names, seeds=[1], steps=[5, 20], overrides={"prune.target": {"ratio": 0.6}})
    found = {cell.about["row"]: it for cell, it in zip(cells, params, strict=True)}

    criteria = ["diff-pruning", "random", "no-cancel-taylor", "diff-pruning"]
    assert [it.importance.criterion for it in found.values()] == criteria
    assert {(it.finetune.steps, it.finetune.snapshots, it.prune.target.ratio) for it in params} == {(20, (5,), 0.6)}
    assert [it.finetune.loss.output for it in found.values()] == [0, 0, 0, 1]
    assert plan(names=["noise"], overrides={"importance.criterion": "random"})[1][0].importance.criterion == "random"
    assert "prune.ranking" not in plan(names=["noise"])[0][0].overrides
    mixed = plan(names=["noise", "taylor"])[0]
    assert {cell.overrides["prune.ranking"] for cell in mixed} == {"uniform"}, "widths must be equal"
    assert {cell.overrides["prune.geglu"] for cell in mixed} == {"pairs"}, "widths must be equal"
    assert plan(names=["noise"], seeds=[0], overrides={"prune.ranking": "global"})[1][0].prune.ranking == "global"
    with pytest.raises(InputError, match=r"importance\.criterion is set by rows and seeds"):
        plan(names=names, overrides={"importance.criterion": "random"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overrides": {"finetune.steps": 9}}, "finetune.steps is set by rows and seeds"),
        ({"overrides": {"finetune.loss.output": 1}}, "finetune.loss.output is set by rows and seeds"),
        ({"names": ["noise", "feature"]}, "there is no row 'feature'; the rows are noise, noise"),
        ({"names": ["noise", "noise"]}, "rows are noise, noise; give one or more, each once"),
        ({"names": []}, "rows are missing; give one or more, each once"),
        ({"seeds": []}, "seeds are missing; give one or more from 0, each once"),
        ({"steps": [450]}, "--steps 450: give two or more rising numbers from 1"),
        ({"steps": [20, 10]}, "--steps 20,10: give two or more rising numbers from 1"),
        ({"steps": [0, 10]}, "--steps 0,10: give two or more rising numbers from 1"),
        ({"recipes": {"a": {"finetune.loss.nonsense": 1}}}, "finetune.loss.nonsense"),
        ({"recipes": {"a": {"finetune.learning_rate": 1}}}, "noise, output and feature are all 0"),
        (
            {"names": ["noise"], "seeds": [0, 1], "overrides": {"prune.ranking": "global"}},
            "prune.ranking global with prune.geglu pairs gives each seed other widths; set uniform and pairs, or",
        ),
        (
            {"names": ["noise"], "seeds": [0, 1], "overrides": {"prune.geglu": "halves"}},
            "prune.ranking uniform with prune.geglu halves gives each seed other widths",
        ),
        (
            {"recipes": {"a": {"prune.ranking": "global"}}},
            "--recipe a sets prune.ranking; a recipe sets prune.compensate or keys of",
        ),
    ],
)
def test_what_makes_no_curve_is_one_line(plan, given, message):
    """The error comes before anything is cloned."""
    with pytest.raises(InputError, match=message) as caught:
        plan(**given)
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise={finetune.loss.noise: 2}", "a recipe cannot be called 'noise'; choose another name than noise, noise"),
        ("taylor={finetune.loss.noise: 2}", "a recipe cannot be called 'taylor'; choose another name than"),
        ("a,b={finetune.loss.noise: 2}", "a recipe cannot be called 'a,b'"),
        ("a=1", "--recipe a has no keys; write for example"),
        ("a={}", "--recipe a has no keys"),
        ("a", "--recipe a is not KEY=VALUE; write for example --recipe "),
        ("a={seed: 1}", "--recipe a sets seed; a recipe sets prune.compensate or keys of finetune"),
        (
            "a={finetune.snapshots: [1]}",
            "--recipe a sets finetune.snapshots; a recipe sets prune.compensate or keys of finetune, and",
        ),
        ("a={1: 2}", "--recipe a sets 1; a recipe sets prune.compensate or keys of finetune"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(text, message):
    """The message says what to write."""
    with pytest.raises(InputError, match=message) as caught:
        parse_recipes([text])
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "a", "1,", "5", "2,1", "2,2", "0,1", "-1,2", "1.5,2", "1,99999999999999999999"])
def test_steps_rise_from_one(text):
    """Two or more, each once."""
    with pytest.raises(InputError, match="give two or more rising numbers from 1, for example"):
        parse_steps(text)
    assert parse_steps("25, 50,450") == [25, 50, 450]
