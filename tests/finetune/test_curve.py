"""The recovery curve and its gate."""

import math

import pytest

from stages.finetune.curve import CurvePoint, check_gate, lowest_reachable
from stages.finetune.params import FinetuneParams
from stages.runtime.errors import InputError


def taking(steps, **changes):
    """Return the params of a training."""
    return FinetuneParams(steps=steps, **changes)


def curve(*losses, every=10):
    """Make a curve of one EMA, measured every few steps."""
    return [CurvePoint(index * every, None, ((0.9, loss),)) for index, loss in enumerate(losses)]


def test_the_best_ema_has_the_lowest_loss():
    """Of equal ones it is the first."""
    point = CurvePoint(3, 0.1, ((0.9, 0.3), (0.99, 0.2), (0.999, 0.2)))

    assert (point.ema_decay, point.heldout_loss) == (0.99, 0.2)


def test_the_bound_continues_the_steepest_slope():
    """For L = 1 − .1·ln(step) the bound is exact."""
    points = [CurvePoint(step, None, ((0.9, 1 - 0.1 * math.log(max(step, 1))),)) for step in (0, 10, 20, 30, 40)]

    assert lowest_reachable(points, taking(100)) == pytest.approx(1 - 0.1 * math.log(100))


def test_an_earlier_slope_may_be_the_steepest():
    """Of the last three segments, the loss fell the fastest in the first one."""
    steepest = (0.6 - 0.9) / math.log(20 / 10)
    found = lowest_reachable(curve(1, 0.9, 0.6, 0.55, 0.54), taking(100))

    assert found == pytest.approx(0.54 + steepest * math.log(100 / 40))


def test_few_points_give_no_bound():
    """The bound is -∞; at the last step it is the measured loss."""
    assert lowest_reachable(curve(1, 0.9, 0.8, 0.7), taking(100)) == -math.inf
    assert lowest_reachable(curve(1, 0.9, 0.8, 0.7), taking(30)) == 0.7


@pytest.mark.parametrize("steps", [(30, 31, 32, 33), (40, 41, 42, 43), (38, 39, 40, 41)])
def test_points_close_together_give_no_slope(steps):
    """Snapshots of neighbouring steps, where noise hides the fall, leave the bound to the points far apart."""
    points = curve(1, 0.9, 0.8, 0.7, 0.6)
    noisy = [CurvePoint(step, None, ((0.9, 0.6),)) for step in steps if step % 10]
    found = lowest_reachable(sorted([*points, *noisy], key=lambda point: point.step), taking(100))

    assert found <= lowest_reachable(points, taking(100)) + 0.1


def test_a_rising_curve_is_not_expected_to_fall():
    """The bound is the last loss."""
    assert lowest_reachable(curve(1, 0.1, 0.2, 0.3, 0.4), taking(100)) == 0.4


def test_a_gate_out_of_reach_is_an_error():
    """The message has the loss, the bound, the gate and what to change."""
    flat = curve(1, 0.5, 0.45, 0.44, 0.43)
    check_gate(flat, taking(100))
    check_gate(flat, taking(100, gate=0.4))
    with pytest.raises(InputError, match=r"held-out loss 0\.43 at step 40 falls to 0\.\d+ at best by 100, .* is 0\.2;"):
        check_gate(flat, taking(100, gate=0.2))
    with pytest.raises(InputError, match=r"falls to 0\.43 at best by 40, finetune\.gate is 0\.42"):
        check_gate(flat, taking(40, gate=0.42))


@pytest.mark.parametrize("changes", [{"warmup_steps": 20}, {"schedule": "cosine"}, {"schedule": "linear"}])
def test_a_gate_may_be_reached_where_the_rate_was_or_will_be_another(changes):
    """During the warm-up the loss falls too slowly, and with the rate that falls to 0 the fastest at the end."""
    slow = curve(1, 0.99, 0.98, 0.97, 0.96)
    check_gate(slow, taking(100, gate=0.2, **changes))
    with pytest.raises(InputError, match=r"0\.96 at best by 40"):
        check_gate(slow, taking(40, gate=0.2, **changes))
