"""Model folders, a reference and the block grid -> the record of the grid, cell by cell."""

import fcntl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from stages.evaluate.opened import open_reference
from stages.evaluate.quality import QualityMetrics
from stages.grid.cells import GridContext, measure_cell
from stages.grid.params import GridParams
from stages.grid.settings import Setting, make_settings, shrink
from stages.models.complexity import count_macs
from stages.models.pipeline import denoiser_folder, read_unet, weights_file
from stages.protocol.evaluation import DENSE, make_metric
from stages.protocol.grid import SSIM, GridCell, GridRecord
from stages.protocol.params import ReferenceParams
from stages.protocol.protocol import Protocol
from stages.runtime.wording import count, format_duration
from stages.storage.files import file_sha256, folder_sha256
from stages.storage.in_use import hold_folder

ALONE = (SSIM, "fid_dense", "ssim_protocol")
"""Metrics that compare with the dense model's images, so that a difference from the dense model says nothing."""

TURN = "turn"
"""File that the grid at work has locked."""


def open_grid_context(
    folders: Mapping[str, Path],
    reference_path: Path,
    grid: GridParams,
    params: ReferenceParams,
    seed: int,
    device: torch.device,
    store: Path,
) -> tuple[GridContext, Protocol]:
    """Read models and reference, check that they belong together, and return what the cells share and the protocol.

    Raises:
        InputError: A folder is damaged, they do not belong together, or the reference has another protocol.
    """
    models = {name: read_unet(folder, device) for name, folder in folders.items()}
    opened = open_reference(reference_path, folders[DENSE], params, seed, device)
    opened.check_models(models, reference_path)
    base = shrink(opened.reference.protocol, grid)
    weights = {name: file_sha256(weights_file(folder)) for name, folder in folders.items()}
    denoisers = {name: folder_sha256(denoiser_folder(folder)) for name, folder in folders.items()}
    metrics = QualityMetrics(opened.reference.real_features, base, device)
    return GridContext(models, weights, denoisers, opened, metrics, store), base


@contextmanager
def hold_store(store: Path) -> Iterator[None]:
    """Mark the folder of finished cells as in use, and wait while another grid uses it, whose cells are then read.

    Raises:
        InputError: It cannot be written.
    """
    with hold_folder(store), (store / TURN).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"waiting for another espalier grid that uses {store}", err=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_grid(
    context: GridContext, base: Protocol, grid: GridParams, params: ReferenceParams, model: Path | str
) -> GridRecord:
    """Measure every model at every setting; cells that were finished before are read.

    Args:
        context: What the cells share.
        base: The protocol of the reference, with the images and sets of the grid.
        grid: The block grid.
        params: The block reference.
        model: How to call the dense model in messages.

    Raises:
        InputError: A setting does not fit the model, images are not finite, or the disk is full.
    """
    reference, scheduler = context.opened.reference, context.opened.scheduler
    settings = make_settings(grid, params, scheduler, reference.table, model)
    protocols = [setting.protocol(base, scheduler) for setting in settings]
    macs = {name: count_macs(unet) for name, unet in context.models.items()}
    plan = [(name, *pair) for pair in zip(settings, protocols, strict=True) for name in context.models]
    work = [float(setting.calls * macs[name]) for name, setting, _ in plan]
    cells: list[GridCell] = []
    for place in _announce(context, plan, work):
        name, setting, protocol = plan[place]
        label = f"{name}, {describe(setting)}, cell {place + 1} of {len(plan)}"
        sets = measure_cell(context, name, protocol, label)
        dense = next((it for it in reversed(cells) if it.model == DENSE), None) if name != DENSE else None
        cells.append(_make_cell(name, setting, protocol, macs[name], sets, dense))
    weights = dict(context.weights)
    return GridRecord(protocol_id=reference.protocol.id, protocol=base, weights_sha256=weights, cells=cells)


def _announce(
    context: GridContext, plan: Sequence[tuple[str, Setting, Protocol]], work: Sequence[float]
) -> Iterator[int]:
    """Yield the places of all cells; after each that is measured now, print how many are done and the time left."""
    missing = [not context.is_finished(name, protocol) for name, _, protocol in plan]
    kept = len(plan) - sum(missing)
    click.echo(f"grid: {count(len(plan), 'cell')}, {kept} of them measured before", err=True)
    begin, done, images = time.monotonic(), 0.0, 0
    total = sum(part for part, is_missing in zip(work, missing, strict=True) if is_missing)
    for place, is_missing in enumerate(missing):
        yield place
        if not is_missing:
            continue
        _, _, protocol = plan[place]
        done, images = done + work[place], images + protocol.sets * protocol.num_images
        spent_s = time.monotonic() - begin
        left_s = (total - done) * spent_s / done
        rate = f"{images / max(spent_s, 1e-9):.3g} images/s, {format_duration(spent_s)} so far"
        click.echo(f"grid {place + 1}/{len(plan)} cells, {rate}, about {format_duration(left_s)} left", err=True)


def name_sampler(setting: Setting) -> str:
    """Name the sampler of a setting: scheduler, spacing, and eta and clipping where they are given."""
    sampler = setting.sampler
    eta = f", eta {sampler.eta:.12g}" if sampler.eta else ""
    clip = "" if sampler.clip is None else ", clipping" if sampler.clip else ", no clipping"
    return f"{sampler.scheduler} {sampler.spacing}{eta}{clip}"


def describe(setting: Setting) -> str:
    """Describe a setting for a line of progress."""
    guided = "" if setting.guidance is None else f", guidance {setting.guidance:g}"
    return f"{name_sampler(setting)}, {count(setting.sampler.steps, 'step')}{guided}"


def _make_cell(
    name: str,
    setting: Setting,
    protocol: Protocol,
    macs: int,
    sets: Mapping[str, Sequence[float]],
    dense: GridCell | None,
) -> GridCell:
    """Make the record of a cell, with the differences from the dense model's cell at the same setting."""
    metrics = {
        metric: make_metric(values, dense.metrics[metric].sets if dense and metric not in ALONE else None)
        for metric, values in sets.items()
    }
    return GridCell(
        model=name,
        sampler=name_sampler(setting),
        steps=setting.sampler.steps,
        guidance=setting.guidance,
        protocol_id=protocol.id,
        calls=setting.calls,
        macs=setting.calls * macs,
        metrics=metrics,
    )
