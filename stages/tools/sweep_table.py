"""Compressions of one dense model -> a table and a plot of quality against cost, with the best cells named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, Model
from stages.protocol.protocol import check_same
from stages.protocol.variants import VariantsRecord
from stages.protocol.verdict import FINETUNED, Verdict, judge
from stages.report.figures import COLOURS, plain_log
from stages.report.legend import legend_above
from stages.report.markdown import markdown_table
from stages.report.table import latency_to_text, protocol_to_text, write_count, write_fid_dense, write_metric
from stages.tools.cells import FinishedCell, read_cells
from stages.tools.table_files import Lead, write_table_files
from stages.tools.variants_over_seeds import read_variants_of_cells, variants_to_numbers

DODGE = 0.01
"""Horizontal distance between points of two colours at one budget, as a share of the dense model's MACs."""


@dataclass(frozen=True)
class Point(FinishedCell):
    """One cell on the plane of FID and MACs."""

    @property
    def model(self) -> Model:
        """The finetuned model."""
        return self.record.models[FINETUNED]

    @property
    def share(self) -> float:
        """Its MACs over those of the dense model."""
        return 1 / self.record.macs_ratio(FINETUNED)

    @property
    def is_like_dense(self) -> bool:
        """Whether the interval of its FID difference from the dense model contains zero; needs at least two sets."""
        difference = self.model.fid.above_dense
        return difference is not None and difference.is_distinct is False

    def label(self) -> str:
        """Write the cell's overrides, each key by its last word."""
        return write_overrides(self.note.overrides)


def read_points(folder: Path) -> list[Point]:
    """Read all cells below a folder, ordered by MACs, then by FID.

    Raises:
        InputError: The folder holds no cell, a cell is damaged, or two cells differ in their protocol.
    """
    points = [Point(**vars(cell)) for cell in read_cells(folder)]
    first = points[0]
    for other in points[1:]:
        check_same(first.record.protocol, other.record.protocol, (first.label(), other.label()))
    return sorted(points, key=_macs_and_fid)


def _macs_and_fid(point: Point) -> tuple[int, float]:
    return point.model.macs, point.model.fid.mean


def write_overrides(overrides: Mapping[str, Any]) -> str:
    """Write overrides, each key by its last word: criterion random, macs 56%."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in overrides.items())


def _swept_keys(points: Sequence[Point]) -> list[str]:
    """List the override keys whose values differ between cells; a single cell gives all of its keys."""
    first, *others = (point.note.overrides for point in points)
    return [key for key in first if not others or any(other.get(key) != first[key] for other in others)]


def find_front(points: Sequence[Point]) -> list[Point]:
    """Find the Pareto front of MACs and FID, ordered by MACs."""
    front: list[Point] = []
    for point in sorted(points, key=_macs_and_fid):
        if not front or point.model.fid.mean < front[-1].model.fid.mean:
            front.append(point)
    return front


def rank(front: Sequence[Point]) -> list[Point]:
    """Order a front, the best first: points like dense by MACs, then the others by FID."""
    alike = sorted((point for point in front if point.is_like_dense), key=lambda point: point.model.macs)
    others = sorted((point for point in front if not point.is_like_dense), key=lambda point: point.model.fid.mean)
    return [*alike, *others]


def to_rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """Write the table's texts, one row per cell: column -> text."""
    front, keys = {point.name for point in find_front(points)}, _swept_keys(points)
    return [
        {
            **{key: str(point.note.overrides.get(key)) for key in keys},
            "MACs": f"{write_count(point.model.macs)} ({point.share:.1%})",
            "params": f"{point.model.params / 1e6:.3f} M",
            "FID": write_metric(point.model.fid, 3),
            "FID to dense": write_fid_dense(FINETUNED, point.record),
            "KID × 10³": write_metric(point.model.kid, 2, factor=1e3),
            "SSIM": write_metric(point.model.ssim, 3),
            "latency": "–" if (ms := point.costs.first(FINETUNED).median_ms) is None else f"{ms:.2f} ms",
            "front": "●" if point.name in front else "",
            "MLflow run": point.note.mlflow_run,
        }
        for point in points
    ]


def _variant_rows(points: Sequence[Point], records: Mapping[str, VariantsRecord]) -> list[dict[str, str]]:
    """Write the texts of all variants: column -> text; those of the dense model stand once, first.

    Args:
        points: The cells.
        records: Cell -> its variants; cells without are left out.
    """
    having = [point for point in points if point.name in records]
    found = [(point, it) for point in having for it in records[point.name].variants.values() if it.model != DENSE]
    dense = [(None, it) for point in having[:1] for it in records[point.name].variants.values() if it.model == DENSE]
    keys = _swept_keys(points)
    return [
        {
            **{key: str(point.note.overrides.get(key)) if point else "–" for key in keys},
            "variant": f"{it.model} + {it.kind.title}",
            "on disk": f"{it.size_bytes / 1e6:.2f} MB",
            "FID": write_metric(it.metrics["fid"], 3),
            "FID to dense": write_metric(it.metrics["fid_dense"], 3),
            "KID × 10³": write_metric(it.metrics["kid"], 2, factor=1e3),
            "SSIM": write_metric(it.metrics["ssim"], 3),
        }
        for point, it in [*dense, *found]
    ]


def to_markdown(points: Sequence[Point], records: Mapping[str, VariantsRecord] | None = None) -> str:
    """Write the table, followed by the overrides that all cells share, the dense model, the protocol and variants."""
    rows = to_rows(points)
    table = markdown_table(list(rows[0]), [row.values() for row in rows], text_columns=len(rows[0]))
    record = points[0].record
    dense = record.models[DENSE]
    same = {key: value for key, value in points[0].note.overrides.items() if key not in _swept_keys(points)}
    latency = " ".join(dict.fromkeys(latency_to_text(point.costs) for point in points))
    common = f"All cells: {write_overrides(same)}. " if same else ""
    return (
        f"{table}\n\n{common}● no other cell has both fewer MACs and a lower FID. Dense: {write_count(dense.macs)} "
        f"MACs, FID {write_metric(dense.fid, 3)}. Each cell is one training, so the intervals do not cover the "
        f"variation between seeds. {protocol_to_text(record)} {latency}\n{_variants_to_text(points, records or {})}"
    )


def _variants_to_text(points: Sequence[Point], records: Mapping[str, VariantsRecord]) -> str:
    rows = _variant_rows(points, records)
    if not rows:
        return ""
    table = markdown_table(list(rows[0]), [row.values() for row in rows], text_columns=len(rows[0]))
    return f"\n## Variants\n\n{table}\n\nUnder the protocol of the models above, from the same noise.\n"


def to_json(points: Sequence[Point]) -> dict[str, Any]:
    """Make the content of sweep_table.json: the table's texts, and the names of the front's cells, the best first."""
    rows = to_rows(points)
    return {
        "header": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "best": [point.name for point in rank(find_front(points))],
    }


def _numbers(point: Point, variants: VariantsRecord | None) -> dict[str, Any]:
    metrics = point.model.metrics()
    latency = point.costs.first(FINETUNED)
    return {
        **point.note.overrides,
        "macs": point.model.macs,
        "macs_share": point.share,
        "params": point.model.params,
        **{name: metric.mean for name, metric in metrics.items()},
        **{f"{name}_interval": metric.half_width for name, metric in metrics.items()},
        "latency_ms": latency.median_ms,
        "latency_precision": latency.precision,
        "latency_deterministic": latency.deterministic,
        **(variants_to_numbers(variants) if variants else {}),
        "ran": " ".join(point.note.ran),
        "mlflow_run": point.note.mlflow_run,
        "protocol": point.record.protocol_id,
    }


def draw(axis: Axes, points: Sequence[Point]) -> None:
    """Draw FID over MACs with the front as a dotted line; each value of the first swept key has one colour."""
    dense = points[0].record.models[DENSE]
    style: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}
    axis.errorbar(
        dense.macs / 1e6, dense.fid.mean, yerr=dense.fid.half_width, color=COLOURS[DENSE], label="dense", **style
    )
    first_key = next(iter(_swept_keys(points)), "")
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(str(point.note.overrides.get(first_key)), []).append(point)
    palette = mpl.color_sequences["Dark2"]
    for index, (name, members) in enumerate(groups.items()):
        offset = (index - (len(groups) - 1) / 2) * DODGE * dense.macs / 1e6
        axis.errorbar(
            [point.model.macs / 1e6 + offset for point in members],
            [point.model.fid.mean for point in members],
            yerr=[point.model.fid.half_width or 0 for point in members],
            color=palette[index % len(palette)],
            label=name,
            **style,
        )
    edge, front = mpl.rcParams["axes.edgecolor"], [_macs_and_fid(point) for point in find_front(points)]
    axis.plot([macs / 1e6 for macs, _ in front], [fid for _, fid in front], ":", color=edge, zorder=0)
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    legend_above(axis)


def make_lead(points: Sequence[Point]) -> Lead:
    """Make what the page begins with: the verdict on the best cell, and those on all cells as reasons."""
    best = rank(find_front(points))[0]
    verdict = judge(best.record, best.costs, FINETUNED)
    reasons = [f"{point.label()}: {judge(point.record, point.costs, FINETUNED).sentence}" for point in points]
    sentence = f"Best of {len(points)}, {best.label()}: {verdict.sentence}" if len(points) > 1 else verdict.sentence
    found = Verdict(level=verdict.level, sentence=sentence, reasons=tuple(reasons))
    return Lead("Sweep: quality against cost", found, {"pareto": "FID over MACs of each cell, with 95 % intervals"})


def write_sweep_table(cells: Path, out: Path) -> None:
    """Write index.html, table.md, table.csv, sweep_table.json, pareto.svg and pareto.png.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    points = read_points(cells)
    records = read_variants_of_cells(cells, points)
    numbers = [_numbers(point, records.get(point.name)) for point in points]
    plots = {"pareto": lambda axis: draw(axis, points)}
    markdown = to_markdown(points, records)
    write_table_files(out, "sweep_table", make_lead(points), markdown, numbers, to_json(points), plots)
