"""An estimate and a tolerance of the policy -> the reason of a check, with what was found and what is allowed."""

from collections.abc import Callable
from dataclasses import dataclass

from stages.protocol.costs import Cost
from stages.protocol.evaluation import DENSE, EvaluationRecord
from stages.protocol.intervals import Estimate
from stages.register.machine_faults import raising_machine_faults
from stages.register.policy import Check, resolve_tolerance
from stages.runtime.errors import InputError, MachineError, UnavailableError, first_line


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run a check, which returns its reason or raises InputError.

    Raises:
        MachineError: This machine failed, which says nothing about the version.
        UnavailableError: A server does not answer, likewise.
    """
    try:
        with raising_machine_faults():
            return Check(name, passed=True, reason=check())
    except (MachineError, UnavailableError):
        raise
    except InputError as error:
        return Check(name, passed=False, reason=error.message)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        # A file may have its registered hash and still hold something of the wrong type.
        return Check(name, passed=False, reason=f"the evidence is damaged ({first_line(error)})")


def require(condition: bool, found: str, allowed: str) -> str:  # noqa: FBT001  # the condition is what is required
    """Return the reason of a check; raise it as an InputError if the condition does not hold."""
    text = f"{found}; allowed: {allowed}"
    if not condition:
        raise InputError(text)
    return text


def _half_width(difference: Estimate) -> float:
    if difference.half_width is None:
        raise InputError("the difference has no interval; set reference.sets to 2 or more")
    return difference.half_width


@dataclass(frozen=True)
class FidLimit:
    """A tolerance of a policy as a FID."""

    value: float
    scale: float
    """The FID beside which it is seen."""
    what: str
    """What that FID is."""
    is_share: bool
    """Whether the policy gives a share of the scale."""

    def __str__(self) -> str:
        if self.is_share or self.value > self.scale > 0:
            return f"+{self.value:.3g}, {100 * self.value / self.scale:.3g}% of {self.what} ({self.scale:.3g})"
        return f"+{self.value:g}"


def fid_limit(tolerance: float | str, record: EvaluationRecord) -> FidLimit:
    """Return a tolerance of FID, whose scale is the dense model's FID or, where that is larger, the floor."""
    dense, floor = record.models[DENSE].fid.mean, record.floor_fid
    what = "the dense model's FID" if dense >= floor else "the FID of one half of the real images against the other"
    return _limit(tolerance, max(dense, floor), what)


def fid_dense_limit(tolerance: float | str, record: EvaluationRecord) -> FidLimit:
    """Return a tolerance of FID to dense, whose scale is its floor."""
    return _limit(tolerance, record.fid_dense_floor or 0, "the floor of FID to dense")


def _limit(tolerance: float | str, scale: float, what: str) -> FidLimit:
    if isinstance(tolerance, str) and scale <= 0:
        raise InputError(f"the policy allows {tolerance} of {what}, which was not measured; give a FID as a number")
    return FidLimit(resolve_tolerance(tolerance, scale), scale, what, isinstance(tolerance, str))


def check_fid(difference: Estimate, limit: FidLimit, baseline: str) -> str:
    """Check the upper end of the interval of a FID above that of `baseline`."""
    half_width = _half_width(difference)
    worst = difference.mean + half_width
    found = f"{difference.mean:+.3g} ± {half_width:.2g} above {baseline}"
    return require(worst <= limit.value, f"{found}, so at most {worst:+.3g}", str(limit))


def check_ssim(difference: Estimate, tolerance: float, baseline: str) -> str:
    """Check the lower end of the interval of an SSIM above that of `baseline`."""
    half_width = _half_width(difference)
    worst = difference.mean - half_width
    found = f"{difference.mean:+.3g} ± {half_width:.2g} above {baseline}"
    return require(worst >= -tolerance, f"{found}, so at least {worst:+.3g}", f"-{tolerance:g}")


def read_speed_up(cost: Cost) -> tuple[float, float]:
    """Return the speed-up over the dense model and the lower end of its interval.

    Raises:
        InputError: They were not measured.
    """
    if cost.speed_up is None or cost.speed_up_low is None:
        raise InputError(f"no speed-up was measured at batch {cost.batch} ({cost.left_out or 'too few passes'})")
    return cost.speed_up, cost.speed_up_low


def check_speed_up(cost: Cost, least: float) -> str:
    """Check the lower end of the interval of a speed-up over the dense model."""
    speed_up, low = read_speed_up(cost)
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}"
    return require(low >= least, found, f"{least:.2f} or more")
