"""The cells of a recovery comparison -> quality over steps and seconds by recipe, and when one reaches another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from stages.protocol.evaluation import SNAPSHOT, Model, read_snapshots
from stages.protocol.intervals import Estimate, estimate
from stages.runtime.errors import InputError
from stages.storage.files import read_record
from stages.tools.comparison.cells import FinishedCell, in_row, read_cells
from stages.tools.comparison.estimates import difference_by_seed
from stages.tools.comparison.methods import ONE_SHOT, RESULT, check_comparable, check_sizes
from stages.tools.comparison.published import PRUNES_ITSELF

PROVENANCE = "finetune.provenance.json"
SECONDS = "seconds"


@dataclass(frozen=True)
class ShownMetric:
    """How a metric is written, and which values are better."""

    title: str
    digits: int
    factor: float = 1
    lower_is_better: bool = True


SHOWN: Mapping[str, ShownMetric] = {
    "fid": ShownMetric("FID", 3),
    "fid_dense": ShownMetric("FID to dense", 3),
    "ssim": ShownMetric("SSIM", 4, lower_is_better=False),
    "kid": ShownMetric("KID × 10³", 2, 1e3),
}
"""Metrics of the curves; one that the evaluations lack is left out."""


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Cost(BaseModel, frozen=True, extra="ignore"):
    """What a training took; the defaults are those of trainings without snapshots."""

    seconds_by_step: dict[int, Seconds] = Field(default_factory=dict)
    machine: str = ""
    alone: bool = False


class _Training(BaseModel, frozen=True, extra="ignore"):
    """What is read of the provenance of a training."""

    cost: _Cost


@dataclass(frozen=True)
class Curve:
    """The trainings of one recipe."""

    title: str
    points: Mapping[int, Mapping[int, Mapping[str, float]]]
    """Step -> seed -> metric -> mean over the sets; `seconds` of training is among them where it was measured."""

    @property
    def steps(self) -> list[int]:
        """The measured steps in their order."""
        return sorted(self.points)

    @property
    def seeds(self) -> list[int]:
        """The seeds in their order."""
        return sorted(self.points[self.steps[-1]])

    def values(self, step: int, name: str) -> dict[int, float]:
        """Return a metric or the seconds at a step: seed -> value, of the seeds that have it."""
        return {seed: found[name] for seed, found in sorted(self.points[step].items()) if name in found}

    def estimate(self, step: int, name: str) -> Estimate | None:
        """Estimate the mean over the seeds; None where no seed has it."""
        values = list(self.values(step, name).values())
        return estimate(values) if values else None


@dataclass(frozen=True)
class Curves:
    """The finished cells of a recovery comparison, sorted into recipes."""

    cells: Sequence[FinishedCell]
    rows: Mapping[str, Curve]
    """Recipe -> curve, in the order that was asked for."""
    machines: Sequence[str]
    """Where the seconds were measured; empty where there are none."""
    untimed: int
    """Cells without seconds: trained beside others or on several machines, or with an output from DVC's cache."""

    @property
    def metrics(self) -> list[str]:
        """The metrics of `SHOWN` that every cell has."""
        found = [point for row in self.rows.values() for step in row.points.values() for point in step.values()]
        return [name for name in SHOWN if all(name in point for point in found)]

    @property
    def steps(self) -> list[int]:
        """Every measured step, in order."""
        return sorted({step for row in self.rows.values() for step in row.points})

    @property
    def baseline(self) -> Curve:
        """The first recipe, with which the others are compared."""
        return next(iter(self.rows.values()))


@dataclass(frozen=True)
class Reach:
    """When a recipe reaches what another has at its end, by one or several metrics."""

    step: int | None
    """First measured step from which on the mean difference, paired by seed, is nowhere worse beyond its interval."""
    better: int | None
    """First measured step from which on it is better beyond its interval; None for one seed, too."""
    by_seed: Mapping[int, int | None] = field(default_factory=dict)
    """Seed -> first measured step from which on this seed's value is not worse."""


def differences_from_end(curve: Curve, other: Curve, metric: str, step: int) -> dict[int, float]:
    """Subtract a metric of another recipe at its end from that of one at a step: seed -> difference."""
    ours, theirs = curve.values(step, metric), other.values(other.steps[-1], metric)
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _worse_by(curve: Curve, other: Curve, metric: str, step: int) -> dict[int, float]:
    """Compute how much worse a recipe is at a step than another at its end, by the sign of `SHOWN`."""
    sign = 1 if SHOWN[metric].lower_is_better else -1
    return {seed: sign * it for seed, it in differences_from_end(curve, other, metric, step).items()}


def reach(curve: Curve, other: Curve, metrics: Iterable[str]) -> Reach:
    """Find when a recipe reaches what another has at its end, by all of some metrics; steps are not interpolated."""
    worse = {step: [_worse_by(curve, other, name, step) for name in metrics] for step in curve.steps}
    seeds = [seed for seed in curve.seeds if seed in other.seeds]
    if not seeds:
        return Reach(None, None)
    found = {step: [estimate(list(it.values())) for it in worse[step]] for step in worse}
    return Reach(
        _from_then_on({step: all(it.mean <= (it.half_width or 0) for it in found[step]) for step in found}),
        _from_then_on({step: all(bool(it.is_distinct) and it.mean < 0 for it in found[step]) for step in found}),
        {seed: _from_then_on({step: all(it[seed] <= 0 for it in worse[step]) for step in worse}) for seed in seeds},
    )


def _from_then_on(holds: Mapping[int, bool]) -> int | None:
    """Return the first step from which on something holds at every step."""
    steps = sorted(holds)
    return next((step for index, step in enumerate(steps) if all(holds[it] for it in steps[index:])), None)


def difference(curve: Curve, other: Curve, metric: str, step: int) -> Estimate | None:
    """Estimate metric(curve) − metric(other) at one step, paired by seed; None without a common step and seed."""
    if step not in other.points:
        return None
    return difference_by_seed(curve.values(step, metric), other.values(step, metric))


def seconds_ratio(curve: Curve, step: int, other: Curve) -> Estimate | None:
    """Estimate the seconds of a recipe until a step over those of another until its end, paired by seed."""
    ours, theirs = curve.values(step, SECONDS), other.values(other.steps[-1], SECONDS)
    ratios = [ours[seed] / theirs[seed] for seed in ours if theirs.get(seed)]
    return estimate(ratios) if ratios else None


def read_curves(folder: Path, rows: Sequence[str]) -> Curves:
    """Read all cells below a folder and sort them into recipes, steps and seeds.

    Raises:
        InputError: The folder holds no cell, a cell is damaged or in no row, or cells differ in more than seed and
            recipe: in protocol, dense model, size, steps, or the pruned weights that the recipes of a seed began with.
    """
    cells = read_cells(folder)
    if odd := [cell for cell in cells if cell.note.row not in rows]:
        found = f"{folder / odd[0].name} is in row {odd[0].note.row!r}, the rows are {', '.join(rows)}"
        raise InputError(f"{found}; give the folder of cells that compare --curve wrote, and all rows")
    check_comparable(cells, {cell.name: cell.name for cell in cells})
    check_sizes(cells)
    _check_pruned(cells)
    times = {cell.name: _read_times(folder / cell.name) for cell in cells}
    machines = sorted({it.machine for it in times.values() if it})
    points = {cell.name: _read_points(folder / cell.name, cell, times[cell.name], machines) for cell in cells}
    _check_steps(points)
    return Curves(
        cells,
        {
            row: Curve(row, _by_step({cell.seed: points[cell.name] for cell in members}))
            for row in rows
            if (members := in_row(cells, row))
        },
        machines,
        sum(it is None for it in times.values()),
    )


def _check_pruned(cells: Sequence[FinishedCell]) -> None:
    """Refuse recipes that recovered different pruned models of one seed; a method's row prunes by its own criterion."""
    first: dict[int, FinishedCell] = {}
    for cell in (it for it in cells if it.note.row not in PRUNES_ITSELF):
        other = first.setdefault(cell.seed, cell)
        one, two = (it.record.models[ONE_SHOT].weights_sha256 for it in (other, cell))
        if one != two:
            found = f"{other.name} and {cell.name}, both of seed {cell.seed}, recovered two pruned models"
            raise InputError(f"{found}; compare recipes that begin with the same one")


def _check_steps(points: Mapping[str, Mapping[int, object]]) -> None:
    steps = {name: sorted(found) for name, found in points.items()}
    (first, expected), *others = steps.items()
    for name, found in others:
        if found != expected:
            raise InputError(f"{first} was measured at steps {expected}, {name} at {found}; compare one list of steps")


def _read_times(folder: Path) -> _Cost | None:
    """Read when a training reached its steps; None where that is unknown or shows no cost."""
    if not (folder / PROVENANCE).is_file():
        return None
    cost = read_record(folder / PROVENANCE, _Training, "remove the cell's folder and run the flow again").cost
    return cost if cost.alone and cost.seconds_by_step else None


def _read_points(
    folder: Path, cell: FinishedCell, cost: _Cost | None, machines: Sequence[str]
) -> dict[int, dict[str, float]]:
    """Read step -> numbers of one training; seconds of several machines do not compare and are left out."""
    snapshots = read_snapshots(folder).models
    steps, last = {name.removeprefix(SNAPSHOT): name for name in snapshots}, cell.note.overrides.get("finetune.steps")
    if not isinstance(last, int):
        raise InputError(f"{folder} names no finetune.steps; give the folder of cells that compare --curve wrote")
    models = {int(step): snapshots[name] for step, name in steps.items() if step.isdecimal()}
    models[last] = cell.record.models[RESULT]
    seconds = cost.seconds_by_step if cost and len(machines) == 1 else {}
    return {step: _numbers(model) | _seconds(seconds.get(step)) for step, model in models.items()}


def _numbers(model: Model) -> dict[str, float]:
    return {name: metric.mean for name, metric in model.metrics().items() if name in SHOWN}


def _seconds(value: float | None) -> dict[str, float]:
    return {} if value is None else {SECONDS: value}


def _by_step(points: Mapping[int, Mapping[int, Mapping[str, float]]]) -> dict[int, dict[int, Mapping[str, float]]]:
    """Turn seed -> step -> numbers around."""
    steps = next(iter(points.values()))
    return {step: {seed: found[step] for seed, found in points.items()} for step in sorted(steps)}
