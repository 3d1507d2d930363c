"""A version and the variant that the policy asks for -> checks, each with what was found and what is allowed."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stages.models.layout import WEIGHTS, denoiser_name
from stages.models.variants.folder import RECORD, read_variant_record, variant_file
from stages.protocol.costs import Cost, CostsRecord, read_variant_costs
from stages.protocol.evaluation import DENSE, FID_DENSE, EvaluationRecord
from stages.protocol.intervals import estimate, paired_difference
from stages.protocol.variants import Variant, VariantsRecord, read_variants
from stages.register.limits import check_fid, check_speed_up, check_ssim, fid_dense_limit, fid_limit, run_check
from stages.register.lineage import read_lineage
from stages.register.policy import Check, VariantLimit
from stages.register.registry import EVIDENCE, MODEL, OURS
from stages.register.variants import VARIANTS, held_kinds
from stages.runtime.errors import InputError
from stages.runtime.wording import count, format_bytes
from stages.storage.files import file_sha256


def run_variant_checks(version: Path, record: EvaluationRecord, limit: VariantLimit) -> Iterator[Check]:
    """Check that a version holds the variant of its own weights, and the limits of its quality and speed.

    Args:
        version: The downloaded version, whose files have their registered hashes.
        record: Its evaluation, in two sets or more.
        limit: What the policy asks for.
    """
    evidence = version / EVIDENCE
    held = run_check(f"variant {limit.parsed().name}", lambda: _check_held(version, limit))
    yield held
    if held.passed:
        costs = partial(read_variant_costs, evidence / "costs")
        yield from run_variant_limits(record, lambda: read_variants(evidence / "variants"), costs, limit)


def run_variant_limits(
    record: EvaluationRecord,
    read_record: Callable[[], VariantsRecord],
    read_costs: Callable[[], CostsRecord | None],
    limit: VariantLimit,
) -> Iterator[Check]:
    """Check how a variant was measured, and its quality and speed against the dense model's."""
    kind = limit.parsed().name
    measured = run_check(f"{kind} measured", lambda: _check_measured(record, read_record(), kind))
    yield measured
    if not measured.passed:
        return
    variant, dense = _find(read_record(), kind), record.models[DENSE]
    sets = {name: metric.sets for name, metric in variant.metrics.items()}
    fid = paired_difference(sets["fid"], dense.fid.sets)
    most = partial(fid_limit, limit.fid, record)
    yield run_check(f"FID of {kind} against dense", lambda: check_fid(fid, most(), "the dense model"))
    if (tolerance := limit.fid_dense) is not None:
        found = estimate(sets[FID_DENSE])
        name = f"FID of {kind} to dense"
        yield run_check(name, lambda: check_fid(found, fid_dense_limit(tolerance, record), "0"))
    ssim = estimate([value - 1 for value in sets["ssim"]])
    yield run_check(f"SSIM of {kind} against dense", lambda: check_ssim(ssim, limit.ssim, "1"))
    if (least := limit.speed_up) is not None:
        yield run_check(
            f"latency of {kind}", lambda: check_speed_up(_find_cost(read_costs(), variant, limit.batch), least)
        )


def _check_held(version: Path, limit: VariantLimit) -> str:
    """Check that the variant is there, is the one that was made and measured, and was made from these weights."""
    kind, model = limit.parsed(), version / MODEL
    folder = version / VARIANTS / kind.name
    if not folder.is_dir():
        held = ", ".join(held_kinds(version)) or "none"
        raise InputError(
            f"the version holds {held}; add {kind.name} to variants.kinds, run the pipeline and register it"
        )
    record, weights = read_variant_record(folder), file_sha256(model / denoiser_name(model) / WEIGHTS)
    if (record.model, record.kind, record.weights_sha256) != (OURS, kind, weights):
        raise InputError(f"{RECORD} says that it is {record.name} of other weights, or another variant")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if record.files != {name: file_sha256(path) for name, path in files.items() if name != RECORD}:
        raise InputError(f"its files are not those that {RECORD} names")
    file = variant_file(folder)
    path, sha256 = f"{VARIANTS}/{record.name}/{file.relative_to(folder).as_posix()}", file_sha256(file)
    if read_lineage(version / EVIDENCE).outputs.get(path) != sha256:
        raise InputError(f"the lineage holds the hash of another {file.name} than the variant's")
    if _find(read_variants(version / EVIDENCE / "variants"), kind.name).sha256 != sha256:
        raise InputError(f"another {file.name} than the variant's was measured")
    return f"{record.name}, {format_bytes(file.stat().st_size)}, of the version's weights"


def _find(record: VariantsRecord, kind: str) -> Variant:
    name = f"{OURS}+{kind}"
    if name not in record.variants:
        raise InputError(f"{name} was not measured; measured: {', '.join(record.variants) or 'no variant'}")
    return record.variants[name]


def _check_measured(record: EvaluationRecord, found: VariantsRecord, kind: str) -> str:
    """Check that a variant was measured in the sets of the evaluation, from which those of the dense model are."""
    variant, protocol = _find(found, kind), record.protocol
    if found.protocol_id != record.protocol_id:
        raise InputError(f"it was measured under {found.protocol_id}, the model under {record.protocol_id}")
    if odd := [name for name, metric in variant.metrics.items() if len(metric.sets) != protocol.sets]:
        sets = count(len(variant.metrics[odd[0]].sets), "set")
        raise InputError(f"its {odd[0]} was measured in {sets}, and the protocol has {protocol.sets}")
    return f"protocol {found.protocol_id}, {count(protocol.sets, 'set')} of {protocol.num_images} images"


def _find_cost(costs: CostsRecord | None, variant: Variant, batch: int) -> Cost:
    name = f"{variant.model}+{variant.kind.name}"
    if costs is None or name not in costs.weights_sha256:
        raise InputError("it was not timed; run the costs stage again")
    if costs.weights_sha256[name] != variant.sha256:
        raise InputError("another file than the one that was measured was timed; run the costs stage again")
    for cost in costs.costs:
        if (cost.model, cost.batch) == (name, batch):
            return cost
    raise InputError(f"it was not timed at batch {batch}; add it to costs.batches or change the policy")
