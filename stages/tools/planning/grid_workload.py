"""The block grid of params.yaml -> the images that `espalier grid` draws and measures."""

from collections import Counter
from collections.abc import Sequence

from stages.grid.params import GridParams
from stages.grid.settings import Setting
from stages.params import Params
from stages.runtime.wording import count
from stages.tools.planning.workload import ModelSize, Pass, Work


def count_grid(params: Params, grid: GridParams, size: ModelSize, settings: Sequence[Setting]) -> Work:
    """Count what `espalier grid` draws and measures; at the protocol's own setting the reference has the dense images.

    Args:
        params: All of params.yaml.
        grid: Its block grid.
        size: Sizes of the models.
        settings: The settings of the grid.
    """
    protocol, models = params.reference, len(grid.models)
    each = (grid.num_images or protocol.num_images) * (grid.sets or protocol.sets)
    given = (protocol.sampler, protocol.guidance or 1)  # guidance 1 is none
    others = [it for it in settings if (it.sampler, it.guidance or 1) != given]
    drawn = each * (models * len(settings) + len(others))
    passes: Counter[Pass] = Counter({"dense": each * sum(setting.calls for setting in others), "features": drawn})
    passes["pruned"] = models * each * sum(setting.calls for setting in settings)
    passes["similarity"] = each * len(settings) * (1 + 2 * models)
    passes["decode"] = drawn if size.is_latent else 0
    passes["read"] = size.dense_params + models * size.pruned_params
    text = f"{count((1 + models) * len(settings), 'cell')} × {count(each, 'image')}"
    steps = sum(setting.sampler.steps for setting in settings)
    return Work(passes, text, steps, drawn, len(others) * each * size.image_bytes)
