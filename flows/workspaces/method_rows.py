"""A preset's params -> the cells of the paper's table: every method with every seed, at equal size and equal steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flows.workspaces.overrides import Overrides, PlannedCell
from flows.workspaces.repository import Base, Repository
from stages.params import Params
from stages.runtime.errors import InputError
from stages.tools.published import ABLATION, METHODS

TIMESTEPS = (50, 100, 250, 300, 350, 1000)
"""Of the paper's ablation."""
OUR_DECAYS = (0.9, 0.95)
"""Of the moving averages that our recovery keeps beside the preset's slowest."""
ONE_SHOT = {
    "importance.criterion": "taylor",
    "importance.stride": 1,
    "prune.target": {"ratio": 0.15},
    "prune.ranking": "uniform",
    "prune.compensate": None,
    "finetune.init": "pruned",
    "finetune.steps": 1,
    "finetune.loss": {"noise": 1.0},
    "finetune.warmup_steps": 0,
    "finetune.heldout_every": 1,
    "finetune.checkpoint_every": 1,
    "finetune.gate": None,
    "finetune.samples": None,
}
"""The ablation looks at the pruned model, so it is finetuned as little as can be."""


def parse_seeds(text: str) -> list[int]:
    """Read 0,1,2.

    Raises:
        InputError: It is no list of unlike numbers from 0.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise InputError(f"--seeds {text} is no list of unlike numbers from 0; write for example --seeds 0,1,2,3,4")
    return [int(word) for word in words]


def check_rows(names: Iterable[str]) -> None:
    """Refuse rows that there are none of.

    Raises:
        InputError: There is one.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(f"there is no row {', '.join(map(repr, unknown))}; the rows are {', '.join(METHODS)}")


def plan_rows(params: Params) -> dict[str, dict[str, Any]]:
    """Give the overrides that make each row of the table what it is.

    All prune uniformly to the preset's target, so that all have its widths, whatever the criterion.
    """
    slowest = max(params.finetune.ema_decays)
    recovery = {"prune.ranking": "uniform", "finetune.init": "pruned"}
    theirs = {
        **recovery,
        **_loss(noise=1.0, output=0.0, feature=0.0),
        "finetune.ema_decays": [slowest],
    }
    ours = {
        **recovery,
        **_loss(noise=0.0, output=1.0, feature=0.1),
        "finetune.ema_decays": sorted({*OUR_DECAYS, slowest}),
    }
    return {
        "scratch": {**theirs, "finetune.init": "scratch"},
        **{name: {**theirs, "importance.criterion": name} for name in ("random", "magnitude", "taylor")},
        **{f"diff-pruning-{threshold}": {**theirs, **_diff_pruning(threshold)} for threshold in (0, 0.02, 0.05)},
        "ours": {**ours, **_diff_pruning(params.importance.threshold)},
    }


def _loss(**weights: float) -> dict[str, float | None]:
    return {f"finetune.loss.{name}": weight for name, weight in {**weights, "min_snr": None}.items()}


def _diff_pruning(threshold: float) -> dict[str, Any]:
    return {"importance.criterion": "diff-pruning", "importance.threshold": threshold}


def plan_comparison(
    repository: Repository,
    base: Base,
    names: Sequence[str],
    seeds: Sequence[int],
    overrides: Overrides,
    *,
    ablation: bool,
) -> list[PlannedCell]:
    """Plan every cell, and make sure that each is allowed, before anything is cloned.

    Args:
        repository: Where the preset is found.
        base: Commit and preset.
        names: Which rows of `METHODS`.
        seeds: Each row is made with each of them.
        overrides: For all cells; what the ablation fixes it fixes all the same.
        ablation: Whether the number of timesteps used is varied, too.

    Raises:
        InputError: There is nothing to compare, no such row or preset, the overrides set what rows and seeds differ in,
            or a value is not allowed.
    """
    if not (names or ablation):
        raise InputError("there is nothing to compare; give at least one row")
    params = repository.params(base.commit, base.preset)
    rows = plan_rows(params)
    check_plan(rows, names, seeds, overrides)
    common = {"finetune.steps": params.finetune.steps, **overrides}
    kinds = [(name, METHODS[name], {**common, **rows[name]}) for name in METHODS if name in names]
    if ablation:
        kinds += [
            (ABLATION, f"{count} timesteps", {**common, **ONE_SHOT, "importance.num_timesteps": count})
            for count in TIMESTEPS
        ]
    cells = [
        PlannedCell(f"{title}, seed {seed}", {**given, "seed": seed}, {"row": row})
        for seed in seeds
        for row, title, given in kinds
    ]
    repository.render(base.commit, [cell.overrides for cell in cells], base.preset)
    return cells


def check_plan(rows: Mapping[str, Overrides], names: Iterable[str], seeds: Sequence[int], overrides: Overrides) -> None:
    """Refuse a comparison that cannot be, before a commit is looked at.

    Raises:
        InputError: There is no such row, a seed is missing or none, or the overrides set what rows and seeds differ in.
    """
    check_rows(names)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; give one or more from 0, each once")
    fixed = {"seed", *(key for row in rows.values() for key in row)}
    taken = [key for key in overrides if any(_overlap(key, other) for other in fixed)]
    if taken:
        raise InputError(f"{', '.join(taken)} is what rows and seeds decide; leave it out of --set (--rows, --seeds)")


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
