"""Plans of two cuts, one after the other -> one plan in the numbering of the dense model."""

from stages.models.plan import EarlierCut, KeptChannels, Plan, PlannedGroup
from stages.runtime.errors import InputError


def compose(first: Plan, second: Plan) -> Plan:
    """Compose the plan of a cut and that of a cut of its result: K = K₁[K₂] for each side of each layer.

    Training between the cuts changes weights and no widths, so the composed plan maps the channels of the dense model
    to those of the last one all the same. compose is associative.

    Args:
        first: The plan of the dense model; itself composed or not.
        second: The plan of a model with the widths that `first` leaves.

    Returns:
        The plan of both cuts; its base is that of `first`.

    Raises:
        InputError: `second` removes branches, or is for a model with other groups or widths than `first` leaves.
    """
    if second.removed:
        found = f"the second plan removes {second.removed[0].name} and other branches"
        raise InputError(f"{found}; only the first cut of a model can remove branches")
    _check_widths(first, second)
    names = sorted({*first.layers, *second.layers})
    changes = {
        "version": first.version,
        "base": first.base,
        "removed": first.removed,
        "groups": [_compose_group(*pair) for pair in zip(first.groups, second.groups, strict=True)],
        "layers": {name: _compose_layer(first.layers.get(name), second.layers.get(name)) for name in names},
        "heads": {**first.heads, **second.heads},
        "earlier": [*first.earlier, _to_earlier(first, second.base.weights_sha256), *second.earlier],
    }
    return second.model_copy(update=changes).sealed()


def _check_widths(first: Plan, second: Plan) -> None:
    left = [(group.root, group.width - len(group.cut)) for group in first.groups]
    if (first.base.family, left) != (second.base.family, [(group.root, group.width) for group in second.groups]):
        raise InputError("the second plan is not for the result of the first: its groups or their widths differ")


def _compose_group(first: PlannedGroup, second: PlannedGroup) -> PlannedGroup:
    cut = set(first.cut)
    kept = [channel for channel in range(first.width) if channel not in cut]
    return first.model_copy(update={"cut": sorted({*cut, *(kept[channel] for channel in second.cut)})})


def _compose_layer(first: KeptChannels | None, second: KeptChannels | None) -> KeptChannels:
    before, after = first or KeptChannels(), second or KeptChannels()
    return KeptChannels(
        outputs=_compose_side(before.outputs, after.outputs), inputs=_compose_side(before.inputs, after.inputs)
    )


def _compose_side(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    """Index the channels that the first cut keeps by those that the second keeps; None is a whole side."""
    if first is None or second is None:
        return second if first is None else first
    return [first[channel] for channel in second]


def _to_earlier(plan: Plan, result_sha256: str) -> EarlierCut:
    return EarlierCut(
        criterion=plan.criterion,
        formula=plan.formula,
        seed=plan.seed,
        prune=plan.prune,
        budget=plan.budget,
        replayed_from=plan.replayed_from,
        result_sha256=result_sha256,
    )
