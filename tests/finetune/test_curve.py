"""What a curve says."""

import math

import pytest

from stages.finetune.curve import CurvePoint, check_gate, lowest_reachable
from stages.runtime.errors import InputError


def curve(*losses, every=10):
    """Make a curve of one average."""
    return [CurvePoint(index * every, None, ((0.9, loss),)) for index, loss in enumerate(losses)]


def test_the_best_average_has_the_lowest_loss():
    """Of equal ones the first."""
    point = CurvePoint(3, 0.1, ((0.9, 0.3), (0.99, 0.2), (0.999, 0.2)))

    assert (point.ema_decay, point.heldout_loss) == (0.99, 0.2)


def test_a_curve_falls_on_as_fast_as_it_did_at_its_fastest():
    """L = 1 − .1·ln(step) goes on so exactly."""
    points = [CurvePoint(step, None, ((0.9, 1 - 0.1 * math.log(max(step, 1))),)) for step in (0, 10, 20, 30, 40)]

    assert lowest_reachable(points, 100) == pytest.approx(1 - 0.1 * math.log(100))


def test_few_points_say_nothing():
    """Anything can be reached then; at the end only what was measured."""
    assert lowest_reachable(curve(1, 0.9, 0.8, 0.7), 100) == -math.inf
    assert lowest_reachable(curve(1, 0.9, 0.8, 0.7), 30) == 0.7


def test_a_rising_curve_is_not_expected_to_fall():
    """It stays where it is at best."""
    assert lowest_reachable(curve(1, 0.1, 0.2, 0.3, 0.4), 100) == 0.4


def test_the_gate_ends_what_cannot_reach_it():
    """With where it is, where it would come to, and what to change; else it says nothing."""
    flat = curve(1, 0.5, 0.45, 0.44, 0.43)
    check_gate(flat, 100, None)
    check_gate(flat, 100, 0.4)
    with pytest.raises(InputError, match=r"held-out loss 0\.43 at step 40 falls to 0\.\d+ at best by 100, .* is 0\.2;"):
        check_gate(flat, 100, 0.2)
    with pytest.raises(InputError, match=r"falls to 0\.43 at best by 40, finetune\.gate is 0\.42"):
        check_gate(flat, 40, 0.42)
