"""An evaluation and its costs -> the verdict on a model: a level, one sentence, and the reasons with their limits."""

from pathlib import Path
from typing import Literal

from stages.protocol.costs import Cost, CostsRecord, read_costs
from stages.protocol.evaluation import DENSE, VISIBLE_SSIM, EvaluationRecord, Model, read_evaluation
from stages.runtime.schema import Frozen

Level = Literal["good", "changed", "worse"]
Rating = Literal["kept", "changed", "lost"]
FINETUNED = "finetuned"
KEPT_FID, LOST_FID = 0.25, 1.0
"""Rise of FID, as a share of `fid_scale`, up to which quality is kept, and above which it is lost."""
KEPT_SHARE, LOST_SHARE = 0.1, 0.5
"""Share of visibly different pairs up to which the pictures are kept, and above which they are other pictures."""
KEPT_SSIM, LOST_SSIM = 0.95, 0.5
"""The same limits for the mean SSIM of a record from before pairs were counted."""
SAVED = 0.01
"""Share of parameters or MACs that must be saved for the model to count as smaller."""
FRACTIONS = {1 / 2: "Half the size", 1 / 3: "A third of the size", 1 / 4: "A quarter of the size"}
UNLIKE = 0.05
"""Difference between the shares of parameters and of MACs above which the sentence names both."""
NEAR = 0.02
"""How far from a fraction a size may be, and still be called by its name."""
ONE_HUNDRED = 100


class Verdict(Frozen):
    """What a compression achieved and what it cost, in one sentence."""

    level: Level
    """good: smaller or faster, and quality and pictures kept; worse: quality lost; changed: everything between."""
    sentence: str
    reasons: tuple[str, ...]
    """What was found, with the limit that it was compared with."""


def read_verdict(reports: Path) -> Verdict:
    """Read the evaluation and costs below a folder of reports, and judge the finetuned model.

    Raises:
        InputError: A record is missing or damaged.
    """
    return judge(read_evaluation(reports / "evaluate"), read_costs(reports / "costs"))


def judge(record: EvaluationRecord, costs: CostsRecord, name: str = FINETUNED) -> Verdict:
    """Judge a model of an evaluation against the dense one.

    FID and pictures are rated on their own; pictures that are other ones are a loss only where FID does not show that
    the quality is kept, since a model may draw other pictures that are as good.
    """
    model, cost = record.models[name], costs.first(name)
    fid, pictures = rate_fid(record, name), rate_pictures(record, name)
    if fid == "lost" or (pictures == "lost" and fid != "kept"):
        level: Level = "worse"
    elif fid == pictures == "kept" and _gains(record, model, cost) and rate_speed(cost) != "changed":
        level = "good"
    else:
        level = "changed"
    gains = f"{describe_size(model, record.models[DENSE])} and {write_speed(cost)}"
    losses = f"{write_pictures(record, name)}; {write_fid(record, name)}"
    parts = f"{losses}; {gains[0].lower()}{gains[1:]}" if level == "worse" else f"{gains}; {losses}"
    sentence = f"Worse than the dense model: {parts}." if level == "worse" else f"{parts}."
    return Verdict(level=level, sentence=sentence, reasons=tuple(_reasons(record, name, cost)))


def fid_scale(record: EvaluationRecord) -> float:
    """Return the FID that a rise is compared with: the dense model's, or the floor of the real images if larger."""
    return max(record.models[DENSE].fid.mean, record.floor_fid)


def fid_rise(record: EvaluationRecord, name: str) -> tuple[float, float, float]:
    """Return how far a model's FID is above the dense one's: mean, and the ends of its interval.

    Without an interval, from a single set, both ends are the mean.
    """
    difference = record.models[name].fid.above_dense
    mean = difference.mean if difference else record.models[name].fid.mean - record.models[DENSE].fid.mean
    half_width = (difference.half_width if difference else None) or 0.0
    return mean, mean - half_width, mean + half_width


def rate_fid(record: EvaluationRecord, name: str) -> Rating:
    """Rate FID: kept if even the upper end of its rise is small, lost if even the lower end is large."""
    _, low, high = fid_rise(record, name)
    scale = fid_scale(record)
    return "kept" if high <= KEPT_FID * scale else "lost" if low > LOST_FID * scale else "changed"


def rate_pictures(record: EvaluationRecord, name: str) -> Rating:
    """Rate the pairs by the share that differs visibly, or by the mean SSIM where none were counted."""
    model = record.models[name]
    if model.visible_pairs is None:
        return "kept" if model.ssim.mean >= KEPT_SSIM else "lost" if model.ssim.mean < LOST_SSIM else "changed"
    share = model.visible_pairs / record.num_pairs
    return "kept" if share <= KEPT_SHARE else "lost" if share > LOST_SHARE else "changed"


def rate_speed(cost: Cost) -> Rating | None:
    """Rate a speed-up: kept if it is measurably above 1, changed if below; None if it cannot be told from 1."""
    if cost.speed_up is None or cost.speed_up_low is None or cost.speed_up_high is None:
        return None
    if cost.speed_up_low <= 1 <= cost.speed_up_high or round(cost.speed_up, 2) == 1:
        return None
    return "kept" if cost.speed_up_low > 1 else "changed"


def tone(level: Level, rating: Rating | None) -> Level | None:
    """Return the colour of a number that stands below a verdict, as a level; None is neutral.

    A number is green only where the verdict is, and as red as its rating at most where the verdict is red: what was
    kept does not make up for what was lost, and pictures that are other ones are no loss unless the verdict says so.
    """
    if rating is None or (rating == "kept" and level != "good"):
        return None
    return "good" if rating == "kept" else "worse" if rating == "lost" and level == "worse" else "changed"


def _gains(record: EvaluationRecord, model: Model, cost: Cost) -> bool:
    dense = record.models[DENSE]
    is_smaller = min(model.params / dense.params, model.macs / dense.macs) <= 1 - SAVED
    return is_smaller or rate_speed(cost) == "kept"


def describe_size(model: Model, dense: Model) -> str:
    """Describe a model's size beside the dense one's: Half the size; 45 % smaller; with MACs where they differ."""
    work = model.macs / dense.macs
    size = _write_params(model.params / dense.params)
    is_alike = abs(model.params / dense.params - work) <= UNLIKE
    return size if is_alike else f"{size}, {abs(1 - work) * 100:.0f} % {'fewer' if work < 1 else 'more'} MACs"


def _write_params(share: float) -> str:
    for fraction, text in FRACTIONS.items():
        if abs(share - fraction) <= NEAR:
            return text
    if abs(1 - share) < SAVED:
        return "The same size"
    return f"{abs(1 - share) * 100:.0f} % {'smaller' if share < 1 else 'larger'}"


def write_speed(cost: Cost) -> str:
    """Write the speed-up and its device; one whose interval contains 1 is none."""
    device = f"({cost.device}, batch {cost.batch})"
    if cost.speed_up is None or cost.speed_up_low is None or cost.speed_up_high is None:
        return "its speed was not measured"
    if rate_speed(cost) is None:
        return f"not measurably faster {device}"
    return f"{cost.speed_up:.2f}× as fast {device}"


def write_pictures(record: EvaluationRecord, name: str) -> str:
    """Write how many pictures differ visibly from the dense model's."""
    model = record.models[name]
    if model.visible_pairs is None:
        return f"pictures have SSIM {model.ssim.mean:.2f} against dense"
    return f"pictures differ visibly in {write_share(model.visible_pairs, record.num_pairs)}"


def write_share(count: int, total: int) -> str:
    """Write a share of a whole in words that do not round to none or to all: none of 2,500; 4 of 100."""
    if count in (0, total) or total < ONE_HUNDRED:
        return f"{('none' if not count else 'all') if count in (0, total) else count} of {total:,}"
    per_hundred = ONE_HUNDRED * count / total
    return f"{round(per_hundred)} of 100" if 1 <= per_hundred <= ONE_HUNDRED - 1 else f"{count:,} of {total:,}"


def write_fid(record: EvaluationRecord, name: str) -> str:
    """Write whether FID can be told from the dense model's: both values if so, else how coarse the measurement is."""
    model, dense = record.models[name], record.models[DENSE]
    difference = model.fid.above_dense
    if difference and difference.is_distinct is False:
        coarse = "" if rate_fid(record, name) == "kept" else f" within ± {difference.half_width:.2g}"
        return f"FID cannot be told from dense{coarse}"
    before, after = f"{dense.fid.mean:.3f}", f"{model.fid.mean:.3f}"
    single = "" if difference and difference.is_distinct else " (one set, so no interval)"
    if before == after:
        return f"FID is {after} in both{single}"
    return f"FID {'rose' if model.fid.mean > dense.fid.mean else 'fell'} from {before} to {after}{single}"


def _reasons(record: EvaluationRecord, name: str, cost: Cost) -> list[str]:
    model, dense = record.models[name], record.models[DENSE]
    mean, low, high = fid_rise(record, name)
    scale = fid_scale(record)
    fid = (
        f"FID is {mean:+.3g} from dense, 95 % interval {low:+.3g} to {high:+.3g}: kept up to {KEPT_FID * scale:+.3g}, "
        f"lost above {LOST_FID * scale:+.3g} ({KEPT_FID:.0%} and {LOST_FID:.0%} of {scale:.3g}, the larger of the "
        f"dense model's FID and the real images' floor)."
    )
    pictures = (
        f"Mean SSIM {model.ssim.mean:.3f}; differing pairs were not counted in this record."
        if model.visible_pairs is None
        else f"{model.visible_pairs:,} of {record.num_pairs:,} pairs have SSIM below {VISIBLE_SSIM}, which is visible "
        f"side by side: pictures are kept up to {KEPT_SHARE:.0%}, other ones above {LOST_SHARE:.0%}."
    )
    size = f"{model.params / dense.params:.1%} of the parameters, {model.macs / dense.macs:.1%} of the MACs."
    return [fid, pictures, size, _write_speed_reason(cost)]


def _write_speed_reason(cost: Cost) -> str:
    if cost.speed_up is None or cost.speed_up_low is None or cost.speed_up_high is None:
        return f"No speed was measured ({cost.left_out or 'no interval'})."
    setting = f"batch {cost.batch}, {cost.precision}, {cost.mode}, {cost.device}"
    interval = f"95 % interval {cost.speed_up_low:.2f} to {cost.speed_up_high:.2f}"
    return (
        f"{cost.speed_up:.2f} times the dense model's speed, {interval} ({setting}); an interval with 1 is no speed-up."
    )
