"""A preset's params -> the cells that show quality over steps: every recipe or method with every seed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flows.workspaces.grid import PlannedCell
from flows.workspaces.method_rows import LONGEST, OF_ONE_SIZE, OUR_DECAYS, check_plan, our_muon, plan_rows
from flows.workspaces.overrides import Overrides, check_order, parse_pairs
from flows.workspaces.repository import ParamsSource, Repository
from stages.params import Params
from stages.runtime.errors import InputError
from stages.tools.comparison.published import METHODS, PRUNES_ITSELF

Recipes = Mapping[str, Overrides]
"""Name of a recipe -> keys of the block finetune, and `COMPENSATION`."""
COMPENSATION = "prune.compensate"
"""What a recipe may do to the cut model before it is finetuned."""
RECIPES: Recipes = {
    "noise": {"finetune.loss": {"noise": 1.0}},
    "noise+output": {"finetune.loss": {"noise": 1.0, "output": 1.0}},
    "output": {"finetune.loss": {"noise": 0.0, "output": 1.0}},
    "output+feature": {"finetune.loss": {"noise": 0.0, "output": 1.0, "feature": 0.1}},
    "output+feature+muon": {"finetune.loss": {"noise": 0.0, "output": 1.0, "feature": 0.1}},
    "scratch": {"finetune.loss": {"noise": 1.0}, "finetune.init": "scratch"},
}
"""The rows by default, in the order of the tables; keys of `loss` that are left out have their defaults."""
PAPERS = ("noise", "scratch")
"""Recipes that keep one EMA, as the paper does; the others have ours beside it."""
WITH_MUON = ("output+feature+muon",)
"""Recipes that step with Muon, at the preset's rate for it if there is one; the others with Adam alone."""
NO_LOSS = {"finetune.loss": {"noise": 0.0}}
"""What a recipe from the command line begins with, so that it names every loss that it has."""
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Measured steps by default, as shares of the preset's steps."""


def parse_recipes(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read NAME={KEY: VALUE, …}, the keys being `COMPENSATION` or of the block finetune.

    Raises:
        InputError: A text has another form, a name is not allowed, or a key is another one or fixed.
    """
    recipes = dict(parse_pairs(texts, "--recipe", "'output-only={finetune.loss.output: 1}'"))
    for name, keys in recipes.items():
        _check_recipe(name, keys)
    return recipes


def _check_recipe(name: str, keys: object) -> None:
    """Check a recipe from the command line or a deployment.

    Raises:
        InputError: It is not allowed.
    """
    taken = list(dict.fromkeys([*RECIPES, *METHODS]))
    if name in taken or not name.isprintable() or not name or "," in name or "|" in name:
        raise InputError(
            f"a recipe cannot be called {name!r}; choose another name than {', '.join(taken)}, without , or |"
        )
    if not isinstance(keys, dict) or not keys:
        raise InputError(
            f"--recipe {name} has no keys; write for example --recipe '{name}={{finetune.loss.output: 1}}'"
        )
    fixed = [key for key in map(str, keys) if key != COMPENSATION and not _is_of_training(key)]
    check_order(map(str, keys), f"--recipe {name}:")
    if fixed:
        advice = f"a recipe sets {COMPENSATION} or keys of finetune, and --steps its steps, so that all cuts are alike"
        raise InputError(f"--recipe {name} sets {', '.join(fixed)}; {advice}")


def _is_of_training(key: str) -> bool:
    return key.startswith("finetune.") and not key.startswith(("finetune.steps", "finetune.snapshots"))


def parse_steps(text: str) -> list[int]:
    """Read a list such as 25,50,100.

    Raises:
        InputError: It is not a list of two or more rising numbers from 1.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) <= LONGEST for part in parts):
        raise _wrong_steps(text)
    steps = [int(part) for part in parts]
    check_steps(steps)
    return steps


def check_steps(steps: Sequence[int]) -> None:
    """Check that steps make a curve.

    Raises:
        InputError: They do not.
    """
    if len(steps) < 2 or list(steps) != sorted(set(steps)) or steps[0] < 1:  # noqa: PLR2004
        raise _wrong_steps(",".join(map(str, steps)))


def _wrong_steps(found: str) -> InputError:
    return InputError(f"--steps {found}: give two or more rising numbers from 1, for example --steps 25,50,100,200,450")


def default_steps(params: Params) -> list[int]:
    """Return the steps at which a preset is measured unless some are given: shares of its own."""
    return sorted({max(1, round(params.finetune.steps * share)) for share in SHARES})


def plan_recipes(params: Params, recipes: Recipes, steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the overrides of each row: the recipes of every comparison, those given, then the methods.

    Recipes train the model as it was cut, unless they compensate it before; `ours` does.
    """
    slowest = max(params.finetune.ema_decays)
    ours = sorted({*OUR_DECAYS, slowest})
    ends = {"finetune.steps": steps[-1], "finetune.snapshots": list(steps[:-1])}
    fixed = {**ends, "finetune.init": "pruned", "finetune.gate": None}  # held-out losses of two recipes do not compare
    as_cut = {**fixed, COMPENSATION: None}
    named = {
        name: {
            **as_cut,
            "finetune.ema_decays": [slowest] if name in PAPERS else ours,
            "finetune.muon": our_muon(params) if name in WITH_MUON else None,
            **keys,
        }
        for name, keys in RECIPES.items()
    }
    off = {"finetune.muon": None, **NO_LOSS}
    given = {name: {**as_cut, "finetune.ema_decays": ours, **off, **keys} for name, keys in recipes.items()}
    methods = {name: {**fixed, **keys} for name, keys in plan_rows(params).items() if name not in named}
    return {**named, **given, **methods}


def plan_rows_of_curve(
    params: Params,
    names: Sequence[str] | None,
    seeds: Sequence[int],
    steps: Sequence[int] | None,
    recipes: Recipes,
    overrides: Overrides,
) -> dict[str, dict[str, Any]]:
    """Return the overrides of each chosen row, in the order of the tables; the arguments are those of `plan_curve`.

    Beside a method's row, which prunes uniformly, recipes do so too, so that all have the same widths.

    Raises:
        InputError: A row does not exist, steps make no curve, overrides set a key of rows or seeds, or widths would
            differ between seeds.
    """
    for name, keys in recipes.items():
        _check_recipe(name, keys)
    measured = default_steps(params) if steps is None else list(steps)
    check_steps(measured)
    rows = plan_recipes(params, recipes, measured)
    chosen = list(RECIPES) if names is None else list(names)
    chosen += [name for name in recipes if name not in chosen]
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"rows are {', '.join(chosen) or 'missing'}; give one or more, each once")
    if PRUNES_ITSELF.intersection(chosen):
        rows = {name: {**OF_ONE_SIZE, **row} for name, row in rows.items()}
    elif len(seeds) > 1 and (params.prune.ranking, params.prune.geglu) != (*OF_ONE_SIZE.values(),):
        found = f"prune.ranking {params.prune.ranking} with prune.geglu {params.prune.geglu}"
        raise InputError(f"{found} gives each seed other widths; set uniform and pairs, or give one seed")
    check_plan(rows, chosen, seeds, overrides)
    return {name: rows[name] for name in chosen}


def with_steps(overrides: Overrides, steps: Sequence[int] | None) -> Overrides:
    """Return overrides with the last step, which others are checked against, and without the preset's Jacobian loss."""
    ends = {"finetune.steps": steps[-1], "finetune.snapshots": [], "finetune.loss.jacobian": None} if steps else {}
    return {**overrides, **ends}


def plan_curve(
    repository: Repository,
    source: ParamsSource,
    names: Sequence[str] | None,
    seeds: Sequence[int],
    steps: Sequence[int] | None,
    recipes: Recipes,
    overrides: Overrides,
) -> list[PlannedCell]:
    """Plan every cell of a comparison of recipes, and check its params before anything is cloned.

    Args:
        repository: Where the preset is found.
        source: Commit and preset.
        names: Rows in the order of the tables, the methods' among them; None is all of `RECIPES`.
        seeds: Each row has one cell per seed.
        steps: Steps that are measured; the last ends the training. None is shares of the preset's.
        recipes: Further rows, after those of `names` unless these place them.
        overrides: Dotted keys -> one value, for all cells.

    Raises:
        InputError: A row or preset does not exist, overrides set a key of rows or seeds, or a value is not allowed.
    """
    params = repository.params(source, with_steps(overrides, steps))
    rows = plan_rows_of_curve(params, names, seeds, steps, recipes, overrides)
    cells = [
        PlannedCell(f"{name}, seed {seed}", {**overrides, **row, "seed": seed}, {"row": name})
        for seed in seeds
        for name, row in rows.items()
    ]
    repository.render(source, [cell.overrides for cell in cells])
    return cells
