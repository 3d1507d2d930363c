"""The records of evaluation and costs -> the results table and the sentences below it."""

from collections.abc import Mapping

from stages.protocol.costs import Cost, CostsRecord
from stages.protocol.evaluation import DENSE, EvaluationRecord, Metric
from stages.protocol.protocol import Protocol
from stages.report.markdown import markdown_table

HEADER = ["model", "params", "MACs", "FID", "FID to dense", "KID × 10³", "precision", "recall", "SSIM", "latency"]
ALIKE = "≈"
"""Marks a metric whose difference from dense lies within the interval of the difference."""


FEW = 100
"""Images of a set, or real ones, below which precision and recall are coarse."""


def to_rows(record: EvaluationRecord, costs: CostsRecord) -> list[list[str]]:
    """Format the numbers of each model, in the order of `HEADER`."""
    return [_row(name, record, costs) for name in record.models]


def _row(name: str, record: EvaluationRecord, costs: CostsRecord) -> list[str]:
    model, latency_ms = record.models[name], costs.first(name).median_ms
    return [
        name,
        f"{model.params / 1e6:.3f} M",
        write_count(model.macs),
        write_metric(model.fid, 3),
        write_fid_dense(name, record),
        write_metric(model.kid, 2, factor=1e3),
        write_metric(model.precision, 3),
        write_metric(model.recall, 3),
        write_metric(model.ssim, 3),
        "–" if latency_ms is None else f"{latency_ms:.2f} ms",
    ]


def write_count(macs: float) -> str:
    """Format a number of operations in millions or billions."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"  # noqa: PLR2004


def write_metric(found: Metric, digits: int, factor: float = 1) -> str:
    """Format a mean, its interval, and the mark `ALIKE` where it applies."""
    text = f"{found.mean * factor:.{digits}f}"
    if found.half_width:
        text += f" ± {found.half_width * factor:.{digits}f}"
    return f"{text} {ALIKE}" if found.above_dense and found.above_dense.is_distinct is False else text


def write_fid_dense(name: str, record: EvaluationRecord) -> str:
    """Format a model's FID to the dense model's images; the dense model has the floor instead, if there is one."""
    found = record.models[name].fid_dense
    if found is None:
        return "–"
    if name == DENSE and record.fid_dense_floor is not None:
        return f"floor {record.fid_dense_floor:.3f}"
    return write_metric(found, 3)


def write_speed_up(cost: Cost) -> str:
    """Format the speed-up over the dense model with its interval; a dash if it was not measured."""
    if cost.speed_up is None or cost.speed_up_low is None or cost.speed_up_high is None:
        return "–"
    low, high = cost.speed_up_low, cost.speed_up_high
    return f"{cost.speed_up:.2f}× ({low:.2f}–{high:.2f})" if low < high else f"{cost.speed_up:.2f}×"


def write_target(target: Mapping[str, float | str | None]) -> str:
    """Format a pruning target."""
    return ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)


def protocol_to_text(record: EvaluationRecord) -> str:
    """Describe the protocol, what the intervals cover, and where precision and recall show little."""
    return f"{describe_protocol(record)} {shares_to_text(record)}".rstrip()


def describe_protocol(record: EvaluationRecord) -> str:
    """Describe the protocol, and what the intervals cover."""
    protocol = record.protocol
    pooled = ", ".join(f"{name} {model.fid_pooled:.3f}" for name, model in record.models.items())
    intervals = (
        f"± is the 95 % interval over the {protocol.sets} sets; {ALIKE} marks a difference from dense within its own. "
        f"It does not show the bias that FID has from few images: of all sets as one FID is {pooled}."
        if protocol.sets > 1
        else "One set, so no intervals."
    )
    text = (
        f"Protocol {record.protocol_id}: {conditions_to_text(protocol, f'seed {protocol.seed}')} {intervals} FID of "
        f"one half of the real images against the other: {record.floor_fid:.3f}. {fid_dense_to_text(record)}"
    )
    return text.rstrip()


def shares_to_text(record: EvaluationRecord) -> str:
    """Say where precision and recall show little: on few images, and at 0 or 1; empty where they do not."""
    protocol, parts = record.protocol, []
    fewest = min(protocol.num_images, protocol.num_real_images)
    if fewest < FEW:
        parts.append(
            f"Precision and recall of {fewest} images are coarse: one image counts {1 / fewest:.1%}, and "
            f"neighbourhoods of so few images cover others by chance; {FEW} of a set and real ones are enough."
        )
    ends = [
        f"{name} of {model}"
        for name in ("precision", "recall")
        for model, found in record.models.items()
        if set(found.metric(name).sets) <= {0.0, 1.0}
    ]
    if ends:
        parts.append(
            f"A share of 0 or 1 in every set shows no further difference, and its missing interval is no certainty: "
            f"{', '.join(ends)}."
        )
    return " ".join(parts)


def fid_dense_to_text(record: EvaluationRecord) -> str:
    """Describe the column of FID to dense."""
    if record.models[DENSE].fid_dense is None:
        return "FID to dense is missing (–) in evaluations from before it was measured."
    has_floor = record.fid_dense_floor is not None
    meaning = "FID to dense: a model's images against the dense model's from the same noise"
    floor = "floor: two dense sets from different noise" if has_floor else "no floor, which needs two sets or more"
    return f"{meaning}; {floor}."


def conditions_to_text(protocol: Protocol, seeds: str) -> str:
    """Describe the sampling and the metrics of a protocol; `seeds` describes the seeds of one or more protocols."""
    sampler = protocol.sampler
    return (
        f"{protocol.sets} × {protocol.num_images} images, {seeds}, {sampler.scheduler} with {sampler.steps} steps "
        f"({sampler.spacing}), eta {sampler.eta:g}, {protocol.precision}; features of `{protocol.extractor}` "
        f"({protocol.extractor_sha256[:8]}) against {protocol.num_real_images} real images "
        f"({protocol.real_sha256[:8]}); KID over {protocol.kid_subsets} subsets of {protocol.kid_subset_size}. SSIM: "
        f"pairs from the same noise."
    )


def latency_to_text(costs: CostsRecord) -> str:
    """Describe the setting of the latency column."""
    return f"Latency: median of a pass, {setting_to_text(costs.costs[0])}."


def setting_to_text(cost: Cost) -> str:
    """Describe how a pass was timed."""
    return f"batch {cost.batch}, {cost.precision}, {cost.mode}, {cost.kernels}, {cost.device}"


def to_markdown(record: EvaluationRecord, costs: CostsRecord) -> str:
    """Write the table as Markdown, with the protocol below it."""
    table = markdown_table(HEADER, to_rows(record, costs))
    return f"{table}\n\n{protocol_to_text(record)} {latency_to_text(costs)}\n"
