"""The importance, its heat and its stability -> losses.csv, layers.csv, metrics.json and importance.png."""

from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from stages.importance.stability import Heat, Stability
from stages.models.saliency import Importance
from stages.storage.files import write_atomically, write_json

MAX_LABELS = 60


def write_report(importance: Importance, heat: Heat | None, stability: Stability | None, folder: Path) -> None:
    """Write one row a timestep (the mean over the draws that used it), one a layer, their picture and the figures."""
    curves = zip_longest(*importance.losses)
    losses = [[loss for loss in row if loss is not None] for row in curves]
    rows = [f"{timestep},{fmean(row)}" for timestep, row in zip(importance.timesteps, losses, strict=False)]
    _write_rows(folder / "losses.csv", "timestep,loss", rows)
    metrics: dict[str, float] = {"timesteps_used": fmean(map(len, importance.losses)) if importance.losses else 0}
    if heat is not None:
        metrics["cancellation"] = float(heat.cancellation.mean())
    if stability is not None:
        metrics |= vars(stability)
    layers = zip(heat.layers, heat.contribution.sum(axis=1), heat.cancellation, strict=True) if heat else ()
    _write_rows(folder / "layers.csv", "layer,contribution,cancellation", [",".join(map(str, row)) for row in layers])
    write_json(folder / "metrics.json", metrics)
    draw_report(importance, heat).savefig(folder / "importance.png", metadata={"Software": None})


def _write_rows(path: Path, header: str, rows: list[str]) -> None:
    write_atomically(path, ("\n".join([header, *rows]) + "\n").encode())


def draw_report(importance: Importance, heat: Heat | None) -> Figure:
    """Draw the losses with the place where each sum ended, and how much each layer contributes at each timestep."""
    num_layers = len(heat.layers) if heat else 0
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
        if heat is None:
            bottom.axis("off")
        else:
            norm = LogNorm() if heat.contribution.any() else None
            picture = bottom.imshow(heat.contribution + np.finfo(float).tiny, aspect="auto", norm=norm)
            bottom.set_xticks(range(len(heat.timesteps)), [str(timestep) for timestep in heat.timesteps], rotation=90)
            every = -(-num_layers // MAX_LABELS)
            bottom.set_yticks(range(0, num_layers, every), heat.layers[::every], fontsize=6)
            bottom.set(xlabel="timestep", title="Σ |w·g_t| of each layer")
            figure.colorbar(picture, ax=bottom)
    return figure
