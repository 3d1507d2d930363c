"""The importance and its diagnostics -> losses.csv, layers.csv, heatmap.csv, metrics.json and importance.png."""

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from stages.importance.stability import Heatmap, RankingStability
from stages.models.layer_order import in_run_order
from stages.models.saliency import Importance
from stages.storage.files import write_atomically, write_json

MAX_LABELS = 60
"""Layer names on an axis, at most."""


def write_report(
    importance: Importance, heatmap: Heatmap | None, stability: RankingStability | None, folder: Path
) -> None:
    """Write the mean loss per timestep, the contribution per layer, in all and per timestep, the metrics and a figure.

    Without a heatmap, which not every criterion has, layers.csv and heatmap.csv have a header only.
    """
    losses = [fmean(loss for loss in row if loss is not None) for row in zip_longest(*importance.losses)]
    _write_csv(folder / "losses.csv", ("timestep", "loss"), *zip(importance.timesteps, losses, strict=False))
    metrics: dict[str, float] = {"timesteps_used": fmean(map(len, importance.losses)) if importance.losses else 0}
    if heatmap is not None:
        metrics["cancellation"] = float(heatmap.cancellation.mean())
    if stability is not None:
        metrics |= vars(stability)
    columns = (heatmap.layers, heatmap.contribution.sum(axis=1), heatmap.cancellation) if heatmap else ()
    _write_csv(folder / "layers.csv", ("layer", "contribution", "cancellation"), *zip(*columns, strict=True))
    cells = [(layer, *row) for layer, row in zip(heatmap.layers, heatmap.contribution, strict=True)] if heatmap else []
    _write_csv(folder / "heatmap.csv", ("layer", *(heatmap.timesteps if heatmap else ())), *cells)
    write_json(folder / "metrics.json", metrics)
    draw_report(importance, heatmap).savefig(folder / "importance.png", metadata={"Software": None})


def _write_csv(path: Path, *rows: Iterable[object]) -> None:
    write_atomically(path, "".join(",".join(map(str, row)) + "\n" for row in rows).encode())


def draw_report(importance: Importance, heatmap: Heatmap | None) -> Figure:
    """Draw the losses, with the end of each sum, and the heatmap of layers and timesteps."""
    num_layers = len(heatmap.layers) if heatmap else 0
    with mpl.rc_context({"font.size": 9, "figure.dpi": 110}):
        figure = Figure(figsize=(10, 3.2 + 0.14 * min(num_layers, MAX_LABELS)), layout="constrained")
        panels = figure.subplots(2, 1, squeeze=False, height_ratios=[1, 0.3 + 0.06 * min(num_layers, MAX_LABELS)])
        top, bottom = panels[:, 0]
        for losses in importance.losses:
            timesteps = importance.timesteps[: len(losses)]
            top.plot(timesteps, losses, linewidth=1)
            top.plot(timesteps[-1:], losses[-1:], "o", markersize=4)
        top.set(xlabel="timestep", ylabel="loss", title=f"{importance.criterion}: losses, and where each sum ends")
        if importance.losses:
            top.set_yscale("log")
        if heatmap is None:
            bottom.axis("off")
        else:
            norm = LogNorm() if heatmap.contribution.any() else None
            layers = in_run_order(heatmap.layers)
            contribution = heatmap.contribution[[heatmap.layers.index(layer) for layer in layers]]
            image = bottom.imshow(contribution, aspect="auto", norm=norm)
            bottom.set_xticks(
                range(len(heatmap.timesteps)), [str(timestep) for timestep in heatmap.timesteps], rotation=90
            )
            every = -(-num_layers // MAX_LABELS)
            bottom.set_yticks(range(0, num_layers, every), layers[::every], fontsize=6)
            bottom.set(xlabel="timestep", title="Σ |w·g_t| of each layer")
            figure.colorbar(image, ax=bottom)
    return figure
