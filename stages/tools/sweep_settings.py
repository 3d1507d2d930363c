"""The cells of a sweep -> its settings of the grid, over the seeds if those are swept, and the front of the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.protocol.evaluation import DENSE, Metric, Model
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.protocol.verdict import FINETUNED
from stages.tools.cells import FinishedCell, read_cells
from stages.tools.methods import seed_of

SEED = "seed"


@dataclass(frozen=True)
class Setting:
    """The finished cells that differ in the seed alone; one where the seed is not swept."""

    cells: tuple[FinishedCell, ...]
    """In the order of the seeds."""
    overrides: Mapping[str, Any]
    """What they set, but for the seed where it is swept."""

    @property
    def first(self) -> FinishedCell:
        """The cell of the lowest seed, by which the setting is named."""
        return self.cells[0]

    @property
    def is_repeated(self) -> bool:
        """Whether there are several seeds."""
        return len(self.cells) > 1

    @property
    def models(self) -> list[Model]:
        """The finetuned models, one a seed."""
        return [cell.record.models[FINETUNED] for cell in self.cells]

    @property
    def macs(self) -> float:
        """MACs of the finetuned model, the mean over the seeds: those of a target in milliseconds differ."""
        return fmean(model.macs for model in self.models)

    @property
    def share(self) -> float:
        """Its MACs over those of the dense model."""
        return self.macs / self.first.record.models[DENSE].macs

    def measured(self, name: str) -> Metric | Estimate | None:
        """Return a metric over the sets of one seed, or estimate it over the seeds; None if a model lacks it."""
        found = [model.metrics().get(name) for model in self.models]
        present = [it for it in found if it]
        if len(present) < len(found):
            return None
        return estimate([it.mean for it in present]) if self.is_repeated else present[0]

    @property
    def fid(self) -> Metric | Estimate:
        """The FID of the finetuned model."""
        found = self.measured("fid")
        assert found, "every model has an FID"
        return found

    @property
    def is_like_dense(self) -> bool:
        """Whether the interval of its FID's difference from dense contains zero; needs two sets, or two seeds."""
        if self.is_repeated:
            dense = [cell.record.models[DENSE].fid.mean for cell in self.cells]
            return not paired_difference([model.fid.mean for model in self.models], dense).is_distinct
        difference = self.models[0].fid.above_dense
        return difference is not None and difference.is_distinct is False

    def difference(self, other: "Setting", name: str) -> Estimate | None:
        """Estimate metric(self) − metric(other), paired by seed; None without two common seeds."""
        ours, theirs = (
            {seed_of(cell): cell.record.models[FINETUNED].metrics()[name].mean for cell in it.cells}
            for it in (self, other)
        )
        seeds = [seed for seed in ours if seed in theirs]
        if other is self or len(seeds) < 2:  # noqa: PLR2004
            return None
        return paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])

    def label(self) -> str:
        """Write the overrides, each key by its last word."""
        return write_overrides(self.overrides)


def read_settings(folder: Path) -> list[Setting]:
    """Read all cells below a folder, and join those that differ in the seed; ordered by MACs, then by FID.

    Raises:
        InputError: The folder holds no cell, a cell is damaged, or protocols differ in more than the seed.
    """
    cells = read_cells(folder)
    first = cells[0]
    for other in cells[1:]:
        protocol = other.record.protocol.model_copy(update={SEED: first.record.protocol.seed})
        names = (write_overrides(first.note.overrides), write_overrides(other.note.overrides))
        check_same(first.record.protocol, protocol, names)
    is_swept = len({seed_of(cell) for cell in cells}) > 1
    groups: dict[str, Setting] = {}
    for cell in sorted(cells, key=seed_of):
        own = {key: value for key, value in cell.note.overrides.items() if key != SEED or not is_swept}
        key = repr(own) if is_swept else cell.name
        groups[key] = Setting((*(groups[key].cells if key in groups else ()), cell), own)
    return sorted(groups.values(), key=_macs_and_fid)


def _macs_and_fid(setting: Setting) -> tuple[float, float]:
    return setting.macs, setting.fid.mean


def write_overrides(overrides: Mapping[str, Any]) -> str:
    """Write overrides, each key by its last word: criterion random, macs 56%."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in overrides.items())


def swept_keys(settings: Sequence[Setting]) -> list[str]:
    """List the override keys whose values differ between settings; a single one gives all of its keys."""
    first, *others = (setting.overrides for setting in settings)
    return [key for key in first if not others or any(other.get(key) != first[key] for other in others)]


def find_front(settings: Sequence[Setting]) -> list[Setting]:
    """Find the Pareto front of MACs and FID, ordered by MACs."""
    front: list[Setting] = []
    for setting in sorted(settings, key=_macs_and_fid):
        if not front or setting.fid.mean < front[-1].fid.mean:
            front.append(setting)
    return front


def rank(front: Sequence[Setting]) -> list[Setting]:
    """Order a front, the best first: settings like dense by MACs, then the others by FID."""
    alike = sorted((setting for setting in front if setting.is_like_dense), key=lambda setting: setting.macs)
    others = sorted((setting for setting in front if not setting.is_like_dense), key=lambda setting: setting.fid.mean)
    return [*alike, *others]
