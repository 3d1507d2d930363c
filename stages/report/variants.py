"""Models, their variants and the times of both -> one table."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.protocol.costs import Cost, CostsRecord
from stages.protocol.evaluation import EvaluationRecord, Metric
from stages.protocol.variants import VariantsRecord
from stages.report.markdown import markdown_table
from stages.report.table import write_metric, write_speed_up
from stages.runtime.errors import InputError

VARIANTS_HEADER = [
    "variant",
    "on disk",
    "FID",
    "FID to dense",
    "KID × 10³",
    "SSIM",
    "SSIM to its model",
    "a step",
    "images/s",
    "peak memory",
    "speed-up",
]


@dataclass(frozen=True)
class VariantRow:
    """A model, or a variant of one."""

    name: str
    """Such as pruned, or pruned + int8."""
    model: str
    """The model itself."""
    size_bytes: int
    metrics: dict[str, Metric]
    ssim_to_model: Metric | None
    """SSIM with the images of the model itself; None of a model, and where it was not measured."""
    first: Cost
    """At the first batch size that was timed."""
    largest: Cost
    """At the largest one that was not left out."""


def join_variants(evaluation: EvaluationRecord, record: VariantsRecord, costs: CostsRecord | None) -> list[VariantRow]:
    """Join quality and times: each model of which there are variants, and the dense one, with its variants below it.

    Raises:
        InputError: The variants were measured under another protocol than the models, or the times are of others.
    """
    if not record.variants:
        return []
    if record.protocol_id != evaluation.protocol_id:
        found = f"variants were measured under protocol {record.protocol_id}, models under {evaluation.protocol_id}"
        raise InputError(f"{found}; run the variants stage again")
    hashes = {name: variant.sha256 for name, variant in record.variants.items()}
    hashes |= {name: model.weights_sha256 for name, model in evaluation.models.items()}
    if costs is None or costs.weights_sha256 != hashes:
        raise InputError("the times of the variants are missing, or are of others; run the costs stage first")
    rows = []
    for name, model in evaluation.models.items():
        own = {key: it for key, it in record.variants.items() if it.model == name}
        rows += [_row(name, name, model.size_bytes, model.metrics(), None, costs)]
        for key, variant in own.items():
            title = f"{name} + {variant.kind.title}"
            rows.append(_row(title, key, variant.size_bytes, variant.metrics, variant.ssim_to_model, costs))
    return rows


def _row(
    title: str,
    name: str,
    size_bytes: int,
    metrics: dict[str, Metric],
    ssim_to_model: Metric | None,
    costs: CostsRecord,
) -> VariantRow:
    own = [cost for cost in costs.costs if cost.model == name]
    timed = [cost for cost in own if cost.median_ms is not None] or own
    model = title.partition(" + ")[0]
    largest = max(timed, key=lambda cost: cost.batch)
    return VariantRow(title, model, size_bytes, metrics, ssim_to_model, own[0], largest)


def variants_to_rows(rows: Sequence[VariantRow]) -> list[list[str]]:
    """Format the rows, in the order of `VARIANTS_HEADER`."""
    return [_format(row) for row in rows]


def _format(row: VariantRow) -> list[str]:
    first, largest = row.first, row.largest
    fid_dense = row.metrics.get("fid_dense")
    return [
        row.name,
        f"{row.size_bytes / 1e6:.2f} MB",
        write_metric(row.metrics["fid"], 3),
        write_metric(fid_dense, 3) if fid_dense else "–",
        write_metric(row.metrics["kid"], 2, factor=1e3),
        write_metric(row.metrics["ssim"], 3),
        write_metric(row.ssim_to_model, 3) if row.ssim_to_model else "–",
        "–" if first.median_ms is None else f"{first.median_ms:.2f} ms",
        "–" if largest.images_per_s is None else f"{largest.images_per_s:.0f}",
        f"{first.peak_bytes / 2**20:.1f} MiB" if first.peak_bytes else "–",
        write_speed_up(first),
    ]


def variants_to_text(rows: Sequence[VariantRow]) -> str:
    """Describe what the columns hold."""
    first, largest = rows[0].first, rows[0].largest
    return (
        f"All rows under one protocol and from the same noise. SSIM: with the dense model's images; to its model: with "
        f"those of the model that a variant is made from. A step: median of a pass at batch {first.batch}, "
        f"float32, {first.kernels}, {first.device}; of a cache, mean over a full pass and those that reuse it. Graphs "
        f"run in ONNX Runtime on the CPU, with as many threads. Images/s: of one pass at batch {largest.batch}. "
        f"Speed-up: relative to dense, passes timed in turn. Peak memory: weights and activations alive at once; of a "
        f"graph the growth of a process that runs it. int8, int4 and float8 become float32 as they are read, so that "
        f"their times are those of the model."
    )


def variants_to_markdown(rows: Sequence[VariantRow]) -> str:
    """Write the table as Markdown, with its description below it."""
    return f"{markdown_table(VARIANTS_HEADER, variants_to_rows(rows))}\n\n{variants_to_text(rows)}\n"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of which no other one is lower in one coordinate and not higher in the other, in order."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
