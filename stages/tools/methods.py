"""The cells of a comparison -> its methods, seed by seed, and how far they can be told apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.protocol.evaluation import DENSE, Model
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.runtime.errors import InputError
from stages.tools.cells import FinishedCell, read_cells
from stages.tools.published import ABLATION, BASELINE, METHODS

RESULT, ONE_SHOT = "finetuned", "pruned"
"""The models that rows and the ablation look at."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what came of a method with each seed."""

    title: str
    models: Mapping[int, Model]
    """By seed."""
    steps: int | None = None
    """Of finetuning; None for the dense model."""

    def estimate(self, metric: str) -> Estimate:
        """Take a metric's mean over the seeds; each seed gives the mean over its sets."""
        return estimate([model.metric(metric).mean for model in self.models.values()])

    def above(self, other: "Method", metric: str) -> Estimate | None:
        """Estimate how much a metric is above that of another method, seed by seed; None without a seed in common."""
        seeds = [seed for seed in self.models if seed in other.models]
        if not seeds:
            return None
        ours, theirs = ([it.models[seed].metric(metric).mean for seed in seeds] for it in (self, other))
        return paired_difference(ours, theirs)

    @property
    def first(self) -> Model:
        """Give the model of the lowest seed; with any other it has the same size."""
        return self.models[min(self.models)]


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found."""

    cells: list[FinishedCell]
    dense: Method
    methods: dict[str, Method]
    """In the order of `METHODS`; those of which a cell finished."""
    ablation: dict[int, Estimate]
    """Timesteps used -> SSIM of the pruned model, without finetuning."""

    @property
    def rows(self) -> list[Method]:
        """Give all rows of the table, the dense model first."""
        return [self.dense, *self.methods.values()]

    def difference(self, method: Method, metric: str) -> Estimate | None:
        """Estimate how much a method is above the baseline; None for the baseline itself, or where it is not there."""
        baseline = self.methods.get(BASELINE)
        return None if baseline in (None, method) else method.above(baseline, metric)


def read_comparison(folder: Path) -> Comparison:
    """Read all cells below a folder and sort them into rows and seeds.

    Raises:
        InputError: There is none, one is damaged or of no row, or they differ in more of the protocol than the seed.
    """
    cells = sorted(read_cells(folder), key=seed_of)
    first = cells[0].record
    for cell in cells:
        if cell.cell.row not in (*METHODS, ABLATION):
            raise InputError(f"{folder / cell.name} is of no row of a comparison; take the folder of its cells")
        protocol = cell.record.protocol.model_copy(update={"seed": first.protocol.seed})
        check_same(first.protocol, protocol, (cells[0].name, cell.name))
        if cell.record.dense_sha256 != first.dense_sha256:
            raise InputError(f"{cells[0].name} and {cell.name} were cut from two dense models; compare those of one")
    _check_sizes([cell for cell in cells if cell.cell.row != ABLATION])
    return Comparison(
        cells,
        Method("pretrained", {seed_of(cell): cell.record.models[DENSE] for cell in cells}),
        {row: _to_method(row, members) for row in METHODS if (members := [it for it in cells if it.cell.row == row])},
        _to_ablation([cell for cell in cells if cell.cell.row == ABLATION]),
    )


def _check_sizes(cells: Sequence[FinishedCell]) -> None:
    """Refuse models of unequal size, as a target in milliseconds gives them.

    Raises:
        InputError: There are two.
    """
    sizes = {cell.name: (cell.record.models[RESULT].params, cell.record.models[RESULT].macs) for cell in cells}
    if len(set(sizes.values())) > 1:
        one, other = next((a, b) for a in sizes for b in sizes if sizes[a] != sizes[b])
        found = f"{one} has {sizes[one][1]} MACs and {other} {sizes[other][1]}"
        raise InputError(f"{found}; give prune.target as a ratio, MACs or parameters, which all methods meet alike")


def seed_of(cell: FinishedCell) -> int:
    """Give the seed of a cell."""
    return cell.record.protocol.seed


def _to_method(row: str, cells: Sequence[FinishedCell]) -> Method:
    steps = cells[0].cell.overrides.get("finetune.steps")
    return Method(METHODS[row], {seed_of(cell): cell.record.models[RESULT] for cell in cells}, steps)


def _to_ablation(cells: Iterable[FinishedCell]) -> dict[int, Estimate]:
    found: dict[int, list[float]] = {}
    for cell in cells:
        count = cell.cell.overrides["importance.num_timesteps"]
        found.setdefault(count, []).append(cell.record.models[ONE_SHOT].ssim.mean)
    return {count: estimate(found[count]) for count in sorted(found)}
