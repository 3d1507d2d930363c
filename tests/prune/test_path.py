"""The order of the cuts on the way from the dense to the smallest model."""

import torch

from stages.models.groups import Group, Member
from stages.prune.params import PruneParams
from stages.prune.path import Step, allowed_widths, cuts_after, find_path


def group(name, width):
    """A group of the outputs of one layer."""
    return Group(name, width, 1, [Member(name, 0, torch.arange(width), torch.arange(width))])


def steps(scores, ranking):
    """The path through groups with these scores: the group, the number of cut channels and the key of each step."""
    groups = [group(name, len(values)) for name, values in zip("ab", scores, strict=True)]
    params = PruneParams(target={"ratio": 0.3}, ranking=ranking)
    path = find_path(groups, [torch.tensor(values) for values in scores], params)
    return [(step.group, step.cut, step.key) for step in path]


def test_global_ranking_is_by_the_score_over_the_mean_of_the_group():
    """The means are 6 and 4, of groups of other widths (closed form)."""
    assert steps([[3.0, 6.0, 9.0], [3.0, 5.0]], "global") == [(0, 1, 0.5), (1, 1, 0.75), (0, 2, 1.0)]


def test_a_group_whose_scores_are_all_zero_goes_first():
    """Its relative scores are zero, and not NaN."""
    found = steps([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], "global")

    assert found == [(0, 1, 0.0), (0, 2, 0.0), (1, 1, 1.0), (1, 2, 1.0)]


def test_equal_shares_are_cut_in_the_order_of_the_groups():
    """Under uniform ranking, where groups of one width have the same keys."""
    found = steps([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], "uniform")

    assert [(index, cut) for index, cut, _ in found] == [(0, 1), (1, 1), (0, 2), (1, 2)]


def test_a_smaller_cut_takes_none_back():
    """A path may reach it after a larger one of the same group."""
    assert cuts_after([Step(0, 2, 0.1), Step(0, 1, 0.2)], 2) == [2, 0]


def test_the_floor_of_a_width_is_exact():
    """0.07 · 100 is 7 channels, though it is above 7 in binary fractions."""
    assert allowed_widths(group("a", 100), 1, 0.07)[-1] == 7
