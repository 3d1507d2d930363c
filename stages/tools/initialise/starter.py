"""A model, images and this machine -> what they are, and a short params.yaml for them with values that suit."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from stages.data.images import check_num_images
from stages.fetch.data import open_source
from stages.fetch.model import fetch_model, is_trusted
from stages.fetch.params import DataSource, FolderData, ModelSource
from stages.fetch.source_images import SourceImages, check_path
from stages.fetch.split import split_sizes
from stages.finetune.optimizer import muon_macs
from stages.finetune.params import MUON_TO_ADAM, FinetuneParams
from stages.models.autoencoder import image_shape
from stages.models.complexity import count_macs, count_params
from stages.models.families import family_name, has_features
from stages.models.groups import find_groups
from stages.models.latency import forward_pass
from stages.models.plan import show_cost
from stages.models.trust import trusting
from stages.params import Params
from stages.protocol.extractors import SOURCES, find_extractor
from stages.protocol.params import MOST_PER_SUBSET, ExtractorParams
from stages.protocol.resolve import check_real_images
from stages.prune.compensate import Reader
from stages.prune.params import CompensateParams, PruneParams, Target
from stages.prune.path import cuts_after, find_path
from stages.prune.width_cost import WidthCost
from stages.runtime.device import device_name, select_device
from stages.runtime.errors import InputError, UnavailableError
from stages.runtime.schema import validate_tree
from stages.runtime.wording import count
from stages.tools.initialise.default_target import choose_ratio
from stages.tools.planning.planned_model import PlannedModel, read_model
from stages.tools.planning.preflight import Refusals, check_model, check_params, plan_cut, spread
from stages.tools.planning.probe import activation_bytes, seconds_each
from stages.tools.planning.workload import BACKWARD, STOPS_AT, compensation_pairs

MINUTES = {"reference": 5, "importance": 3, "finetune": 10}
"""Minutes that a stage should take on this machine with the values that are chosen."""
LARGEST_BATCH, SMALLEST_SET, MOST_IMAGES, FEWEST_STEPS, MOST_STEPS = 64, 50, 10_000, 200, 100_000
SETS = 4
"""Sets of images, from which intervals follow."""
MEMORY_SHARE = 0.4
"""Share of the free memory that the activations of a training step may take."""
AFFORDABLE = 1 / 3
"""Share of the recovery's time that compensation may take before it, and of a step's that Muon may take in it."""
HELDOUT = 0.1
"""Share of the images that is held out by default."""
STRIDES = (1, 2, 5, 10, 20, 50, 100)
INCEPTION = "inception-v3-compat"


@dataclass(frozen=True)
class Chosen:
    """Values given on the command line; None lets the machine decide."""

    target: dict[str, float | str]
    """What of prune.target is given; empty lets the model decide."""
    steps: int | None = None
    batch_size: int | None = None
    num_images: int | None = None
    sets: int | None = None
    sampler_steps: int | None = None
    stride: int | None = None
    extractor: str | None = None
    flip: bool | None = None


@dataclass(frozen=True)
class Start:
    """A model and images that fit each other, and what passes of the model take here."""

    model: PlannedModel
    data: DataSource
    num_train: int
    num_heldout: int
    heldout: float
    """Share of the images that is held out."""
    pass_s: float
    """Seconds of one forward pass of one image."""
    free_bytes: float
    """Memory that is free for a training step."""


def open_first(models: Sequence[ModelSource], data: DataSource, heldout: float) -> tuple[Start, ModelSource]:
    """Open the first of some sources that holds a model, such as one checkpoint as each of the known architectures.

    Args:
        models: The sources.
        data: Source of the images.
        heldout: Share of the images that is held out.

    Raises:
        InputError: None of them can be opened; of several, the message names all architectures that were tried.
        UnavailableError: A server does not answer.
    """
    check_path(data)
    for model in models:
        try:
            return open_start(model, data, heldout), model
        except ModelError as error:
            if len(models) == 1:
                raise
            last = error
    tried = ", ".join(str(getattr(model, "system", model.source)) for model in models)
    raise InputError(f"the checkpoint is none of {tried}; name its architecture with --system ({last.message})")


class ModelError(InputError):
    """The model itself cannot be opened, whatever the images."""


def open_start(model: ModelSource, data: DataSource, heldout: float) -> Start:
    """Fetch the model into a temporary folder as the stage does, open the images, and time a pass.

    Raises:
        InputError: Model or images are missing, damaged, not supported or do not fit each other.
        UnavailableError: A server does not answer.
    """
    device = select_device()
    with tempfile.TemporaryDirectory(prefix="espalier-") as temporary:
        try:
            fetch_model(model, Path(temporary) / "model")
        except UnavailableError:
            raise
        except InputError as error:
            raise ModelError(error.message) from None
        with trusting(is_trusted=is_trusted(model)):
            found = read_model(Path(temporary) / "model", device)
        shape = image_shape(found.unet, found.autoencoder)
        data = _with_labels(data, found)
        with open_source(data, shape, Path(temporary)) as images:
            data = _with_fit(data, images, shape)
            sizes = split_sizes(images, heldout)
    with torch.inference_mode():
        pass_s = seconds_each(lambda batch: forward_pass(found.unet, batch), LARGEST_BATCH)
    cuda = found.unet.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    return Start(found, data, *sizes, heldout, pass_s, float(free))


def _with_labels(data: DataSource, model: PlannedModel) -> DataSource:
    """Take the folders of images as classes where the model has classes."""
    if isinstance(data, FolderData) and model.table is not None:
        return data.model_copy(update={"labels": True})
    return data


def _with_fit(data: DataSource, images: SourceImages, shape: tuple[int, int, int]) -> DataSource:
    """Crop and resize images where some of those that are looked at do not have the size of the model."""
    if not isinstance(data, FolderData):
        return data
    sizes = set()
    for index in spread(images):
        try:
            with images.open(index) as image:
                sizes.add((image.height, image.width))
        except Exception:  # noqa: BLE001, S112  # the stage fetch says which image is damaged
            continue
    return data if sizes <= {shape[1:]} else data.model_copy(update={"fit": "crop"})


def describe(start: Start) -> Iterator[str]:
    """Say what a model is, what of it can be cut, and what the images are."""
    unet, schedule = start.model.unet, start.model.scheduler.config
    shape = "×".join(map(str, image_shape(unet, start.model.autoencoder)))
    kind = "class-conditional" if start.model.table is not None else "unconditional"
    space = "latents of an autoencoder" if start.model.autoencoder else "pixels"
    yield f"model   {family_name(unet)}, {kind}, {shape} {space}"
    yield f"        {show_cost('params', count_params(unet))}, {show_cost('macs', count_macs(unet))} a pass"
    yield f"        {schedule['num_train_timesteps']} timesteps, predicts {schedule['prediction_type']}"
    groups = find_groups(unet)
    path = find_path(groups, [torch.ones(group.width) for group in groups], PruneParams(target=Target(ratio=0.5)))
    costs, all_cuts = WidthCost(unet, groups, heads="width", latency_repeats=3), cuts_after(path, len(groups))
    reach = f"down to {show_cost('params', costs.params(all_cuts))}, {show_cost('macs', costs.macs(all_cuts))}"
    yield f"can cut {count(sum(all_cuts), 'channel')} in {count(len(groups), 'group')}, {reach}"
    parts = f"{start.num_train} for training, {start.num_heldout} held out"
    yield f"data    {count(start.num_train + start.num_heldout, 'image')}, {parts}{_fit_text(start.data)}"
    yield f"device  {device_name()}: {start.pass_s * 1e3:.3g} ms for each image and pass"


def _fit_text(data: DataSource) -> str:
    return ", cropped and resized to the model's size" if getattr(data, "fit", "exact") == "crop" else ""


def make_params(start: Start, model: ModelSource, chosen: Chosen) -> dict[str, Any]:
    """Choose values for a model, images and this machine; every key that is left out has its default.

    Raises:
        InputError: A given value is not allowed, or a stage would refuse the result.
    """
    steps = _sampler_steps(start, chosen.sampler_steps)
    batch = chosen.batch_size or _batch_size(start)
    training = chosen.steps or _training_steps(start, batch)
    every, round_to = max(1, training // 10), 8 if start.model.unet.device.type == "cuda" else 1
    tree = {
        "seed": 0,
        "fetch": {"model": _given(model), "data": _given(start.data), "heldout": start.heldout},
        "reference": _reference(start, steps, chosen),
        "importance": _importance(start, chosen),
        "prune": {
            "target": chosen.target or {"ratio": choose_ratio(find_groups(start.model.unet), round_to)},
            **({"round_to": round_to} if round_to > 1 else {}),
            **_compensation(start, training * _step_s(start, batch)),
        },
        "rounds": {"count": 1},
        "finetune": {
            "steps": training,
            "batch_size": batch,
            "loss": {"noise": 0.0, "output": 1.0, "feature": 0.1 if has_features(start.model.unet) else 0.0},
            **_muon(start, batch),
            **({"flip": True} if chosen.flip else {}),
            "heldout_every": every,
            "checkpoint_every": every,
        },
        "variants": None,
        "costs": {"batches": [1, 16], "seconds": 4.0},
    }
    _check(validate_tree(tree, Params, "the new params.yaml"), start)
    return tree


def _check(params: Params, start: Start) -> None:
    """Check what the stages check before they compute.

    Raises:
        InputError: A stage would refuse the params.
    """
    refusals = Refusals(params.prune)
    check_params(params, start.model.unet.device, refusals)
    check_model(params, start.model, refusals)
    shape = image_shape(start.model.unet, start.model.autoencoder)
    refusals.check(
        lambda: check_num_images("finetune.batch_size", params.finetune.batch_size, start.num_train),
        lambda: check_real_images(params.reference, shape, start.num_train),
    )
    refusals.check(lambda: plan_cut(start.model.unet, params))
    if found := refusals.messages + refusals.possible:
        raise InputError("; ".join(found))


def _given(source: ModelSource | DataSource) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude_defaults=True)


def _divisor(total: int, most: int) -> int:
    """Return the largest divisor of a number that does not exceed `most`."""
    return max(part for part in range(1, min(total, most) + 1) if total % part == 0)


def _sampler_steps(start: Start, given: int | None) -> int:
    return given or _divisor(int(start.model.scheduler.config["num_train_timesteps"]), 50)


def _reference(start: Start, steps: int, chosen: Chosen) -> dict[str, Any]:
    """Choose as many images as the dense model draws in the time of the stage, in sets for intervals."""
    affordable = MINUTES["reference"] * 60 / (start.pass_s * steps)
    sets = chosen.sets or SETS
    largest = min(MOST_IMAGES // sets, 2 * start.num_train)  # half a set is the default subset of KID
    images = chosen.num_images or min(largest, max(SMALLEST_SET, int(affordable / sets) // 50 * 50))
    few = {"kid_subset_size": start.num_train} if min(images // 2, MOST_PER_SUBSET) > start.num_train else {}
    return {
        "sampler": {"steps": steps},
        "num_images": images,
        "sets": sets,
        "batch_size": min(images, LARGEST_BATCH),
        "extractor": {"name": chosen.extractor or _extractor(start)},
        **few,
    }


def _extractor(start: Start) -> str:
    """Take Inception for colour images if its weights are here or may be downloaded to a GPU's machine."""
    grey = image_shape(start.model.unet, start.model.autoencoder)[0] == 1
    if grey:
        return "digits" if start.data.source == "bundled" else "thumbnail"
    present = INCEPTION in SOURCES and find_extractor(ExtractorParams(name=INCEPTION)).is_file()
    return INCEPTION if present or start.model.unet.device.type == "cuda" else "thumbnail"


def _importance(start: Start, chosen: Chosen) -> dict[str, Any]:
    """Choose the smallest distance of timesteps at which the gradients are computed in the time of the stage."""
    images = min(16, start.num_train)
    total = int(start.model.scheduler.config["num_train_timesteps"])
    seconds = STOPS_AT * total * images * BACKWARD * start.pass_s
    allowed = [stride for stride in STRIDES if stride < total]
    fitting = (stride for stride in allowed if seconds / stride <= MINUTES["importance"] * 60)
    return {"num_images": images, "stride": chosen.stride or next(fitting, allowed[-1])}


def _batch_size(start: Start) -> int:
    """Return the largest power of two that the images and the free memory allow."""
    fits = MEMORY_SHARE * start.free_bytes / max(activation_bytes(start.model.unet), 1)
    return int(2 ** math.floor(math.log2(max(1, min(LARGEST_BATCH, start.num_train, fits)))))


def _training_steps(start: Start, batch: int) -> int:
    return max(FEWEST_STEPS, min(MOST_STEPS, int(MINUTES["finetune"] * 60 / _step_s(start, batch)) // 50 * 50))


def _step_s(start: Start, batch: int) -> float:
    return (BACKWARD + 1) * batch * start.pass_s  # the pruned model is smaller, the teacher comes on top


def _compensation(start: Start, training_s: float) -> dict[str, Any]:
    """Compensate the cut where that takes at most a part of the recovery's time."""
    compensate = CompensateParams(num_images=min(8, start.num_train))
    readers = sum(isinstance(module, Reader) for module in start.model.unet.modules())
    seconds = 2 * compensation_pairs(compensate, readers) * start.pass_s
    return {"compensate": {"num_images": compensate.num_images}} if seconds <= AFFORDABLE * training_s else {}


def _muon(start: Start, batch: int) -> dict[str, Any]:
    """Step with Muon where its products are at most a part of a step's."""
    step_macs = (BACKWARD + 1) * batch * count_macs(start.model.unet)
    if muon_macs(start.model.unet) > AFFORDABLE * step_macs:
        return {}
    return {"muon": {"learning_rate": MUON_TO_ADAM * FinetuneParams.model_fields["learning_rate"].default}}
