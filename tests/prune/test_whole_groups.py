"""Groups that a target leaves whole: a warning before the cut, or a refusal."""

import math

import pytest
import torch
from click.testing import CliRunner

from flows.workspaces.overrides import apply
from stages.fetch.model import BUNDLED
from stages.models.groups import find_groups
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.saliency import write_importance
from stages.prune.__main__ import main
from stages.prune.params import PruneParams
from stages.prune.path import find_path
from stages.prune.selection import plan_pruning
from stages.prune.whole_groups import smallest_ratio, whole_groups_warning
from stages.runtime.errors import InputError

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}


@pytest.fixture
def narrow(make_unet):
    """A model of 32 and 64 channels in 32 norm groups each: many of its widths cannot become smaller."""
    return make_unet(block_out_channels=(32, 64), norm_num_groups=32, **PLAIN)


def planned(unet, magnitude_of, capsys, **chosen):
    """Plan, and return the number of channels that each group loses, and the warning."""
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(**chosen))
    return [len(group.cut) for group in plan.groups], capsys.readouterr().err


def path_of(unet, **chosen):
    """The groups of a model and the path of cuts."""
    params, groups = PruneParams(target={"ratio": 0.3}, **chosen), find_groups(unet)
    return groups, find_path(groups, [torch.ones(group.width) for group in groups], params)


def test_the_count_of_whole_groups_and_the_smallest_ratio_are_warned_of(narrow, magnitude_of, capsys):
    """At the ratio that is named one more group is cut, one thousandth below it none."""
    cuts, warning = planned(narrow, magnitude_of, capsys, target={"ratio": 0.3})
    whole = cuts.count(0)
    groups, path = path_of(narrow)
    fixed = len(groups) - len({step.group for step in path})
    named = float(warning.split("the smallest ratio that would is ")[1].split(";")[0])
    above, below = (planned(narrow, magnitude_of, capsys, target={"ratio": named + gap})[0] for gap in (0, -0.001))

    assert f"ratio 0.3 cuts nothing from {whole} of {len(cuts)} groups" in warning
    assert f"no target cuts {fixed} of them" in warning
    assert whole > len(cuts) / 2
    assert above.count(0) < whole == below.count(0)
    assert fixed > 0
    assert planned(narrow, magnitude_of, capsys, target={"ratio": 0.97})[0].count(0) >= fixed


@pytest.mark.parametrize(("channels", "num_groups"), [(32, 32), (64, 32), (128, 32), (96, 32), (24, 4)])
def test_the_smallest_ratio_by_hand(make_unet, channels, num_groups):
    """A group of n channels in G norm groups loses G at once: n − int(n·(1 − r)) ≥ G, so r > (G − 1) / n."""
    unet = make_unet(block_out_channels=(channels,) * 2, norm_num_groups=num_groups, **PLAIN)
    groups, path = path_of(unet)
    index = next(index for index, group in enumerate(groups) if "conv_in" in group.producers())
    found = smallest_ratio(path, groups, [index])

    assert (groups[index].width, groups[index].blocks) == (channels, num_groups)
    if channels == num_groups:
        assert found is None
    else:
        assert found == math.floor(1000 * (num_groups - 1) / channels + 1) / 1000


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_a_budget_that_is_met_by_few_groups_is_warned_of(make_unet, magnitude_of, capsys, ranking, quantity):
    """It is met, but by the groups alone that can be cut; under global ranking those that cannot be cut count."""
    unet = make_unet(block_out_channels=(32, 32), norm_num_groups=32, **PLAIN)
    cuts, warning = planned(unet, magnitude_of, capsys, target={quantity: "98%"}, ranking=ranking)
    groups, path = path_of(unet)
    fixed = len(groups) - len({step.group for step in path})

    assert any(cuts)
    assert fixed > len(groups) / 2
    counted = fixed if ranking == "global" else cuts.count(0)
    assert f"prune.target.{quantity} 98% cuts nothing from {counted} of {len(cuts)} groups" in warning
    assert "smallest ratio" not in warning


@pytest.mark.parametrize("chosen", [{"ratio": 0.3}, {"macs": "60%"}, {"ratio": 0.0}, {"macs": "100%"}])
def test_most_groups_cut_or_none_asked_for_is_not_warned_of(magnitude_of, capsys, chosen):
    """The default target on the bundled model, a budget, and targets that ask for no cut."""
    unet = read_unet(BUNDLED / "digits")

    assert planned(unet, magnitude_of, capsys, target=chosen)[1] == ""


def test_half_of_the_groups_whole_is_not_warned_of(unet):
    """One more is."""
    params, (groups, path) = PruneParams(target={"ratio": 0.3}), path_of(unet)
    half = len(groups) // 2
    cuts = [1] * half + [0] * half

    assert whole_groups_warning(params, path, groups, cuts) is None
    assert whole_groups_warning(params, path, groups, [0, *cuts[1:]])


def test_excluded_groups_do_not_count(narrow, magnitude_of, capsys):
    """They stay whole because params.yaml says so."""
    chosen = {"target": {"ratio": 0.3}, "include": ("time_embedding.*",)}

    assert planned(narrow, magnitude_of, capsys, **chosen)[1] == ""


def test_a_ratio_that_cuts_no_group_is_refused(narrow, magnitude_of):
    """With the smallest ratio that cuts one, or without if norm groups allow none."""
    magnitude = magnitude_of(narrow)
    wide = {"include": ("down_blocks.1.*",)}
    with pytest.raises(InputError, match=r"ratio 0\.3 cuts nothing .*; use a ratio of at least 0\.485$"):
        plan_pruning(narrow, magnitude, PruneParams(target={"ratio": 0.3}, **wide))
    plan = plan_pruning(narrow, magnitude, PruneParams(target={"ratio": 0.485}, **wide))
    assert any(group.cut for group in plan.groups)
    with pytest.raises(InputError, match=r"^no group can be cut with prune\.round_to 1, .* norm groups and heads"):
        plan_pruning(narrow, magnitude, PruneParams(target={"ratio": 0.3}, include=("down_blocks.0.*",)))


def test_the_command_warns_on_stderr_before_it_cuts(tmp_path, root, monkeypatch, narrow, magnitude_of, scheduler):
    """One line; the budget and the costs follow on stdout, and the model is written."""
    write_pipeline(tmp_path / "model", narrow, scheduler)
    (tmp_path / "importance").mkdir()
    write_importance(tmp_path / "importance", magnitude_of(narrow))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes(apply({"prune.compensate": None}, root / "params.yaml"))
    given = ("--params", "params.yaml", "--model", "model", "--importance", "importance", "--out", "out")
    result = CliRunner().invoke(main, [str(argument) for argument in given])

    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 1
    warned, cut = (result.output.index(text) for text in (warnings[0], "channels, asked"))
    assert warned < cut
    assert warnings[0].startswith("Warning: prune.target.ratio 0.3 cuts nothing from ")
    assert (tmp_path / "out/unet/config.json").is_file()
