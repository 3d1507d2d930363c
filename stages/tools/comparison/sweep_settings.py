"""The cells of a sweep -> its settings of the grid, over the seeds if those are swept, and the front of the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.protocol.costs import Cost
from stages.protocol.evaluation import DENSE, Metric, Model
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.verdict import FINETUNED
from stages.report.variants import pareto_front
from stages.runtime.errors import InputError
from stages.tools.comparison.cells import FinishedCell, read_cells
from stages.tools.comparison.estimates import difference_by_seed
from stages.tools.comparison.methods import check_comparable
from stages.tools.params_yaml import write_overrides

SEED = "seed"


@dataclass(frozen=True)
class Setting:
    """The finished cells that differ in the seed alone; one where the seed is not swept."""

    cells: tuple[FinishedCell, ...]
    """In the order of the seeds."""
    overrides: Mapping[str, Any]
    """What they set, but for the seed where it is swept."""
    is_over_seeds: bool = False
    """Whether the sweep has several seeds, so that intervals are over them; this setting may have one all the same."""

    @property
    def first(self) -> FinishedCell:
        """The cell of the lowest seed."""
        return self.cells[0]

    @property
    def models(self) -> list[Model]:
        """The finetuned models, one a seed."""
        return [cell.record.models[FINETUNED] for cell in self.cells]

    @property
    def costs(self) -> list[Cost]:
        """Times of the finetuned models at the first batch size, one a seed."""
        return [cell.costs.first(FINETUNED) for cell in self.cells]

    @property
    def macs(self) -> float:
        """MACs of the finetuned model, the mean over the seeds: those of a target in milliseconds differ."""
        return fmean(model.macs for model in self.models)

    @property
    def share(self) -> float:
        """Its MACs over those of the dense model."""
        return self.macs / self.first.record.models[DENSE].macs

    def measured(self, name: str) -> Metric | Estimate | None:
        """Return a metric over the sets of one cell, or estimate it over the seeds; None if a model lacks it."""
        found = [model.metrics().get(name) for model in self.models]
        present = [it for it in found if it]
        if len(present) < len(found):
            return None
        return estimate([it.mean for it in present]) if self.is_over_seeds else present[0]

    @property
    def fid(self) -> Metric | Estimate:
        """The FID of the finetuned model."""
        found = self.measured("fid")
        assert found, "every model has an FID"
        return found

    @property
    def is_like_dense(self) -> bool:
        """Whether the interval of its FID's difference from dense contains zero; needs two sets, or two seeds."""
        if self.is_over_seeds:
            dense = [cell.record.models[DENSE].fid.mean for cell in self.cells]
            return paired_difference([model.fid.mean for model in self.models], dense).is_distinct is False
        difference = self.models[0].fid.above_dense
        return difference is not None and difference.is_distinct is False

    def difference(self, other: "Setting", name: str) -> Estimate | None:
        """Estimate metric(self) − metric(other), paired by seed; None for itself and without a common seed."""
        if other is self:
            return None
        ours, theirs = (
            {cell.seed: cell.record.models[FINETUNED].metrics()[name].mean for cell in it.cells} for it in (self, other)
        )
        return difference_by_seed(ours, theirs)


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep, ordered by MACs, then by FID."""

    settings: Sequence[Setting]
    baseline: Setting | None = None
    """The setting that the others are compared with, seed by seed."""

    @property
    def is_over_seeds(self) -> bool:
        """Whether the seed is swept."""
        return self.settings[0].is_over_seeds

    @property
    def cells(self) -> list[FinishedCell]:
        """All cells, setting by setting."""
        return [cell for setting in self.settings for cell in setting.cells]

    def label(self, setting: Setting) -> str:
        """Write the values by which a setting differs from the others, each key by its last word."""
        keys = swept_keys(self.settings) if len(self.settings) > 1 else []
        return write_overrides({key: setting.overrides.get(key) for key in keys}) or FINETUNED

    @property
    def dense_fid(self) -> Metric | Estimate:
        """FID of the dense model: over the sets, or over the seeds."""
        found = {cell.seed: cell.record.models[DENSE].fid for cell in self.cells}
        return estimate([it.mean for it in found.values()]) if self.is_over_seeds else next(iter(found.values()))


def read_sweep(folder: Path, baseline: str = "") -> Sweep:
    """Read all cells below a folder, and join those that differ in the seed.

    Args:
        folder: One subfolder per finished cell.
        baseline: Name of a cell whose setting the others are compared with; empty for none.

    Raises:
        InputError: The folder holds no cell, a cell is damaged, protocols differ in more than the seed, there are two
            dense models, or the baseline is not among the cells.
    """
    cells = read_cells(folder)
    check_comparable(cells, {cell.name: write_overrides(cell.note.overrides) for cell in cells})
    if baseline and baseline not in [cell.name for cell in cells]:
        raise InputError(f"{folder} has no finished cell {baseline!r} to compare with; it has {len(cells)} others")
    is_over_seeds = len({cell.seed for cell in cells}) > 1
    groups: dict[str, Setting] = {}
    for cell in cells:
        own = {key: value for key, value in cell.note.overrides.items() if key != SEED or not is_over_seeds}
        key = repr(own) if is_over_seeds else cell.name
        groups[key] = Setting((*(groups[key].cells if key in groups else ()), cell), own, is_over_seeds)
    settings = sorted(groups.values(), key=_macs_and_fid)
    return Sweep(settings, next((it for it in settings if baseline in [cell.name for cell in it.cells]), None))


def _macs_and_fid(setting: Setting) -> tuple[float, float]:
    return setting.macs, setting.fid.mean


def swept_keys(settings: Sequence[Setting]) -> list[str]:
    """List the override keys whose values differ between settings; a single one gives all of its keys."""
    first, *others = (setting.overrides for setting in settings)
    return [key for key in first if not others or any(other.get(key) != first[key] for other in others)]


def find_front(settings: Sequence[Setting]) -> list[Setting]:
    """Find the Pareto front of MACs and FID, ordered by MACs."""
    return pareto_front(settings, _macs_and_fid)


def rank(front: Sequence[Setting]) -> list[Setting]:
    """Order a front, the best first: settings like dense by MACs, then the others by FID."""
    alike = sorted((setting for setting in front if setting.is_like_dense), key=lambda setting: setting.macs)
    others = sorted((setting for setting in front if not setting.is_like_dense), key=lambda setting: setting.fid.mean)
    return [*alike, *others]
