"""Compressions of one dense model -> one table and one plot of quality against cost, and which of them are best."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, METRICS, Model
from stages.protocol.protocol import check_same
from stages.report.figures import COLOURS, draw_figure, plain_log
from stages.report.table import protocol_to_text, write_count, write_metric
from stages.storage.files import write_json, writing
from stages.storage.provenance import write_run_record
from stages.tools.cells import FinishedCell, read_cells

OURS = "finetuned"
DODGE = 0.01
"""Of the dense model's MACs, between the points of two colours, which would hide each other where budgets are equal."""


@dataclass(frozen=True)
class Point(FinishedCell):
    """One cell on the plane of quality and cost."""

    @property
    def model(self) -> Model:
        """The finetuned model."""
        return self.record.models[OURS]

    @property
    def share(self) -> float:
        """Its MACs over those of the dense model."""
        return 1 / self.record.macs_ratio(OURS)

    @property
    def is_like_dense(self) -> bool:
        """Whether its FID cannot be told from the dense model's; needs two sets or more."""
        difference = self.model.fid.above_dense
        return difference is not None and difference.is_distinct is False

    def label(self) -> str:
        """Write what was set, with the last word of each key."""
        return write_overrides(self.cell.overrides)


def read_points(folder: Path) -> list[Point]:
    """Read all cells below a folder, the cheapest first.

    Raises:
        InputError: There is none, one is damaged, or they were not measured by one protocol.
    """
    points = [Point(**vars(cell)) for cell in read_cells(folder)]
    first = points[0]
    for other in points[1:]:
        check_same(first.record.protocol, other.record.protocol, (first.label(), other.label()))
    return sorted(points, key=lambda point: (point.model.macs, point.model.fid.mean))


def write_overrides(overrides: Mapping[str, Any]) -> str:
    """Write overrides with the last word of each key: criterion random, macs 56%."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in overrides.items())


def _vary(points: Sequence[Point]) -> list[str]:
    """Name the keys that tell cells apart; all of a single one."""
    first = points[0].cell.overrides
    return [key for key in first if len(points) == 1 or any(it.cell.overrides.get(key) != first[key] for it in points)]


def find_front(points: Sequence[Point]) -> list[Point]:
    """Give those that no other beats in both MACs and FID, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda it: (it.model.macs, it.model.fid.mean)):
        if not front or point.model.fid.mean < front[-1].model.fid.mean:
            front.append(point)
    return front


def rank(front: Sequence[Point]) -> list[Point]:
    """Put the best of a front first: the smallest that cannot be told from dense, failing that the lowest FID."""
    alike = sorted((point for point in front if point.is_like_dense), key=lambda it: it.model.macs)
    rest = sorted((point for point in front if not point.is_like_dense), key=lambda it: it.model.fid.mean)
    return [*alike, *rest]


def to_rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """Write one row a cell."""
    front, keys = {point.name for point in find_front(points)}, _vary(points)
    return [
        {
            **{key: str(point.cell.overrides.get(key)) for key in keys},
            "MACs": f"{write_count(point.model.macs)} ({point.share:.1%})",
            "params": f"{point.model.params / 1e6:.3f} M",
            "FID": write_metric(point.model.fid, 3),
            "KID × 10³": write_metric(point.model.kid, 2, factor=1e3),
            "SSIM": write_metric(point.model.ssim, 3),
            "latency": "–" if (ms := point.costs.first(OURS).median_ms) is None else f"{ms:.2f} ms",
            "front": "●" if point.name in front else "",
            "MLflow run": point.cell.mlflow_run,
        }
        for point in points
    ]


def to_markdown(points: Sequence[Point]) -> str:
    """Write the table, with the dense model and the protocol below it."""
    rows = to_rows(points)
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([row.get(key, "") for key in header] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    record = points[0].record
    dense = record.models[DENSE]
    same = {key: value for key, value in points[0].cell.overrides.items() if key not in _vary(points)}
    common = f"All cells: {write_overrides(same)}. " if same else ""
    return (
        f"{table}\n\n{common}● no other has both fewer MACs and a lower FID. Dense: {write_count(dense.macs)} MACs, "
        f"FID {write_metric(dense.fid, 3)}. Each cell is one training, so the intervals do not cover what another seed "
        f"would change. {protocol_to_text(record)}\n"
    )


def to_csv(points: Sequence[Point]) -> str:
    """Write the numbers themselves, one row a cell."""
    target = io.StringIO()
    rows = [_numbers(point) for point in points]
    writer = csv.DictWriter(target, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def _numbers(point: Point) -> Mapping[str, Any]:
    found = {name: point.model.metric(name) for name in METRICS}
    return {
        **point.cell.overrides,
        "macs": point.model.macs,
        "macs_share": point.share,
        "params": point.model.params,
        **{name: metric.mean for name, metric in found.items()},
        **{f"{name}_interval": metric.half_width for name, metric in found.items()},
        "latency_ms": point.costs.first(OURS).median_ms,
        "ran": " ".join(point.cell.ran),
        "mlflow_run": point.cell.mlflow_run,
        "protocol": point.record.protocol_id,
    }


def draw(axis: Axes, points: Sequence[Point]) -> None:
    """Draw FID over MACs, a colour for each value of the first key, a line along the front: below, left is better."""
    dense = points[0].record.models[DENSE]
    style: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}
    axis.errorbar(
        dense.macs / 1e6, dense.fid.mean, yerr=dense.fid.half_width, color=COLOURS[DENSE], label="dense", **style
    )
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(str(point.cell.overrides.get(next(iter(_vary(points)), ""))), []).append(point)
    palette = mpl.color_sequences["Dark2"]
    for index, (name, members) in enumerate(families.items()):
        aside = (index - (len(families) - 1) / 2) * DODGE * dense.macs / 1e6
        axis.errorbar(
            [point.model.macs / 1e6 + aside for point in members],
            [point.model.fid.mean for point in members],
            yerr=[point.model.fid.half_width or 0 for point in members],
            color=palette[index % len(palette)],
            label=name,
            **style,
        )
    front = find_front(points)
    edge = mpl.rcParams["axes.edgecolor"]
    axis.plot([it.model.macs / 1e6 for it in front], [it.model.fid.mean for it in front], ":", color=edge, zorder=0)
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    axis.legend()


def write_sweep_table(cells: Path, out: Path) -> None:
    """Write table.md, table.csv, pareto.svg, pareto.png and sweep_table.json, with the names of the best cells in it.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    points = read_points(cells)
    with writing(out) as folder:
        (folder / "table.md").write_text(to_markdown(points))
        (folder / "table.csv").write_text(to_csv(points))
        rows = to_rows(points)
        about = {
            "header": list(rows[0]),
            "rows": [list(row.values()) for row in rows],
            "best": [point.name for point in rank(find_front(points))],
        }
        write_json(folder / "sweep_table.json", about)
        for kind in ("svg", "png"):
            (folder / f"pareto.{kind}").write_bytes(draw_figure(lambda axis: draw(axis, points), "light", kind))
        write_run_record(folder, "tools")
