"""Report data -> figures as SVG, in colours for light and for dark pages."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from stages.protocol.evaluation import VISIBLE_SSIM
from stages.protocol.verdict import FINETUNED, Level, rate_speed, tone
from stages.report.legend import legend_above
from stages.report.report_data import ReportData
from stages.report.speed import rows_by_setting, timed_model
from stages.report.variant_figures import draw_size, draw_time
from stages.report.variants import VariantRow

THEMES: Mapping[str, Mapping[str, object]] = {
    "light": {"text.color": "#1c2b24", "axes.edgecolor": "#8a978f", "grid.color": "#dfe6e1"},
    "dark": {"text.color": "#e4ebe6", "axes.edgecolor": "#6f7d75", "grid.color": "#2f3a34"},
}
LEVELS: Mapping[Level, str] = {"good": "#3d9b6b", "changed": "#c98a1b", "worse": "#cc4b3e"}
"""Level of a verdict -> colour."""
COLOURS = {"dense": "#4c8bbf", "pruned": "#8b929c", "finetuned": LEVELS["good"]}
LINES = {"float32": "-", "tf32": "-.", "bfloat16": "--"}
SIZE_INCHES = (4.8, 3.1)
WIDE_INCHES, ROW_INCHES = 9.6, 0.22
"""Width of the heatmap, and height of each of its rows."""
MAX_TICKS = 14
"""Labels on its horizontal axis, at most."""
LABELLED = (1, 2, 5)
"""Digits at which a logarithmic axis has labels."""


def draw_figures(report: ReportData) -> dict[str, dict[str, bytes]]:
    """Draw all figures that there are data for: name -> theme -> SVG; equal data give equal bytes."""
    missing = {"importance": report.importance.empty, "losses": not report.losses}
    missing |= dict.fromkeys(("variants-time", "variants-size"), not report.variants)
    return {
        name: {theme: draw_figure(partial(draw, report=report), theme) for theme in THEMES}
        for name, draw in FIGURES.items()
        if not missing.get(name)
    }


def draw_figure(draw: Callable[[Axes], None], theme: str, kind: Literal["svg", "png"] = "svg") -> bytes:
    """Draw one figure in the colours of a theme; equal data give equal bytes."""
    colours = {**THEMES[theme]}
    text = colours["text.color"]
    style = {
        **colours,
        **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), text),
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "legend.frameon": False,
        "svg.hashsalt": "espalier",
    }
    with mpl.rc_context(style):  # type: ignore[arg-type]  # it takes any dict of settings
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        axis.set_axisbelow(True)
        draw(axis)
        target = io.BytesIO()
        dates = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
        figure.savefig(target, format=kind, metadata=dates[kind], dpi=160, transparent=kind == "svg")
    return target.getvalue()


def _colours(report: ReportData) -> dict[str, str]:
    """Return the colour of each model; that of the finetuned one follows the verdict."""
    return {**COLOURS, FINETUNED: LEVELS[report.verdict().level]}


def _pareto(axis: Axes, *, report: ReportData) -> None:
    """FID over MACs."""
    for name, model in report.record.models.items():
        axis.errorbar(
            model.macs / 1e6,
            model.fid.mean,
            yerr=model.fid.half_width,
            fmt="o",
            markersize=8,
            capsize=4,
            color=_colours(report).get(name),
            label=name,
        )
    axis.axhline(report.record.floor_fid, linestyle=":", color=mpl.rcParams["axes.edgecolor"])
    where = (0.02, report.record.floor_fid)
    axis.annotate("real halves", where, xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    legend_above(axis)


def _recovery(axis: Axes, *, report: ReportData) -> None:
    """Held-out loss of the EMA weights during finetuning."""
    axis.plot(*zip(*report.curve, strict=True), marker="o", markersize=3, color=_colours(report)[FINETUNED])
    axis.set(xlabel="step", ylabel="held-out loss (logarithmic)")
    plain_log(axis)


def _widths(axis: Axes, *, report: ReportData) -> None:
    """Output channels of each layer before and after pruning."""
    dense, kept = ([getattr(width, name) for width in report.widths] for name in ("dense", "kept"))
    axis.stairs(dense, fill=True, alpha=0.35, color=COLOURS["dense"], label="dense")
    axis.stairs(kept, fill=True, color=COLOURS["pruned"], label="kept")
    parts = [width.layer.split("_")[0] for width in report.widths]
    middles = {name: parts.index(name) + parts.count(name) / 2 for name in ("down", "mid", "up") if name in parts}
    axis.set_xticks(list(middles.values()), list(middles))
    for name in middles:
        axis.axvline(parts.index(name), color=mpl.rcParams["axes.edgecolor"], linewidth=0.6)
    axis.grid(visible=False, axis="x")
    axis.set(ylabel="channels out", xlim=(0, len(parts)), ylim=(0, 1.05 * max(dense)))
    legend_above(axis)


def _ssim(axis: Axes, *, report: ReportData) -> None:
    """SSIM of all pairs."""
    for name, values in report.ssim.items():
        axis.hist(
            values, bins=40, range=(min(0.0, *values), 1), alpha=0.6, color=_colours(report).get(name), label=name
        )
    axis.axvline(VISIBLE_SSIM, linestyle=":", color=mpl.rcParams["text.color"])
    axis.set(xlabel="SSIM against the dense model's image of the same noise", ylabel="pairs")
    legend_above(axis)


def _throughput(axis: Axes, *, report: ReportData) -> None:
    """Images per second of eager passes at each batch size."""
    rows = [row for row in rows_by_setting(report) if row.mode == "eager" and row.images_per_s]
    for name, (precision, style) in itertools.product(COLOURS, LINES.items()):
        members = [row for row in rows if (row.model, row.precision) == (name, precision)]
        if members:
            rates = [row.images_per_s or 0 for row in members]
            batches = [row.batch for row in members]
            axis.plot(batches, rates, style, marker="o", color=_colours(report)[name], label=f"{name}, {precision}")
    batches = sorted({row.batch for row in rows})
    axis.set(xlabel="batch", ylabel="images per second", xscale="log")
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    plain_log(axis)
    legend_above(axis)


def _importance(axis: Axes, *, report: ReportData) -> None:
    """Contribution of each module at each timestep, in the order in which the modules run."""
    table, figure = report.importance, cast("Figure", axis.figure)
    figure.set_size_inches(WIDE_INCHES, 1.2 + ROW_INCHES * len(table))
    values = table.to_numpy()
    norm = LogNorm() if values.any() else None
    image = axis.imshow(values, aspect="auto", norm=norm, cmap="viridis")
    every = -(-table.shape[1] // MAX_TICKS)
    axis.set_xticks(range(0, table.shape[1], every), [str(step) for step in table.columns[::every]])
    axis.set_yticks(range(len(table)), list(table.index))
    axis.grid(visible=False)
    axis.set(xlabel="timestep: on the left almost no noise, on the right the most that was used")
    bar = figure.colorbar(image, ax=axis, pad=0.01, fraction=0.05)
    bar.set_label("Σ |weight × gradient|")


def _losses(axis: Axes, *, report: ReportData) -> None:
    """Loss over the timesteps that the importance summed over."""
    axis.plot(*zip(*report.losses, strict=True), color=COLOURS["dense"])
    axis.set(xlabel="timestep", ylabel="loss (logarithmic)")
    plain_log(axis)


def _speed_up(axis: Axes, *, report: ReportData) -> None:
    """Speed-up relative to dense in each setting, and the MACs ratio."""
    timed = timed_model(report)
    rows = [row for row in rows_by_setting(report) if row.model == timed and row.speed_up]
    names = [f"{row.precision}{' compiled' * (row.mode == 'compiled')}, batch {row.batch}" for row in rows]
    values, lows, highs = (
        np.array([getattr(row, key) for row in rows]) for key in ("speed_up", "speed_up_low", "speed_up_high")
    )
    reach = np.abs([values - lows, highs - values])
    tones = [tone(report.verdict().level, rate_speed(row)) for row in rows]
    colours = [LEVELS[level] if level else COLOURS["pruned"] for level in tones]
    axis.axvline(1, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    axis.barh(names, values, xerr=reach, color=colours, ecolor=mpl.rcParams["text.color"])
    axis.axvline(report.record.macs_ratio(timed), linestyle=":", color=mpl.rcParams["text.color"])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="times as fast as dense", xlim=(0, None))


def _variants(
    axis: Axes, *, report: ReportData, draw: Callable[[Axes, Sequence[VariantRow], Mapping[str, str]], None]
) -> None:
    """Quality of models and variants against a cost."""
    draw(axis, report.variants, COLOURS)
    plain_log(axis)


def plain_log(axis: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers as labels."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=LABELLED))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


FIGURES: Mapping[str, Callable[..., None]] = {
    "pareto": _pareto,
    "recovery": _recovery,
    "widths": _widths,
    "ssim": _ssim,
    "throughput": _throughput,
    "speed-up": _speed_up,
    "importance": _importance,
    "losses": _losses,
    "variants-time": partial(_variants, draw=draw_time),
    "variants-size": partial(_variants, draw=draw_size),
}
