"""A version, the champion and a policy -> checks, each with what was found and what is allowed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.models.layout import PLAN, WEIGHTS, denoiser_name
from stages.protocol.costs import Cost, CostsRecord, read_costs
from stages.protocol.evaluation import DENSE, FID_DENSE, EvaluationRecord, Model, read_evaluation
from stages.protocol.intervals import estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.register.canary import check_canary
from stages.register.limits import (
    check_fid,
    check_speed_up,
    check_ssim,
    fid_dense_limit,
    fid_limit,
    read_speed_up,
    require,
    run_check,
)
from stages.register.lineage import read_lineage
from stages.register.package import check_files, check_formats
from stages.register.policy import Check, LatencyLimit, Policy
from stages.register.registry import CONTENT, EVIDENCE, MODEL, OURS, WITHDRAWN
from stages.register.variant_canary import check_runtime, check_variant_canary
from stages.register.variant_checks import run_variant_checks
from stages.register.variants import held_kinds
from stages.runtime.errors import InputError
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

    Raises:
        InputError: The version holds a graph, and this machine lacks a package that runs it.
    """
    check_runtime(candidate.folder)
    integrity = [
        run_check("not withdrawn", lambda: _check_not_withdrawn(candidate)),
        run_check("untampered", lambda: _check_untampered(candidate)),
        run_check("no pickle", lambda: _check_no_pickle(candidate)),
    ]
    if not all(check.passed for check in integrity):
        return integrity
    evidence = [
        run_check("lineage", lambda: _check_lineage(candidate)),
        run_check("measured with intervals", lambda: _check_measured(candidate)),
    ]
    if not evidence[-1].passed:
        return integrity + evidence
    checks = [*integrity, *evidence, *_run_measurement_checks(candidate, champion, policy)]
    for name, draw in _canaries(candidate.folder, policy):
        if all(check.passed for check in checks):
            checks.append(run_check(name, draw))
    return checks


def _canaries(version: Path, policy: Policy) -> Iterator[tuple[str, Callable[[], str]]]:
    """List the canaries, of the model and of every variant in the version: name and function of the check.

    A graph that the policy asks for has to draw what the weights draw, within its own tolerance.
    """
    levels, asked = policy.canary.levels, policy.variant and policy.variant.parsed()
    yield "canary", partial(check_canary, version, levels)
    for kind in held_kinds(version):
        if asked and asked.is_graph and asked.name == kind:
            assert policy.variant
            yield f"canary of {kind}", partial(check_canary, version, policy.variant.levels, variant=kind)
        else:
            yield f"canary of {kind}", partial(check_variant_canary, version, kind, levels)


def _run_measurement_checks(candidate: VersionFiles, champion: VersionFiles | None, policy: Policy) -> Iterator[Check]:
    record = read_evaluation(candidate.folder / EVIDENCE / "evaluation")
    if champion is not None:
        yield from _run_champion_checks(candidate, record, champion, policy)
    yield from run_limit_checks(record, lambda: _read_costs(candidate), policy)
    if policy.variant is not None:
        yield from run_variant_checks(candidate.folder, record, policy.variant)


def run_limit_checks(
    record: EvaluationRecord, read_costs: Callable[[], CostsRecord], policy: Policy
) -> Iterator[Check]:
    """Check the quality against the dense model, the budget and the latency, which need no registry."""
    model, dense = record.models[OURS], record.models[DENSE]
    fid = paired_difference(model.fid.sets, dense.fid.sets)
    yield run_check("FID against dense", lambda: check_fid(fid, fid_limit(policy.dense.fid, record), "the dense model"))
    if (tolerance := policy.dense.fid_dense) is not None:
        yield run_check("FID to dense", partial(_check_fid_dense, record, tolerance))
    ssim = estimate([value - 1 for value in model.ssim.sets])
    yield run_check("SSIM against dense", lambda: check_ssim(ssim, policy.dense.ssim, "1"))
    share, limit = model.macs / dense.macs, policy.budget.macs
    yield run_check("budget", lambda: require(share <= limit, f"{share:.1%} of the dense model's MACs", f"{limit:.1%}"))
    row = policy.latency
    yield run_check("latency", lambda: check_speed_up(_find_cost(read_costs(), row), row.speed_up))


def _run_champion_checks(
    candidate: VersionFiles, record: EvaluationRecord, champion: VersionFiles, policy: Policy
) -> Iterator[Check]:
    untampered = run_check("champion untampered", lambda: f"{_check_untampered(champion)}; {_check_measured(champion)}")
    yield untampered
    if not untampered.passed:
        return
    other = read_evaluation(champion.folder / EVIDENCE / "evaluation")
    protocol = run_check("same protocol", lambda: _check_protocol(record, other, champion.uri))
    yield protocol
    if not protocol.passed:
        return
    ours, theirs, allowed = record.models[OURS], other.models[OURS], policy.champion
    fid, ssim = (paired_difference(ours.metric(name).sets, theirs.metric(name).sets) for name in ("fid", "ssim"))
    yield run_check("FID against champion", lambda: check_fid(fid, fid_limit(allowed.fid, record), "the champion"))
    if allowed.fid_dense is not None:
        yield run_check("FID to dense against champion", partial(_check_fid_dense, record, allowed.fid_dense, theirs))
    yield run_check("SSIM against champion", lambda: check_ssim(ssim, allowed.ssim, "the champion's"))
    yield run_check(
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
    graphs = check_formats(candidate.folder)
    formats = "text, images, safetensors and graphs of variants" if graphs else "text, images and safetensors"
    return f"{formats} only, loaded by the code beside them"


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


def _check_fid_dense(record: EvaluationRecord, tolerance: float | str, theirs: Model | None = None) -> str:
    """Check the FID to the dense model's images, or how far it is above the champion's."""
    values = _fids_to_dense(record.models[OURS], "this version's")
    limit = fid_dense_limit(tolerance, record)
    if theirs is None:
        return check_fid(estimate(values), limit, "0")
    difference = paired_difference(values, _fids_to_dense(theirs, "the champion's"))
    return check_fid(difference, limit, "the champion's")


def _fids_to_dense(model: Model, whose: str) -> list[float]:
    if model.fid_dense is None:
        found = f"{whose} evaluation is from before {FID_DENSE} was measured"
        raise InputError(f"{found}; register it again from a new evaluation, or set {FID_DENSE} to null in the policy")
    return model.fid_dense.sets


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


def _check_speed(costs: CostsRecord, other: CostsRecord, row: LatencyLimit, tolerance: float) -> str:
    ours, theirs = (_find_cost(it, row) for it in (costs, other))
    if ours.device != theirs.device:
        raise InputError(
            f"its latency was measured on {ours.device}, the champion's on {theirs.device}; measure both on one device"
        )
    if ours.deterministic != theirs.deterministic:
        found = f"its latency was measured with {ours.kernels}, the champion's with {theirs.kernels}"
        raise InputError(f"{found}; measure both with the same costs.deterministic")
    (speed_up, low), (champion, _) = read_speed_up(ours), read_speed_up(theirs)
    least = champion * (1 - tolerance)
    found = f"{speed_up:.2f} times as fast as dense, at least {low:.2f}; the champion {champion:.2f}"
    return require(low >= least, found, f"{least:.2f} or more")
