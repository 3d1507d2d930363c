"""A preset's params -> the cells of the paper's table: every method with every seed, of equal size and equal steps."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.workspaces.grid import PlannedCell
from flows.workspaces.overrides import Overrides, overlap
from flows.workspaces.repository import ParamsSource, Repository
from stages.finetune.params import MUON_TO_ADAM
from stages.params import Params
from stages.prune.params import CompensateParams
from stages.runtime.errors import InputError
from stages.tools.comparison.published import ABLATION, METHODS

TIMESTEPS = (50, 100, 250, 300, 350, 1000)
"""Numbers of timesteps in the paper's ablation."""
LONGEST = 18
"""Most digits of a seed or of a number of steps."""
OUR_DECAYS = (0.9, 0.95)
"""EMA decays of our recovery, in addition to the preset's slowest."""
OF_ONE_SIZE = {"prune.ranking": "uniform", "prune.geglu": "pairs"}
"""Overrides under which widths depend on neither scores nor seed."""
ONE_SHOT: Overrides = {
    "importance.criterion": "taylor",
    "importance.stride": 1,
    "prune.target": {"ratio": 0.15},
    **OF_ONE_SIZE,
    "prune.compensate": None,
    "prune.depth": None,
    "rounds.count": 1,
    "finetune.init": "pruned",
    "finetune.steps": 1,
    "finetune.snapshots": [],
    "finetune.loss": {"noise": 1.0},
    "finetune.warmup_steps": 0,
    "finetune.heldout_every": 1,
    "finetune.checkpoint_every": 1,
    "finetune.gate": None,
    "finetune.samples": None,
    "variants": None,
}
"""Overrides of the ablation, which evaluates the pruned model and so finetunes for one step."""


def parse_seeds(text: str) -> list[int]:
    """Read a list such as 0,1,2.

    Raises:
        InputError: A seed is not a number from 0, or occurs twice.
    """
    parts = text.split(",")
    are_numbers = all(part.strip().isdecimal() and len(part) <= LONGEST for part in parts)
    if not are_numbers or len({int(part) for part in parts}) < len(parts):
        raise InputError(f"--seeds {text[:60]}: give different numbers from 0, for example --seeds 0,1,2,3,4")
    return [int(part) for part in parts]


def plan_rows(params: Params) -> dict[str, dict[str, Any]]:
    """Return the overrides of each row of the table.

    All rows prune uniformly to the preset's target, so that their widths are equal whatever the criterion.
    """
    slowest = max(params.finetune.ema_decays)
    recovery = {**OF_ONE_SIZE, "finetune.init": "pruned"}
    theirs = {
        **recovery,
        "prune.compensate": None,
        **_loss(noise=1.0, output=0.0, feature=0.0),
        "finetune.muon": None,
        "finetune.ema_decays": [slowest],
    }
    ours = {
        **recovery,
        "prune.compensate": our_compensation(params),
        **_loss(noise=0.0, output=1.0, feature=0.1),
        "finetune.muon": our_muon(params),
        "finetune.ema_decays": sorted({*OUR_DECAYS, slowest}),
    }
    return {
        "scratch": {**theirs, "finetune.init": "scratch"},
        **{name: {**theirs, "importance.criterion": name} for name in ("random", "magnitude", "taylor")},
        **{f"diff-pruning-{threshold}": {**theirs, **_diff_pruning(threshold)} for threshold in (0, 0.02, 0.05)},
        "no-cancel-taylor": {**theirs, "importance.criterion": "no-cancel-taylor"},
        "ours": {**ours, **_diff_pruning(params.importance.threshold)},
    }


def our_muon(params: Params) -> dict[str, float]:
    """Return the settings of Muon in our recovery: the preset's, or twice Adam's rate if it has none."""
    given = params.finetune.muon
    return given.model_dump() if given else {"learning_rate": MUON_TO_ADAM * params.finetune.learning_rate}


def our_compensation(params: Params) -> dict[str, Any] | None:
    """Return the compensation before our recovery: the preset's, or the default; None if only branches are removed."""
    given, depth = params.prune.compensate, params.prune.depth
    return None if depth and depth.remove == "target" else (given or CompensateParams()).model_dump()


def _loss(**weights: float) -> dict[str, float | None]:
    return {f"finetune.loss.{name}": weight for name, weight in {**weights, "jacobian": None, "min_snr": None}.items()}


def _diff_pruning(threshold: float) -> dict[str, Any]:
    return {"importance.criterion": "diff-pruning", "importance.threshold": threshold}


def plan_comparison(
    repository: Repository,
    source: ParamsSource,
    names: Sequence[str],
    seeds: Sequence[int],
    overrides: Overrides,
    *,
    ablation: bool,
) -> list[PlannedCell]:
    """Plan every cell of a comparison, and check its params before anything is cloned.

    Args:
        repository: Where the preset is found.
        source: Commit and preset.
        names: Rows, keys of `METHODS`.
        seeds: Each row has one cell per seed.
        overrides: Dotted keys -> one value, for all cells; in the ablation, `ONE_SHOT` takes precedence.
        ablation: Whether cells that vary the number of timesteps are added.

    Raises:
        InputError: There is nothing to compare, a row or preset does not exist, the overrides set a key that rows or
            seeds set, or a value is not allowed.
    """
    if not (names or ablation):
        raise InputError("there is nothing to compare; give at least one row")
    params = repository.params(source, overrides)
    rows = plan_rows(params)
    check_plan(rows, names, seeds, overrides)
    common = {**overrides, "finetune.steps": params.finetune.steps}
    cells = [
        PlannedCell(f"{title}, seed {seed}", {**given, "seed": seed}, {"row": row})
        for seed in seeds
        for row, title, given in _cells_of_a_seed(rows, names, common, ablation=ablation)
    ]
    repository.render(source, [cell.overrides for cell in cells])
    return cells


def _cells_of_a_seed(
    rows: Mapping[str, Overrides], names: Sequence[str], common: Overrides, *, ablation: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield row, title and overrides of every cell that each seed has."""
    for name in METHODS:
        if name in names:
            yield name, METHODS[name], {**common, **rows[name]}
    once = {key: value for key, value in common.items() if not any(overlap(key, other) for other in ONE_SHOT)}
    for count in TIMESTEPS if ablation else ():
        yield ABLATION, f"{count} timesteps", {**once, **ONE_SHOT, "importance.num_timesteps": count}


def check_plan(rows: Mapping[str, Overrides], names: Sequence[str], seeds: Sequence[int], overrides: Overrides) -> None:
    """Check rows, seeds and overrides of a comparison.

    Raises:
        InputError: A row does not exist, the seeds are not one or more different numbers from 0, or the overrides
            set a key that rows or seeds set.
    """
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise InputError(f"there is no row {', '.join(map(repr, unknown))}; the rows are {', '.join(rows)}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'missing'}; give one or more from 0, each once")
    fixed = {"seed", *(key for name in names or rows for key in rows[name])}
    taken = [key for key in overrides if any(overlap(key, other) for other in fixed)]
    if taken:
        raise InputError(
            f"{', '.join(taken)} is set by rows and seeds; leave it out of --set, choose --rows or --seeds"
        )
