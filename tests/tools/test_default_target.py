"""The ratio that init chooses: the paper's, unless it would leave most of the model whole."""

import pytest

from stages.models.groups import find_groups
from stages.tools.initialise.default_target import choose_ratio

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}


@pytest.mark.parametrize(("norm_groups", "expected"), [(32, 31 / 64), (4, 0.3)])
def test_the_ratio_cuts_something_from_half_of_the_groups(make_unet, norm_groups, expected):
    """Of 64 channels in 32 norm groups 32 go at once, from a ratio just above 31 / 64 on; wide groups keep .3."""
    groups = find_groups(make_unet(block_out_channels=(32, 64), norm_num_groups=norm_groups, **PLAIN))

    assert choose_ratio(groups, 1) == pytest.approx(expected, abs=2e-3)
    assert choose_ratio(groups, 1, 0.6) == 0.6
