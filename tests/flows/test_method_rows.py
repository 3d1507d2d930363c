"""A preset -> the cells of the paper's table, each allowed, at equal size and equal steps."""

import itertools
import shutil

import pytest
from ruamel.yaml import YAML

from flows.workspaces.method_rows import ONE_SHOT, TIMESTEPS, parse_seeds, plan_comparison
from flows.workspaces.overrides import overlap
from flows.workspaces.repository import HOME_VARIABLE, REPOSITORY_VARIABLE, ParamsSource, Repository
from flows.workspaces.workspace import open_workspace
from stages.params import Params, load_params
from stages.runtime.errors import InputError
from stages.tools.comparison.published import ABLATION, BASELINE, METHODS, read_published
from tests.repository import commit, make_repository
from tests.servers import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "recipes" / "presets").glob("*.yaml"))

OTHERS = ("digits", "digits-dit", "mnist", "photos", "imagenet-dit")
"""Presets of which the paper published nothing."""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A project of one commit with all presets, as the current folder."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", ".dvc/config"):
        shutil.copyfile(ROOT / name, project / name)
    shutil.copytree(ROOT / "recipes" / "presets", project / "recipes" / "presets")
    make_repository(project)
    for name in (HOME_VARIABLE, REPOSITORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.chdir(project)
    return Repository.find()


@pytest.fixture
def plan(repository):
    """Plan a comparison: its cells, with the params of each."""

    def do(preset, names=tuple(METHODS), seeds=(0, 1), overrides=None, *, ablation=True):
        source = ParamsSource(repository.resolve("HEAD", print), preset)
        cells = plan_comparison(repository, source, names, seeds, overrides or {}, ablation=ablation)
        texts = repository.render(source, [cell.overrides for cell in cells])
        return cells, [Params.model_validate(YAML(typ="safe").load(text.decode())) for text in texts]

    return do


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_is_allowed_for_every_preset(plan, preset):
    """Every row with every seed has the same size and number of steps, and all cells differ."""
    seeds = (0, 1) if preset == PRESETS[0] else (0,)
    cells, params = plan(preset, seeds=seeds)
    base = load_params(ROOT / "recipes" / "presets" / f"{preset}.yaml")
    rows = [(cell.about["row"], it) for cell, it in zip(cells, params, strict=True) if cell.about["row"] != ABLATION]

    assert [it.seed for _, it in rows] == [seed for seed in seeds for _ in METHODS]
    assert [name for name, _ in rows] == [*METHODS] * len(seeds)
    sizes = [str(it.prune.model_copy(update={"compensate": None})) for it in (base, *(it for _, it in rows))]
    assert set(sizes) == {sizes[0]}
    assert {it.finetune.steps for _, it in rows} == {base.finetune.steps}
    assert {str(it.reference) for it in params} == {str(base.reference)}
    assert len({str(it) for it in params}) == len(cells) == len({cell.label for cell in cells})


def test_rows_differ_in_what_their_names_state(plan, params):
    """The paper's recovery learns from the noise alone and keeps one average; ours compensates and distils."""
    cells, found = plan("digits", seeds=[3], ablation=False)
    rows = {cell.about["row"]: it for cell, it in zip(cells, found, strict=True)}

    assert [it.importance.criterion for it in rows.values()] == [
        *("diff-pruning", "random", "magnitude", "taylor"),
        *["diff-pruning"] * 3,
        *("no-cancel-taylor", "diff-pruning"),
    ]
    thresholds = {name: it.importance.threshold for name, it in rows.items() if it.importance.criterion[:4] == "diff"}
    assert list(thresholds.values()) == [params.importance.threshold, 0, 0.02, 0.05, params.importance.threshold]
    assert [name for name, it in rows.items() if it.finetune.init == "scratch"] == ["scratch"]
    assert [name for name, it in rows.items() if it.prune.compensate] == ["ours"]
    ours = rows.pop("ours").finetune
    assert (ours.loss.noise, ours.loss.output, ours.loss.feature) == (0, 1, 0.1)
    assert ours.ema_decays == (0.9, 0.95, 0.9999)
    assert ours.muon
    assert not any(it.finetune.muon for it in rows.values())
    theirs = {(str(it.finetune.loss), it.finetune.ema_decays) for it in rows.values()}
    assert theirs == {("noise=1.0 output=0.0 feature=0.0 jacobian=None min_snr=None", (0.9999,))}


def test_the_ablation_varies_the_number_of_timesteps_alone(plan):
    """Everything else is fixed, whatever is set for the rows."""
    cells, params = plan("mnist", [], [7], {"finetune.steps": 9, "importance.stride": 200, "reference.sets": 2})

    assert [it.importance.num_timesteps for it in params] == list(TIMESTEPS)
    assert {cell.about["row"] for cell in cells} == {ABLATION}
    first = params[0]
    assert (first.seed, first.reference.sets, first.finetune.steps, first.prune.target.ratio) == (7, 2, 1, 0.15)
    assert len({str(it.importance.model_copy(update={"num_timesteps": None})) for it in params}) == 1
    assert ONE_SHOT["importance.stride"] == first.importance.stride == 1


@pytest.mark.parametrize(
    "changes", [{"prune.depth": {"remove": 1, "order": "score"}}, {"rounds": {"count": 2, "steps": 1}}]
)
def test_the_ablation_cuts_widths_alone_and_once(plan, changes):
    """Its table says ratio .15, whatever the comparison removes besides."""
    _, params = plan("digits", names=[], seeds=[0], overrides=changes, ablation=True)

    assert {(it.prune.depth, it.rounds.count) for it in params} == {(None, 1)}


@pytest.mark.parametrize(
    "overrides", [{"prune.target.macs": "44%"}, {"variants.kinds": ["int8"]}, {"finetune.samples.every": 5}]
)
def test_the_cells_of_the_ablation_do_not_depend_on_the_order_of_their_keys(plan, overrides):
    """A server may store them in another one, so that no key lies in a block that another one sets."""
    cells, _ = plan("digits", names=["random"], seeds=[0], overrides=overrides, ablation=True)
    found = [cell.overrides for cell in cells if cell.about["row"] == ABLATION]

    assert len(found) == len(TIMESTEPS)
    for keys in found:
        assert not [pair for pair in itertools.combinations(keys, 2) if overlap(*pair)]


@pytest.mark.parametrize("preset", ["digits", "cifar10"])
def test_muon_follows_the_rate_that_is_set(plan, preset):
    """Where the preset has no rate for it: twice Adam's, also after --set."""
    _, (found,) = plan(preset, names=["ours"], seeds=[0], overrides={"finetune.learning_rate": 0.001}, ablation=False)

    given = load_params(ROOT / f"recipes/presets/{preset}.yaml").finetune.muon
    assert found.finetune.muon.learning_rate == (given.learning_rate if given else 0.002)


def test_the_steps_of_a_row_are_those_that_are_taken(plan):
    """As a number, which the table writes, also if they are given as text."""
    cells, found = plan("digits", names=["taylor"], seeds=[0], overrides={"finetune.steps": "45"}, ablation=False)

    assert cells[0].overrides["finetune.steps"] == found[0].finetune.steps == 45


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overrides": {"seed": 1}}, "seed is set by rows and seeds"),
        ({"overrides": {"finetune.loss": {"noise": 1}}}, "finetune.loss is set by rows and seeds"),
        ({"overrides": {"importance.criterion": "random"}}, "importance.criterion is set by rows and seeds"),
        ({"overrides": {"finetune.steps": "many"}}, "finetune.steps is 'many'"),
        ({"names": ["ours", "theirs"]}, "there is no row 'theirs'; the rows are scratch, random"),
        ({"names": [], "ablation": False}, "there is nothing to compare"),
        ({"seeds": []}, "seeds are missing; give one or more from 0, each once"),
        ({"seeds": [0, 1, 0]}, "seeds are 0, 1, 0; give one or more from 0, each once"),
    ],
)
def test_what_cannot_be_compared_is_one_line(plan, given, message):
    """The error comes before anything is cloned."""
    with pytest.raises(InputError, match=message) as caught:
        plan("digits", **given)
    assert len(caught.value.message.splitlines()) == 1


def test_committed_params_that_are_not_utf8_are_one_line(repository):
    """As those of a checkout."""
    path = repository.clone_from / "params.yaml"
    path.write_bytes(path.read_bytes() + "# für uns\n".encode("latin-1"))
    commit(repository.clone_from)
    with pytest.raises(InputError, match=r"params\.yaml .*UTF-8|params\.yaml .*utf-8") as caught:
        repository.params(ParamsSource(repository.resolve("HEAD", print), None))
    assert len(caught.value.message.splitlines()) == 1


def test_an_unknown_preset_is_reported_with_the_known_ones(plan):
    """The message lists the presets of the commit, not of the checkout."""
    with pytest.raises(InputError, match=r"commit [0-9a-f]{12} has no preset 'nonsense'; it has ") as caught:
        plan("nonsense")
    assert caught.value.message.endswith(f"it has {', '.join(PRESETS)}")


@pytest.mark.parametrize("text", ["", "a", "1,", "1,1", "0,00", "-1", "1.5"])
def test_seeds_are_different_numbers(text):
    """Each seed is a number from 0 and occurs once."""
    with pytest.raises(InputError, match="give different numbers from 0"):
        parse_seeds(text)
    assert parse_seeds("0, 3,1") == [0, 3, 1]


@pytest.mark.usefixtures("repository")
def test_a_preset_has_a_workspace_of_its_own():
    """It holds the preset's params with the overrides; params.yaml and other presets have other workspaces."""
    found = {}
    for preset in (None, "digits", "mnist"):
        with open_workspace("HEAD", {"seed": 5}, print, preset=preset) as place:
            found[place.path] = load_params(place.path / "params.yaml")

    assert len(found) == 3
    assert [it.seed for it in found.values()] == [5] * 3
    assert [it.finetune.steps for it in found.values()] == [450, 450, 200]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in OTHERS])
def test_the_paper_published_numbers_of_its_presets(preset):
    """The table has its protocol, and begins with the dense model."""
    found = read_published()[preset][0]

    assert found.rows[0].method == "pretrained"
    assert found.rows[0].params > found.rows[-1].params
    assert found.protocol
    assert (found.source == "recalled") == (preset == "imagenet-ldm")
    assert found.paper == "Fang et al., arXiv 2305.10924"


@pytest.mark.parametrize("preset", ["lsun-church", "lsun-bedroom"])
def test_lsun_has_a_second_target(plan, preset):
    """The ratio at which later papers compare replaces the preset's MACs in every row; the ablation keeps its own."""
    cells, params = plan(preset, ["random", "ours"], [0], {"prune.target.ratio": 0.3})
    targets = [(cell.about["row"], it.prune.target.given()) for cell, it in zip(cells, params, strict=True)]

    expected = [*[(row, {"ratio": 0.3}) for row in ("random", "ours")], *[(ABLATION, {"ratio": 0.15})] * len(TIMESTEPS)]
    assert targets == expected


def test_published_methods_are_called_as_ours():
    """So that the two tables can be read side by side."""
    titles = {"pretrained", "diff-pruning", *METHODS.values()}

    theirs = [table for name, (table, *_) in read_published().items() if name in PRESETS and name not in OTHERS]
    assert {row.method for table in theirs for row in table.rows} <= titles
    assert set(read_published()["celeba-hq-64"][0].ablation) == set(TIMESTEPS)
    assert BASELINE in METHODS
