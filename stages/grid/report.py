"""The record of a grid -> grid.json, grid.csv, its tables as Markdown, the heatmaps and a page."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from stages.grid.params import GridParams
from stages.protocol.evaluation import DENSE, Metric
from stages.protocol.grid import SSIM, SSIM_PROTOCOL, GridCell, GridRecord, fid_apart
from stages.protocol.verdict import Verdict
from stages.report.figures import draw_figure
from stages.report.grid_figure import CAPTIONS, PLOTS, draw_grid_figures
from stages.report.grid_text import explain, summarise
from stages.report.markdown import markdown_table
from stages.report.table import ALIKE, write_count, write_metric
from stages.report.table_page import write_table_page
from stages.storage.files import write_csv, write_json
from stages.storage.provenance import write_run_record

TITLE = "Steps and guidance"
HEADER = ["model", "sampler", "steps", "MACs", "FID", "FID to dense", "KID × 10³", "precision", "recall", "SSIM"]
LAST = "SSIM to protocol"


def write_report(grid: GridRecord, params: GridParams, folder: Path) -> None:
    """Write all files of a grid into a folder that exists."""
    write_json(folder / "grid.json", grid.model_dump(mode="json"))
    write_csv(folder / "grid.csv", pd.DataFrame([dict(_numbers(cell)) for cell in grid.cells], dtype=object))
    markdown = to_markdown(grid)
    (folder / "table.md").write_text(markdown)
    figures = draw_grid_figures(grid)
    for name, draw in PLOTS.items():
        (folder / f"{name}.svg").write_bytes(figures[name]["light"])
        (folder / f"{name}.png").write_bytes(draw_figure(partial(draw, grid=grid), "light", "png"))
    files = sorted(path.name for path in folder.iterdir())
    page = write_table_page(TITLE, make_verdict(grid), markdown, figures, CAPTIONS, files)
    (folder / "index.html").write_text(page)
    write_run_record(folder, "grid", grid=params)


def make_verdict(grid: GridRecord) -> Verdict:
    """Make what the page begins with: good if at its best no pruned model has an FID distinctly above dense's best."""
    apart = [fid_apart(grid.best(name), grid.best(DENSE)) for name in grid.others]
    is_worse = any(it.is_distinct and it.mean > 0 for it in apart)
    level = "changed" if is_worse or grid.protocol.sets == 1 else "good"
    return Verdict(level=level, sentence=summarise(grid), reasons=tuple(explain(grid)))


def _numbers(cell: GridCell) -> Iterator[tuple[str, object]]:
    """Yield the unrounded numbers of a cell: column -> value."""
    for key in ("model", "sampler", "steps", "guidance", "calls", "macs", "protocol_id"):
        yield key, getattr(cell, key)
    for name, metric in cell.metrics.items():
        yield name, metric.mean
        yield f"{name}_interval", metric.half_width
        if metric.above_dense:
            yield f"{name}_above_dense", metric.above_dense.mean
            yield f"{name}_above_dense_interval", metric.above_dense.half_width


def to_markdown(grid: GridRecord) -> str:
    """Write the table of all cells, what follows from it, and how it was measured."""
    rows = [_row(cell) for cell in grid.cells]
    conditions = _conditions(grid)
    reasons = "\n\n".join(explain(grid))
    table = markdown_table([*HEADER, LAST], rows, text_columns=2)
    return f"# {TITLE}\n\n{summarise(grid)}\n\n{reasons}\n\n## All cells\n\n{table}\n\n{conditions}\n"


def _row(cell: GridCell) -> list[str]:
    metrics = cell.metrics
    return [
        cell.model,
        cell.row,
        str(cell.steps),
        write_count(cell.macs),
        write_metric(metrics["fid"], 3),
        _write(metrics.get("fid_dense"), 3),
        write_metric(metrics["kid"], 2, factor=1e3),
        write_metric(metrics["precision"], 3),
        write_metric(metrics["recall"], 3),
        _write(metrics.get(SSIM), 3),
        write_metric(metrics[SSIM_PROTOCOL], 3),
    ]


def _write(found: Metric | None, digits: int) -> str:
    return "–" if found is None else write_metric(found, digits)


def _conditions(grid: GridRecord) -> str:
    protocol, own = grid.protocol, grid.protocol.sampler
    guided = "" if protocol.guidance is None else f", guidance {protocol.guidance:g}"
    setting = f"{own.steps} steps of {own.scheduler} {own.spacing}{guided}"
    intervals = (
        f"± is the 95 % interval over the {protocol.sets} sets; {ALIKE} marks a difference from dense at the same "
        f"setting within its own."
        if protocol.sets > 1
        else "One set, so no intervals."
    )
    return (
        f"{protocol.sets} × {protocol.num_images} images, seed {protocol.seed}, {protocol.precision}; features of "
        f"{protocol.extractor} ({protocol.extractor_sha256[:8]}) against {protocol.num_real_images} real images; "
        f"KID over {protocol.kid_subsets} subsets of {protocol.kid_subset_size}. All cells start from the same noise. "
        f"MACs: of all predictions for an image. FID to dense and SSIM: against dense at the same setting; {LAST}: "
        f"against dense under the protocol {grid.protocol_id} ({setting}). {intervals}"
    )
