"""A value at its limit passes, and the canary is as far off as its worst image."""

import numpy as np
import pytest

from stages.protocol.costs import Cost
from stages.protocol.intervals import Estimate
from stages.register.canary import compare
from stages.register.limits import FidLimit, check_fid, check_speed_up, check_ssim
from stages.runtime.errors import InputError

IMAGE = np.arange(16.0).reshape(4, 4) + 100
CHECKERBOARD = np.where(np.indices((4, 4)).sum(0) % 2, 20, -20)


def test_the_worse_end_of_an_interval_may_lie_at_the_limit():
    """What the policy allows is allowed to the last digit."""
    limit = FidLimit(0.25, 1.0, "the dense model's FID", is_share=False)
    cost = Cost(model="a", batch=1, precision="float32", mode="eager", device="cpu", speed_up=1.25, speed_up_low=1.0)

    assert "so at most +0.25" in check_fid(Estimate(0.125, 0.125), limit, "dense")
    assert "so at least -0.25" in check_ssim(Estimate(-0.125, 0.125), 0.25, "1")
    assert "at least 1.00" in check_speed_up(cost, 1.0)


@pytest.mark.parametrize(
    ("drawn", "levels"),
    [([IMAGE + 10, IMAGE], 10), ([IMAGE, IMAGE - 10], 10), ([IMAGE + CHECKERBOARD, IMAGE], 20)],
    ids=["first", "last", "with the right mean"],
)
def test_one_false_image_of_the_canary_is_enough(drawn, levels):
    """Its distance is that of the worst image, of every pixel and not of the means."""
    with pytest.raises(InputError, match=f"off by {levels} levels"):
        compare([1, 2], drawn, [IMAGE, IMAGE], levels - 1)
    assert f"off by {levels} levels; allowed: {levels}" in compare([1, 2], drawn, [IMAGE, IMAGE], levels)
