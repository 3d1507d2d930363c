"""A version, the champion and a policy -> checks, each with what was found and what is allowed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.models.layout import PLAN, WEIGHTS, denoiser_name
from stages.protocol.costs import Cost, CostsRecord, read_costs
from stages.protocol.evaluation import DENSE, FID_DENSE, EvaluationRecord, Model, read_evaluation
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.register.canary import check_canary
from stages.register.lineage import read_lineage
from stages.register.package import check_files, check_formats
from stages.register.policy import Check, LatencyLimit, Policy, resolve_tolerance
from stages.register.registry import CONTENT, EVIDENCE, MODEL, OURS, WITHDRAWN
from stages.runtime.errors import InputError, first_line
from stages.storage.files import file_sha256


@dataclass(frozen=True)
class VersionFiles:
    """A downloaded version and its tags in the registry."""

    uri: str
    folder: Path
    tags: dict[str, str]


def run_checks(candidate: VersionFiles, champion: VersionFiles | None, policy: Policy) -> list[Check]:
    """Run all checks, the cheap ones first; checks that need the result of a failed one are left out.

    Args:
        candidate: The version that is to become the champion.
        champion: The current champion; None if there is none.
        policy: What is allowed.
    """
    integrity = [
        _run("not withdrawn", lambda: _check_not_withdrawn(candidate)),
        _run("untampered", lambda: _check_untampered(candidate)),
        _run("no pickle", lambda: _check_no_pickle(candidate)),
    ]
    if not all(check.passed for check in integrity):
        return integrity
    evidence = [
        _run("lineage", lambda: _check_lineage(candidate)),
        _run("measured with intervals", lambda: _check_measured(candidate)),
    ]
    if not evidence[-1].passed:
        return integrity + evidence
    checks = [*integrity, *evidence, *_run_measurement_checks(candidate, champion, policy)]
    if all(check.passed for check in checks):
        checks.append(_run("canary", lambda: check_canary(candidate.folder, policy.canary.levels)))
    return checks


def _run(name: str, check: Callable[[], str]) -> Check:
    """Run a check, which returns its reason or raises InputError."""
    try:
        return Check(name, passed=True, reason=check())
    except InputError as error:
        return Check(name, passed=False, reason=error.message)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # A file may have its registered hash and still hold something of the wrong type.
        return Check(name, passed=False, reason=f"the evidence is damaged ({first_line(error)})")


def _require(condition: bool, found: str, allowed: str) -> str:  # noqa: FBT001  # the condition is what is required
    """Return the reason of a check; raise it as an InputError if the condition does not hold."""
    text = f"{found}; allowed: {allowed}"
    if not condition:
        raise InputError(text)
    return text


def _run_measurement_checks(candidate: VersionFiles, champion: VersionFiles | None, policy: Policy) -> Iterator[Check]:
    record = read_evaluation(candidate.folder / EVIDENCE / "evaluation")
    if champion is not None:
        yield from _run_champion_checks(candidate, record, champion, policy)
    yield from run_limit_checks(record, lambda: _read_costs(candidate), policy)


def run_limit_checks(
    record: EvaluationRecord, read_costs: Callable[[], CostsRecord], policy: Policy
) -> Iterator[Check]:
    """Check the quality against the dense model, the budget and the latency, which need no registry."""
    model, dense = record.models[OURS], record.models[DENSE]
    fid = paired_difference(model.fid.sets, dense.fid.sets)
    yield _run("FID against dense", lambda: _check_fid(fid, _fid_limit(policy.dense.fid, record), "the dense model"))
    if (tolerance := policy.dense.fid_dense) is not None:
        yield _run("FID to dense", partial(_check_fid_dense, record, tolerance))
    ssim = estimate([value - 1 for value in model.ssim.sets])
    yield _run("SSIM against dense", lambda: _check_ssim(ssim, policy.dense.ssim, "1"))
    share, limit = model.macs / dense.macs, policy.budget.macs
    yield _run("budget", lambda: _require(share <= limit, f"{share:.1%} of the dense model's MACs", f"{limit:.1%}"))
    yield _run("latency", lambda: _check_latency(read_costs(), policy.latency))


def _run_champion_checks(
    candidate: VersionFiles, record: EvaluationRecord, champion: VersionFiles, policy: Policy
) -> Iterator[Check]:
    untampered = _run("champion untampered", lambda: f"{_check_untampered(champion)}; {_check_measured(champion)}")
    yield untampered
    if not untampered.passed:
        return
    other = read_evaluation(champion.folder / EVIDENCE / "evaluation")
    protocol = _run("same protocol", lambda: _check_protocol(record, other, champion.uri))
    yield protocol
    if not protocol.passed:
        return
    ours, theirs, allowed = record.models[OURS], other.models[OURS], policy.champion
    fid, ssim = (paired_difference(ours.metric(name).sets, theirs.metric(name).sets) for name in ("fid", "ssim"))
    yield _run("FID against champion", lambda: _check_fid(fid, _fid_limit(allowed.fid, record), "the champion"))
    if allowed.fid_dense is not None:
        yield _run("FID to dense against champion", partial(_check_fid_dense, record, allowed.fid_dense, theirs))
    yield _run("SSIM against champion", lambda: _check_ssim(ssim, allowed.ssim, "the champion's"))
    yield _run(
        "latency against champion",
        lambda: _check_speed(_read_costs(candidate), _read_costs(champion), policy.latency, allowed.speed_up),
    )


def _check_not_withdrawn(candidate: VersionFiles) -> str:
    withdrawn = candidate.tags.get(WITHDRAWN)
    if withdrawn:
        raise InputError(f"it was rolled back {withdrawn}; delete its tag {WITHDRAWN} to promote it again")
    return "it was never rolled back"


def _check_untampered(version: VersionFiles) -> str:
    check_files(version.folder, version.tags.get(CONTENT))
    return "every file has its registered hash"


def _check_no_pickle(candidate: VersionFiles) -> str:
    check_formats(candidate.folder)
    return "text, images and safetensors only, loaded by the code beside them"


def _check_lineage(candidate: VersionFiles) -> str:
    lineage = read_lineage(candidate.folder / EVIDENCE)
    for file, sha256 in lineage.files.items():
        if file_sha256(candidate.folder / EVIDENCE / file) != sha256:
            raise InputError(f"the lineage holds the hash of another {file} than the version's")
    for name in (f"{denoiser_name(candidate.folder / MODEL)}/{WEIGHTS}", PLAN):
        if lineage.outputs.get(f"artifacts/{OURS}/{name}") != file_sha256(candidate.folder / MODEL / name):
            raise InputError(f"the lineage holds the hash of another {name} than the version's")
    return f"commit {lineage.git_commit[:12]}, data {lineage.data_sha256[:12]}"


def _weights_sha256(version: VersionFiles) -> str:
    model = version.folder / MODEL
    return file_sha256(model / denoiser_name(model) / WEIGHTS)


def _check_measured(version: VersionFiles) -> str:
    record = read_evaluation(version.folder / EVIDENCE / "evaluation")
    if OURS not in record.models:
        raise InputError(f"the evaluation has no model {OURS!r}")
    if record.models[OURS].weights_sha256 != _weights_sha256(version):
        raise InputError("the evaluation measured other weights than the version's")
    if record.protocol.sets == 1:
        raise InputError("FID and SSIM have no intervals: one set was drawn; set reference.sets to 2 or more")
    return f"protocol {record.protocol_id}, {record.protocol.sets} sets of {record.protocol.num_images} images"


def _check_protocol(record: EvaluationRecord, other: EvaluationRecord, champion: str) -> str:
    check_same(other.protocol, record.protocol, (champion, "this version"))
    if record.dense_sha256 != other.dense_sha256:
        raise InputError(
            f"{champion} and this version come from different dense models, so their SSIM cannot be compared"
        )
    return f"both were measured under {record.protocol_id}"


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


def _fid_limit(tolerance: float | str, record: EvaluationRecord) -> FidLimit:
    """Return a tolerance of FID, whose scale is the dense model's FID or, where that is larger, the floor."""
    dense, floor = record.models[DENSE].fid.mean, record.floor_fid
    what = "the dense model's FID" if dense >= floor else "the FID of one half of the real images against the other"
    return _limit(tolerance, max(dense, floor), what)


def _limit(tolerance: float | str, scale: float, what: str) -> FidLimit:
    if isinstance(tolerance, str) and scale <= 0:
        raise InputError(f"the policy allows {tolerance} of {what}, which was not measured; give a FID as a number")
    return FidLimit(resolve_tolerance(tolerance, scale), scale, what, isinstance(tolerance, str))


def _check_fid(difference: Estimate, limit: FidLimit, baseline: str) -> str:
    half_width = _half_width(difference)
    worst = difference.mean + half_width
    found = f"{difference.mean:+.3g} ± {half_width:.2g} above {baseline}"
    return _require(worst <= limit.value, f"{found}, so at most {worst:+.3g}", str(limit))


def _check_fid_dense(record: EvaluationRecord, tolerance: float | str, theirs: Model | None = None) -> str:
    """Check the FID to the dense model's images, or how far it is above the champion's."""
    values = _fids_to_dense(record.models[OURS], "this version's")
    limit = _limit(tolerance, record.fid_dense_floor or 0, "the floor of FID to dense")
    if theirs is None:
        return _check_fid(estimate(values), limit, "0")
    difference = paired_difference(values, _fids_to_dense(theirs, "the champion's"))
    return _check_fid(difference, limit, "the champion's")


def _fids_to_dense(model: Model, whose: str) -> list[float]:
    if model.fid_dense is None:
        found = f"{whose} evaluation is from before {FID_DENSE} was measured"
        raise InputError(f"{found}; register it again from a new evaluation, or set {FID_DENSE} to null in the policy")
    return model.fid_dense.sets


def _check_ssim(difference: Estimate, tolerance: float, baseline: str) -> str:
    half_width = _half_width(difference)
    worst = difference.mean - half_width
    found = f"{difference.mean:+.3g} ± {half_width:.2g} above {baseline}"
    return _require(worst >= -tolerance, f"{found}, so at least {worst:+.3g}", f"-{tolerance:g}")


def _read_costs(version: VersionFiles) -> CostsRecord:
    costs = read_costs(version.folder / EVIDENCE / "costs")
    if costs.weights_sha256.get(OURS) != _weights_sha256(version):
        raise InputError(f"the costs of {version.uri} were measured on other weights than the version's")
    return costs


def _find_cost(costs: CostsRecord, row: LatencyLimit) -> Cost:
    for cost in costs.costs:
        if (cost.model, cost.batch, cost.precision, cost.mode) == (OURS, row.batch, row.precision, row.mode):
            return cost
    setting = f"batch {row.batch}, {row.precision}, {row.mode}"
    raise InputError(f"no latency was measured at {setting}; add it to costs.batches or change the policy")


def _speed_up(cost: Cost) -> tuple[float, float]:
    """Return the speed-up over the dense model and the lower end of its interval."""
    if cost.speed_up is None or cost.speed_up_low is None:
        raise InputError(f"no speed-up was measured at batch {cost.batch} ({cost.left_out or 'too few passes'})")
    return cost.speed_up, cost.speed_up_low


def _check_latency(costs: CostsRecord, limit: LatencyLimit) -> str:
    speed_up, low = _speed_up(_find_cost(costs, limit))
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}"
    return _require(low >= limit.speed_up, found, f"{limit.speed_up:.2f} or more")


def _check_speed(costs: CostsRecord, other: CostsRecord, row: LatencyLimit, tolerance: float) -> str:
    ours, theirs = (_find_cost(it, row) for it in (costs, other))
    if ours.device != theirs.device:
        raise InputError(
            f"its latency was measured on {ours.device}, the champion's on {theirs.device}; measure both on one device"
        )
    if ours.deterministic != theirs.deterministic:
        found = f"its latency was measured with {ours.kernels}, the champion's with {theirs.kernels}"
        raise InputError(f"{found}; measure both with the same costs.deterministic")
    (speed_up, low), (champion, _) = _speed_up(ours), _speed_up(theirs)
    least = champion * (1 - tolerance)
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}; the champion {champion:.2f}"
    return _require(low >= least, found, f"{least:.2f} or more")
