"""params.yaml -> the plan of a run before anything is computed: stages, reasons, time, disk, memory, refusals."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows import options
from stages.runtime.finite_range import FiniteRange
from stages.runtime.imports import importing
from stages.runtime.text import printable
from stages.runtime.wording import count, format_bytes, format_duration, format_table

if TYPE_CHECKING:
    from flows.workspaces.staleness import StageStatus
    from stages.tools.planning.forecast import StageForecast
    from stages.tools.planning.preview import Preview

PARAMS = Path("params.yaml")
FETCHED, PACKED = Path("artifacts/pretrained"), Path("artifacts/data")
"""Outputs of the stage fetch."""
MEASURING = ("reference", "evaluate", "variants")
"""Stages that extract features of images."""
HOUR_S = 3600


@click.command()
@options.set_option
@click.option("--preset", default=None, help="A preset of this checkout that replaces its params.yaml.")
@click.option(
    "--tflops",
    type=FiniteRange(0, min_open=True),
    help="Sustained 10¹² operations per second of a GPU, in place of passes timed here.",
)
@click.option("--gpus", type=click.IntRange(1), default=1, help="GPUs that share the stages, with --tflops.")
@click.option("--price", type=FiniteRange(0), help="Price of the machine for an hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    texts: tuple[str, ...], preset: str | None, tflops: float | None, gpus: int, price: float | None, *, as_json: bool
) -> None:
    """Show which stages would run and why, what they would take, and what would be refused; nothing is computed."""
    if gpus > 1 and tflops is None:
        raise click.UsageError("--gpus needs --tflops, since passes are timed on one device; give both")
    found = make_plan(texts, preset, tflops, gpus)
    click.echo(json.dumps(found.to_json(price), indent=2) if as_json else found.text(price))
    sys.exit(1 if found.preview.refusals else 0)


@dataclass(frozen=True)
class RunPlan:
    """What a run would do."""

    source: str
    """The params file, and the overrides of it."""
    device: str
    """Where the passes were timed, or the rate that was given."""
    statuses: Sequence["StageStatus"]
    preview: "Preview"

    @property
    def running(self) -> list["StageForecast"]:
        """The forecasts of the stages that would run."""
        names = [status.name for status in self.statuses if status.state == "runs"]
        return [stage for stage in self.preview.stages if stage.name in names]

    @property
    def seconds(self) -> float:
        """Seconds of all stages that would run, one after the other."""
        return sum(stage.seconds for stage in self.running)

    @property
    def grid(self) -> "StageForecast | None":
        """The forecast of `espalier grid`, if params.yaml has a block grid; it is in no sum, since no run draws it."""
        return next((stage for stage in self.preview.stages if stage.name == "grid"), None)

    @property
    def download(self) -> str | None:
        """Weights that a stage that would run downloads; None if all are here or no stage measures."""
        measures = any(status.state == "runs" and status.name in MEASURING for status in self.statuses)
        return (self.preview.download or None) if measures else None

    def to_json(self, price: float | None) -> dict[str, Any]:
        """Return the plan as plain data: units are in the names of the keys."""
        stages = {stage.name: stage for stage in self.preview.stages}
        size = self.preview.size
        return {
            "source": self.source,
            "device": self.device,
            "refusals": self.preview.refusals,
            "possible_refusals": self.preview.possible,
            "download": self.download,
            "model": size
            and {key: getattr(size, key) for key in ("dense_params", "pruned_params", "dense_macs", "pruned_macs")},
            "num_images": self.preview.num_images,
            "stages": [_stage_json(status, stages.get(status.name)) for status in self.statuses],
            "grid": self.grid and _work_json(self.grid),
            "seconds": self.seconds if stages else None,
            "disk_bytes": sum(stage.work.disk_bytes for stage in self.running),
            "memory_bytes": max((stage.memory_bytes or 0 for stage in self.running), default=0) or None,
            "price": (price is not None and stages and price * self.seconds / HOUR_S) or None,
        }

    def text(self, price: float | None) -> str:
        """Describe the plan for a terminal."""
        stages = {stage.name: stage for stage in self.preview.stages}
        rows = [_row(status, stages.get(status.name)) for status in self.statuses]
        lines = [*_headline(self), "", *format_table(["stage", "", "work", "time", "disk", "memory", "why"], rows), ""]
        if stages:
            lines.append(self._total(price))
            lines += self._shortages()
        if grid := self.grid:
            time = f"about {format_duration(grid.seconds)}, {format_bytes(grid.work.disk_bytes)} on disk"
            lines.append(f"Beside them, for the block grid, `espalier grid`: {grid.work.text}, {time}.")
        if missing := sorted({kind for stage in self.running for kind in stage.unmeasured}):
            lines.append(f"Not in it, since it could not be timed here: {', '.join(missing)}.")
        lines += [f"Warning: {printable(self.download)}"] if self.download else []
        lines += [f"Warning: a stage may refuse this: {printable(message)}" for message in self.preview.possible]
        refused = self.preview.refusals
        lines += [f"{count(len(refused), 'refusal')}; nothing has to be computed to know of them:"] if refused else []
        return "\n".join(lines + [f"✗ {printable(message)}" for message in refused])

    def _shortages(self) -> list[str]:
        """Warn where the disk here has less than the run would write."""
        needed, free = sum(stage.work.disk_bytes for stage in self.running), shutil.disk_usage(Path()).free
        return [f"Warning: {format_bytes(free)} are free on this disk."] if needed > free else []

    def _total(self, price: float | None) -> str:
        if not self.running:
            return "Nothing to do: every stage is up to date or in the cache."
        disk = sum(stage.work.disk_bytes for stage in self.running)
        memory = max((stage.memory_bytes or 0 for stage in self.running), default=0)
        parts = [f"about {format_duration(self.seconds)} in all", f"{format_bytes(disk)} on disk"]
        parts += [f"at most {format_bytes(memory)} of memory"] if memory else []
        parts += [f"{price * self.seconds / HOUR_S:.2f} at {price:g} an hour"] if price is not None else []
        return f"{count(len(self.running), 'stage')} would run: {', '.join(parts)}."


def make_plan(texts: Sequence[str], preset: str | None, tflops: float | None = None, gpus: int = 1) -> RunPlan:
    """Find out what a run with these params would do.

    Args:
        texts: KEY=VALUE, overrides of the params.
        preset: Name of a preset in place of params.yaml; None keeps it.
        tflops: Sustained rate in 10¹² operations per second; None times passes on this device.
        gpus: GPUs that share the stages.

    Raises:
        InputError: The params are not allowed, or this is not the top folder of a project.
    """
    from flows.workspaces.overrides import apply, parse_overrides
    from flows.workspaces.staleness import find_statuses
    from stages.params import Params
    from stages.runtime.bounded import parse_yaml
    from stages.tools.preset import find_preset

    overrides = parse_overrides(texts)
    path = PARAMS if preset is None else find_preset(preset)
    tree = parse_yaml(apply(overrides, path).decode(), str(path))
    params = Params.model_validate(tree)
    in_place = not overrides and preset is None
    statuses = find_statuses(Path(), tree, in_place=in_place)
    click.echo("timing a few passes …" if tflops is None else "counting …", err=True)

    with importing():
        from stages.runtime.device import device_name
        from stages.tools.planning.preview import preview

    is_fetched = in_place and next((it.state == "up to date" for it in statuses if it.name == "fetch"), False)
    fetched, packed = (FETCHED, PACKED) if is_fetched else (None, None)
    found = preview(params, fetched=fetched, packed=packed, tflops=tflops, gpus=gpus)
    device = device_name() if tflops is None else f"{count(gpus, 'GPU')} of {tflops:g} · 10¹² operations per second"
    return RunPlan(" ".join([str(path), *texts]), device, statuses, found)


def _headline(found: RunPlan) -> list[str]:
    size, images = found.preview.size, found.preview.num_images
    lines = [f"{found.source}, on {found.device}"]
    if size:
        params = f"{size.dense_params / 1e6:.4g} M → {size.pruned_params / 1e6:.4g} M parameters"
        macs = f"{size.dense_macs / 1e9:.4g} G → {size.pruned_macs / 1e9:.4g} G MACs"
        known = "number of images not known yet" if images is None else f"{count(images, 'image')} given"
        lines.append(f"{params}, {macs}; {known}")
    return lines


def _row(status: "StageStatus", stage: "StageForecast | None") -> list[str]:
    """Write a stage as a row; what it would take is shown only if it would run."""
    row, why = [status.name, status.state], "; ".join(status.reasons)
    if stage is None or status.state != "runs":
        return [*row, "", "", "", "", why]
    disk, memory = stage.work.disk_bytes, stage.memory_bytes
    costs = [format_duration(stage.seconds), format_bytes(disk) if disk else "", format_bytes(memory) if memory else ""]
    return [*row, stage.work.text, *costs, why]


def _stage_json(status: "StageStatus", stage: "StageForecast | None") -> dict[str, Any]:
    known = {"name": status.name, "state": status.state, "reasons": list(status.reasons)}
    if stage is None:
        return known
    return {**known, **_work_json(stage)}


def _work_json(stage: "StageForecast") -> dict[str, Any]:
    work = stage.work
    return {
        "work": work.text,
        "steps": work.steps,
        "images": work.images,
        "seconds": stage.seconds,
        "disk_bytes": work.disk_bytes,
        "memory_bytes": stage.memory_bytes,
        "unmeasured": list(stage.unmeasured),
    }


if __name__ == "__main__":
    plan()
