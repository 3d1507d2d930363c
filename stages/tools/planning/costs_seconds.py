"""params.yaml and the seconds of a pass -> the seconds that the stage costs takes."""

from collections.abc import Mapping
from itertools import product

from stages.costs.params import PASSES
from stages.params import Params
from stages.tools.planning.workload import Pass


def costs_seconds(params: Params, rates: Mapping[Pass, float]) -> float:
    """Return the seconds that the costs stage takes for the models, and beside them for their variants.

    Args:
        params: All of params.yaml.
        rates: The seconds of a pass of one image of each model; each pass of a cache counts as a full one.
    """
    costs, candidates = params.costs, _timed_with_variants(params)
    models_s = sum(rates.get(model, 0.0) for model in ("dense", "pruned"))
    found = sum(_rounds_seconds(params, batch * models_s, costs.seconds) for _, _, batch in costs.settings)
    cycle_s = sum(interval * rates.get(model, 0.0) for model, interval, _ in candidates)
    limit_s = costs.seconds * len(candidates)
    return found + sum(_rounds_seconds(params, batch * cycle_s, limit_s) for batch in costs.batches)


def _timed_with_variants(params: Params) -> set[tuple[Pass, int, str]]:
    """List what is timed in turn with variants, once of what is alike: model, passes of a cycle, and graph."""
    if params.variants is None:
        return set()
    found: set[tuple[Pass, int, str]] = {("dense", 1, ""), ("pruned", 1, "")}
    for name, kind in product(params.variants.models, params.variants.parsed()):
        graph = f"{name} {kind.name}" if kind.is_graph else ""
        found.add(("dense" if name == "dense" else "pruned", kind.interval, graph))
    return found


def _rounds_seconds(params: Params, round_s: float, limit_s: float) -> float:
    """Return the seconds of passes in turn that take `round_s` together; 0 where the stage leaves them out."""
    if PASSES * round_s > limit_s:
        return 0.0
    passes = min(params.costs.repeats, max(PASSES, limit_s / max(round_s, 1e-9)))
    return (passes + 3) * round_s  # before them two to warm up, and one that counts the memory
