"""The cells of a comparison -> its methods, each with one model per seed, and their paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.protocol.evaluation import DENSE, Model
from stages.protocol.intervals import Estimate, estimate
from stages.protocol.protocol import check_same
from stages.runtime.errors import InputError
from stages.tools.comparison.cells import FinishedCell, in_row, read_cells
from stages.tools.comparison.estimates import difference_by_seed
from stages.tools.comparison.published import ABLATION, BASELINE, METHODS

RESULT, ONE_SHOT = "finetuned", "pruned"
"""The models that the methods' rows and the ablation are about."""
DENSE_TITLE = "pretrained"


@dataclass(frozen=True)
class Method:
    """One row of the table: the models that one method gave, one per seed."""

    title: str
    models: Mapping[int, Model]
    """Seed -> model."""
    steps: int | None = None
    """Finetuning steps; None for the dense model."""

    def estimate(self, metric: str) -> Estimate:
        """Estimate a metric's mean over the seeds; the value of one seed is the mean over its sets."""
        return estimate([model.metric(metric).mean for model in self.models.values()])

    def measured(self, metric: str) -> Estimate | None:
        """Estimate as `estimate` does; None if a model was evaluated before the metric was measured."""
        return self.estimate(metric) if all(metric in model.metrics() for model in self.models.values()) else None

    @property
    def first(self) -> Model:
        """The model of the lowest seed; all seeds give models of one size."""
        return self.models[min(self.models)]


@dataclass(frozen=True)
class Comparison:
    """The finished cells of a comparison, sorted into methods and the ablation."""

    cells: list[FinishedCell]
    dense: Method
    methods: dict[str, Method]
    """Key of `METHODS` -> method, in that order; methods without a finished cell are left out."""
    ablation: dict[int, Estimate]
    """Number of timesteps used -> SSIM of the pruned model, without finetuning."""

    @property
    def rows(self) -> list[Method]:
        """All rows of the table, the dense model first."""
        return [self.dense, *self.methods.values()]

    def difference(self, method: Method, metric: str) -> Estimate | None:
        """Estimate metric(method) − metric(baseline), paired by seed.

        None for the baseline itself, without a baseline, and without a common seed in which both have the metric.
        """
        baseline = self.methods.get(BASELINE)
        if baseline is None or baseline is method:
            return None
        ours, theirs = (
            {seed: found[metric].mean for seed, model in row.models.items() if metric in (found := model.metrics())}
            for row in (method, baseline)
        )
        return difference_by_seed(ours, theirs)

    @property
    def fid_dense_floor(self) -> Estimate | None:
        """Estimate the floor of FID_DENSE over the seeds; None if a seed has none: one set, or an older evaluation."""
        floors = [model.fid_dense_unpaired for model in self.dense.models.values()]
        found = [floor.mean for floor in floors if floor]
        return estimate(found) if len(found) == len(floors) else None


def read_comparison(folder: Path) -> Comparison:
    """Read all cells below a folder and sort them into rows and seeds.

    Raises:
        InputError: The folder holds no cell, a cell is damaged or belongs to no row, protocols differ in more than the
            seed, there are two dense models, or finetuned models differ in size.
    """
    cells = read_cells(folder)
    for cell in cells:
        if cell.note.row not in (*METHODS, ABLATION):
            raise InputError(
                f"{folder / cell.name} is in row {cell.note.row!r}, which is not a row of a method comparison; "
                f"give the folder of cells that the flow compare wrote"
            )
    check_comparable(cells, {cell.name: cell.name for cell in cells})
    check_sizes([cell for cell in cells if cell.note.row != ABLATION])
    return Comparison(
        cells,
        Method(DENSE_TITLE, {cell.seed: cell.record.models[DENSE] for cell in cells}),
        {row: _to_method(row, members) for row in METHODS if (members := in_row(cells, row))},
        _to_ablation(in_row(cells, ABLATION)),
    )


def check_comparable(cells: Sequence[FinishedCell], titles: Mapping[str, str]) -> None:
    """Check that protocols differ in the seed alone, and that all cells were pruned from one dense model.

    Args:
        cells: At least one.
        titles: Cell -> how a message names it.

    Raises:
        InputError: They are not comparable.
    """
    first = cells[0]
    for cell in cells[1:]:
        names = titles[first.name], titles[cell.name]
        protocol = cell.record.protocol.model_copy(update={"seed": first.record.protocol.seed})
        check_same(first.record.protocol, protocol, names)
        if cell.record.dense_sha256 != first.record.dense_sha256:
            raise InputError(
                f"{' and '.join(names)} were pruned from two dense models; compare cells of one dense model"
            )


def check_sizes(cells: Sequence[FinishedCell]) -> None:
    """Refuse finetuned models of unequal size, which a target in milliseconds or a choice of branches can lead to.

    Raises:
        InputError: Two models differ in parameters or MACs.
    """
    sizes = {cell.name: (cell.record.models[RESULT].params, cell.record.models[RESULT].macs) for cell in cells}
    if len(set(sizes.values())) > 1:
        one, other = next((a, b) for a in sizes for b in sizes if sizes[a] != sizes[b])
        found = f"{one} has {sizes[one][1]} MACs and {other} {sizes[other][1]}"
        raise InputError(
            f"{found}; all must reach the same size: give prune.target as a ratio, MACs or parameters, and name the "
            "branches of prune.depth"
        )


def _to_method(row: str, cells: Sequence[FinishedCell]) -> Method:
    steps = cells[0].note.overrides.get("finetune.steps")
    return Method(METHODS[row], {cell.seed: cell.record.models[RESULT] for cell in cells}, steps)


def _to_ablation(cells: Iterable[FinishedCell]) -> dict[int, Estimate]:
    ssims: dict[int, list[float]] = {}
    for cell in cells:
        count = cell.note.overrides["importance.num_timesteps"]
        ssims.setdefault(count, []).append(cell.record.models[ONE_SHOT].ssim.mean)
    return {count: estimate(ssims[count]) for count in sorted(ssims)}
