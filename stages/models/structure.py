"""A denoiser -> a key of all but its weights, under which results that rest on nothing else are kept."""

import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from diffusers.models.attention_processor import Attention

from stages.models.families import Denoiser, family_of

Result = TypeVar("Result")
NUM_STRUCTURES = 32
"""Structures whose results are kept, the last ones used: a search returns to few, and a process may see many."""


def structure(unet: Denoiser) -> str:
    """Describe a model's class, config, modules, shapes of parameters, heads and attention processors."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in unet.named_parameters()]
    attentions = [
        (module.heads, type(module.processor).__name__) for module in unet.modules() if isinstance(module, Attention)
    ]
    family = family_of(unet)
    return json.dumps(
        [family.identity(unet), repr(unet), dict(unet.config), shapes, attentions, family.heads(unet)], default=str
    )


def once_per_structure(function: Callable[[Denoiser], Result]) -> Callable[[Denoiser], Result]:
    """Compute a function of a model's structure once for all models of that structure.

    Callers share the result, so they must not change it; an error is not kept.
    """
    results: OrderedDict[str, Result] = OrderedDict()

    @functools.wraps(function)
    def look_up(unet: Denoiser) -> Result:
        """Return the result that is kept, or compute it."""
        key = structure(unet)
        if key not in results:
            results[key] = function(unet)
        results.move_to_end(key)
        if len(results) > NUM_STRUCTURES:
            results.popitem(last=False)
        return results[key]

    return look_up
