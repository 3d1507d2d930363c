"""Two versions and a policy -> checks, each with what was found and what is allowed."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.models.layout import PLAN, WEIGHTS
from stages.protocol.costs import Cost, CostsRecord, read_costs
from stages.protocol.evaluation import DENSE, EvaluationRecord, read_evaluation
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.register.canary import draw
from stages.register.lineage import read_lineage
from stages.register.package import CANARY_SEEDS, check_files, check_formats
from stages.register.policy import Check, Latency, Policy
from stages.register.registry import CONTENT, EVIDENCE, MODEL, OURS, WITHDRAWN
from stages.runtime.errors import InputError, first_line
from stages.storage.files import file_sha256


@dataclass(frozen=True)
class Candidate:
    """A version and what the registry says of it."""

    uri: str
    folder: Path
    """Where its files were downloaded to."""
    tags: dict[str, str]


def decide(candidate: Candidate, champion: Candidate | None, policy: Policy) -> list[Check]:
    """Go through all checks, the cheap ones first; what depends on one that failed is not looked at.

    Args:
        candidate: The version that wants to be champion.
        champion: The one that is; None where there is none.
        policy: What is allowed.
    """
    first = [
        _check("not withdrawn", lambda: _check_withdrawn(candidate)),
        _check("untampered", lambda: _check_untampered(candidate)),
        _check("no pickle", lambda: _check_formats(candidate)),
    ]
    if not all(check.passed for check in first):
        return first
    second = [
        _check("lineage", lambda: _check_lineage(candidate)),
        _check("measured with intervals", lambda: _check_measured(candidate)),
    ]
    if not second[-1].passed:
        return first + second
    checks = [*first, *second, *_compare(candidate, champion, policy)]
    if all(check.passed for check in checks):
        checks.append(_check("canary", lambda: check_canary(candidate.folder, policy.canary.levels)))
    return checks


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, reason=look())
    except InputError as error:
        return Check(name, passed=False, reason=error.message)
    except (
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:  # evidence that fits its hash and no type
        return Check(name, passed=False, reason=f"the evidence is damaged ({first_line(error)})")


def _demand(condition: bool, found: str, allowed: str) -> str:  # noqa: FBT001  # it is what is demanded
    text = f"{found}; allowed: {allowed}"
    if not condition:
        raise InputError(text)
    return text


def _compare(candidate: Candidate, champion: Candidate | None, policy: Policy) -> Iterator[Check]:
    record = read_evaluation(candidate.folder / EVIDENCE / "evaluation")
    if champion is not None:
        yield from _compare_with_champion(candidate, record, champion, policy)
    model, dense = record.models[OURS], record.models[DENSE]
    above, share = paired_difference(model.fid.sets, dense.fid.sets), model.macs / dense.macs
    yield _check("FID against dense", lambda: _check_fid(above, policy.dense.fid, "the dense model"))
    below = estimate([value - 1 for value in model.ssim.sets])
    yield _check("SSIM against dense", lambda: _check_ssim(below, policy.dense.ssim, "1"))
    yield _check(
        "budget", lambda: _demand(share <= policy.budget.macs, f"{share:.1%} of the MACs", f"{policy.budget.macs:.1%}")
    )
    yield _check("latency", lambda: _check_latency(_read_costs(candidate), policy.latency))


def _compare_with_champion(
    candidate: Candidate, record: EvaluationRecord, champion: Candidate, policy: Policy
) -> Iterator[Check]:
    sound = _check("champion untampered", lambda: f"{_check_untampered(champion)}; {_check_measured(champion)}")
    yield sound
    if not sound.passed:
        return
    other = read_evaluation(champion.folder / EVIDENCE / "evaluation")
    protocol = _check("same protocol", lambda: _check_protocol(record, other, champion.uri))
    yield protocol
    if not protocol.passed:
        return
    ours, theirs, allowed = record.models[OURS], other.models[OURS], policy.champion
    fid, ssim = (paired_difference(ours.metric(name).sets, theirs.metric(name).sets) for name in ("fid", "ssim"))
    yield _check("FID against champion", lambda: _check_fid(fid, allowed.fid, "the champion"))
    yield _check("SSIM against champion", lambda: _check_ssim(ssim, allowed.ssim, "the champion's"))
    yield _check(
        "latency against champion", lambda: _check_speed(_read_costs(candidate), _read_costs(champion), policy)
    )


def _check_withdrawn(candidate: Candidate) -> str:
    found = candidate.tags.get(WITHDRAWN)
    if found:
        raise InputError(f"it was rolled back {found}; delete its tag {WITHDRAWN} to offer it again")
    return "it was never rolled back"


def _check_untampered(candidate: Candidate) -> str:
    check_files(candidate.folder, candidate.tags.get(CONTENT))
    return "every file has the hash under which it was registered"


def _check_formats(candidate: Candidate) -> str:
    check_formats(candidate.folder)
    return "text, pictures and safetensors, opened as code"


def _check_lineage(candidate: Candidate) -> str:
    lineage = read_lineage(candidate.folder / EVIDENCE)
    for file, sha256 in lineage.files.items():
        if file_sha256(candidate.folder / EVIDENCE / file) != sha256:
            raise InputError(f"the lineage names another {file} than the one beside it")
    for name in (f"unet/{WEIGHTS}", PLAN):
        if lineage.outputs.get(f"artifacts/{OURS}/{name}") != file_sha256(candidate.folder / MODEL / name):
            raise InputError(f"the lineage tells of another {name} than the version holds")
    return f"commit {lineage.git_commit[:12]}, data {lineage.data_sha256[:12]}"


def _check_measured(candidate: Candidate) -> str:
    record = read_evaluation(candidate.folder / EVIDENCE / "evaluation")
    if OURS not in record.models:
        raise InputError(f"the evaluation holds no model {OURS!r}")
    if record.models[OURS].weights_sha256 != file_sha256(candidate.folder / MODEL / "unet" / WEIGHTS):
        raise InputError("the evaluation is of other weights than the version holds")
    if record.protocol.sets == 1:
        raise InputError("its FID and SSIM have no intervals: one set was drawn; set reference.sets to 2 or more")
    return f"protocol {record.protocol_id}, {record.protocol.sets} sets of {record.protocol.num_images} images"


def _check_protocol(record: EvaluationRecord, other: EvaluationRecord, champion: str) -> str:
    check_same(other.protocol, record.protocol, (champion, "this version"))
    if record.dense_sha256 != other.dense_sha256:
        raise InputError(
            f"{champion} and this version come from different dense models, so their SSIM does not compare"
        )
    return f"both under {record.protocol_id}"


def _half_width(found: Estimate) -> float:
    if found.half_width is None:
        raise InputError("it has no interval; set reference.sets to 2 or more")
    return found.half_width


def _check_fid(above: Estimate, tolerance: float, what: str) -> str:
    half_width = _half_width(above)
    worst = above.mean + half_width
    found = f"{above.mean:+.3g} ± {half_width:.2g} above {what}"
    return _demand(worst <= tolerance, f"{found}, so at most {worst:+.3g}", f"+{tolerance:g}")


def _check_ssim(above: Estimate, tolerance: float, what: str) -> str:
    half_width = _half_width(above)
    worst = above.mean - half_width
    found = f"{above.mean:+.3g} ± {half_width:.2g} above {what}"
    return _demand(worst >= -tolerance, f"{found}, so at least {worst:+.3g}", f"-{tolerance:g}")


def _read_costs(candidate: Candidate) -> CostsRecord:
    costs = read_costs(candidate.folder / EVIDENCE / "costs")
    if costs.weights_sha256.get(OURS) != file_sha256(candidate.folder / MODEL / "unet" / WEIGHTS):
        raise InputError(f"the costs of {candidate.uri} were measured on other weights than the version holds")
    return costs


def _find_cost(costs: CostsRecord, row: Latency) -> Cost:
    for cost in costs.costs:
        if (cost.model, cost.batch, cost.precision, cost.mode) == (OURS, row.batch, row.precision, row.mode):
            return cost
    asked = f"batch {row.batch}, {row.precision}, {row.mode}"
    raise InputError(f"no time was measured at {asked}; add it to costs.batches or change the policy")


def _speed_up(cost: Cost) -> tuple[float, float]:
    """The speed-up over the dense model and the lower end of its interval."""
    if cost.speed_up is None or cost.speed_up_low is None:
        raise InputError(f"no speed-up was measured at batch {cost.batch} ({cost.left_out or 'too few passes'})")
    return cost.speed_up, cost.speed_up_low


def _check_latency(costs: CostsRecord, row: Latency) -> str:
    speed_up, low = _speed_up(_find_cost(costs, row))
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}"
    return _demand(low >= row.speed_up, found, f"{row.speed_up:.2f} or more")


def _check_speed(costs: CostsRecord, other: CostsRecord, policy: Policy) -> str:
    ours, theirs = (_find_cost(it, policy.latency) for it in (costs, other))
    if ours.device != theirs.device:
        raise InputError(
            f"its time was measured on {ours.device}, the champion's on {theirs.device}; measure both on one"
        )
    (speed_up, low), (champion, _) = _speed_up(ours), _speed_up(theirs)
    least = champion * (1 - policy.champion.speed_up)
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}; the champion {champion:.2f}"
    return _demand(low >= least, found, f"{least:.2f} or more")


def check_canary(folder: Path, levels: float) -> str:
    """Load what the registry gave as a user would, draw, and compare with what it drew when it was registered.

    Args:
        folder: The version, downloaded.
        levels: Mean absolute difference that is allowed, in grey levels.

    Raises:
        InputError: It does not load, does not draw, draws something blank, or something else.
    """
    drawn = draw(folder, CANARY_SEEDS)
    if set(drawn) != set(CANARY_SEEDS):
        raise InputError(f"asked for pictures from seeds {CANARY_SEEDS}, it drew {tuple(sorted(drawn)) or 'none'}")
    worst = 0.0
    for seed, png in drawn.items():
        place = folder / EVIDENCE / "canary" / f"{seed}.png"
        if not place.is_file():
            raise InputError("the version lacks pictures to compare with; register it again")
        ours, theirs = _to_levels(png), _to_levels(place.read_bytes())
        if ours.shape != theirs.shape or ours.std() == 0:
            raise InputError(f"from seed {seed} it draws nothing, or another size than when it was registered")
        worst = max(worst, float(np.abs(ours - theirs).mean()))
    return _demand(worst <= levels, f"{len(drawn)} pictures, off by {worst:.3g} levels", f"{levels:g}")


def _to_levels(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    try:
        return np.asarray(Image.open(io.BytesIO(png)), dtype=np.float64)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"a picture of the canary is none ({first_line(error)})") from None
