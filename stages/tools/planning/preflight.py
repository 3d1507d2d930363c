"""params.yaml, a model and the source of the data -> what stages would refuse, before any of them computes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stages.data.images import check_num_images, read_images
from stages.fetch.classes import check_labels
from stages.fetch.data import open_source
from stages.fetch.params import FitParams, HubData, S3Data
from stages.fetch.source_images import CorruptImageError, SourceImages, check_path, read_image
from stages.fetch.split import split_sizes
from stages.finetune.batches import check_flip
from stages.finetune.distillation import check_features
from stages.finetune.engine import check_parts
from stages.finetune.launch import count_gpus
from stages.grid.settings import check_sizes, make_settings
from stages.importance.calibration import choose_timesteps
from stages.models.autoencoder import image_shape
from stages.models.families import Denoiser
from stages.models.plan import Plan
from stages.models.saliency import Importance
from stages.models.samplers import check_sampler
from stages.models.sampling import check_guidance
from stages.models.steps import SAMPLES
from stages.models.variants.folder import check_variant
from stages.params import Params
from stages.protocol.extractors import check_image_shape, find_extractor
from stages.protocol.resolve import check_real_images
from stages.prune.branch_order import order_branches
from stages.prune.budget import TargetError
from stages.prune.depth import Prefixes, plan_depth, search_plans
from stages.prune.params import PruneParams
from stages.prune.path import NoGroupError
from stages.prune.selection import plan_pruning
from stages.rounds.targets import find_targets
from stages.runtime.device import check_precision
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256
from stages.tools.planning.planned_model import PlannedModel

TRIED = 8
"""Images that are looked at in place of all."""


@dataclass(frozen=True)
class FoundImages:
    """What is known of the images before they are packed."""

    num_train: int
    num_heldout: int
    pack_s: float | None = None
    """Seconds to read and fit one image; None where they are packed already."""

    @property
    def total(self) -> int:
        """Number of all images."""
        return self.num_train + self.num_heldout


class Refusals:
    """Collects the messages of checks, so that all mistakes are shown at once.

    Args:
        prune: The block prune.
    """

    def __init__(self, prune: PruneParams) -> None:
        self.messages: list[str] = []
        self.possible: list[str] = []
        """Those of which only the stage knows: its branches, scores or milliseconds are others than the plan's."""
        self.draws_branches = prune.depth is not None and prune.depth.names is None
        self.leaves_target_open = (
            self.draws_branches or prune.target.latency_ms is not None or prune.ranking == "global"
        )

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note what the block refuses, and go on after it."""
        try:
            yield
        except InputError as error:
            self.note(error)

    def note(self, error: InputError) -> None:
        """Add a message unless it is there."""
        is_open = (isinstance(error, TargetError) and self.leaves_target_open) or (
            isinstance(error, NoGroupError) and self.draws_branches
        )
        messages = self.possible if is_open else self.messages
        if (message := error.format_message()) not in messages:
            messages.append(message)

    def check(self, *checks: Callable[[], object]) -> None:
        """Run checks that do not depend on each other."""
        for check in checks:
            with self.collecting():
                check()


def check_params(params: Params, device: torch.device, refusals: Refusals) -> None:
    """Check what needs neither a model nor images: paths, extractor, precisions, and what processes share."""
    engine = params.finetune.engine
    refusals.check(
        lambda: check_path(params.fetch.data),
        lambda: find_extractor(params.reference.extractor),
        lambda: check_precision(params.reference.precision, "reference.precision", device),
        lambda: check_precision(params.importance.precision, "importance.precision", device),
        lambda: check_precision(engine.precision, "finetune.engine.precision", device),
        lambda: _check_parts(params, device),
    )


def _check_parts(params: Params, device: torch.device) -> None:
    """Check that the parts of a step divide, by as many GPUs as training would take."""
    key, divided = params.finetune.divided
    parts = params.finetune.engine.accumulate
    check_parts(divided, 1, parts, key)
    if device.type == "cuda":
        count_gpus(torch.cuda.device_count(), divided, parts, key)


def check_model(params: Params, model: PlannedModel, refusals: Refusals) -> None:
    """Check params against a model: samplers, guidance, timesteps, size of the images, the rounds and the variants."""
    protocol, importance = params.reference, params.importance
    samples, total = params.finetune.samples, int(model.scheduler.config["num_train_timesteps"])
    shape = image_shape(model.unet, model.autoencoder)
    refusals.check(
        lambda: check_sampler(model.scheduler, protocol.sampler),
        lambda: check_guidance(model.table, protocol.guidance, "reference", model.origin),
        lambda: choose_timesteps(total, importance.stride, importance.num_timesteps),
        lambda: check_image_shape(protocol.extractor.name, shape),
        lambda: check_features(model.unet, params.finetune.loss.feature),
        lambda: check_flip(flip=params.finetune.flip, is_latent=model.autoencoder is not None),
    )
    if samples:
        refusals.check(lambda: check_sampler(model.scheduler, samples.sampler, SAMPLES))
    if draw := importance.draw:
        refusals.check(lambda: check_guidance(model.table, draw.guidance, "importance.draw", model.origin))
    if grid := params.grid:
        refusals.check(
            lambda: make_settings(grid, protocol, model.scheduler, model.table, model.origin),
            lambda: check_sizes(grid, protocol),
        )
    if params.rounds.count > 1:
        refusals.check(lambda: find_targets(model.unet, params.prune, params.rounds.count))
    for kind in params.variants.parsed() if params.variants else ():
        refusals.check(partial(check_variant, model.unet, kind))


def plan_cut(unet: Denoiser, params: Params) -> Plan:
    """Plan the cut on random scores: of a uniform ranking only the widths count, which they do not change.

    Which branches prune.depth removes is drawn, too; of a search, which needs images, it is the first plan.

    Raises:
        InputError: The target is out of reach; the message has the range of those that are not.
    """
    random = Importance(
        criterion="random",
        formula=params.importance.formula,
        precision="float32",
        model_sha256=tensors_sha256(unet.state_dict()),
        counts_doubled=True,
        timesteps=[],
        losses=[],
        saliency={},
    )
    depth = params.prune.depth
    if depth is None:
        return plan_pruning(unet, random, params.prune, params.seed)
    if depth.remove == "search":
        order = Prefixes(order_branches("score", unet, random, None, params.seed))
        return next(search_plans(unet, random, params.prune, params.seed, order))[1]
    drawn = params.prune.model_copy(update={"depth": depth.model_copy(update={"order": "score"})})
    return plan_depth(unet, random, drawn, params.seed, None)


def find_images(params: Params, model: PlannedModel, packed: Path | None, refusals: Refusals) -> FoundImages | None:
    """Count the images, and check params and model against them.

    Args:
        params: All of params.yaml.
        model: The model.
        packed: The folder that the stage fetch wrote for this source; None if it has not run.
        refusals: Takes what the stages would refuse.

    Returns:
        None where the images are not on this machine, or the source itself is refused.
    """
    found = None
    with refusals.collecting():
        if packed is not None:
            images = read_images(packed)
            found = FoundImages(len(images.train), len(images.heldout))
        elif not isinstance(params.fetch.data, HubData | S3Data):
            found = _open_images(params, model, refusals)
    if found:
        real = min(found.num_train, params.reference.real_images or found.num_train)
        shape = image_shape(model.unet, model.autoencoder)
        needed = {"finetune.batch_size": params.finetune.batch_size}
        if params.importance.draw is None:
            needed["importance.num_images"] = params.importance.num_images
        if params.prune.compensate:
            needed["prune.compensate.num_images"] = params.prune.compensate.num_images
        if params.prune.depth and params.prune.depth.needs_images:
            needed["prune.depth.num_images"] = params.prune.depth.num_images
        for key, number in needed.items():
            refusals.check(partial(check_num_images, key, number, found.num_train))
        refusals.check(lambda: check_real_images(params.reference, shape, real))
    return found


def _open_images(params: Params, model: PlannedModel, refusals: Refusals) -> FoundImages:
    """Open the images of a source on this machine, and read a few of them.

    Raises:
        InputError: There are none, or one cannot be packed.
    """
    shape = image_shape(model.unet, model.autoencoder)
    with TemporaryDirectory(prefix="espalier-") as place, open_source(params.fetch.data, shape, Path(place)) as images:
        refusals.check(lambda: check_labels(images, model.table))
        pack_s = _seconds_to_read(images, params, shape)
        return FoundImages(*split_sizes(images, params.fetch.heldout), pack_s)


def spread(images: SourceImages) -> range:
    """Return the indices of a few images, spread over all."""
    return range(0, len(images), max(1, len(images) // TRIED))[:TRIED]


def _seconds_to_read(images: SourceImages, params: Params, shape: tuple[int, int, int]) -> float:
    fit = params.fetch.data if isinstance(params.fetch.data, FitParams) else FitParams()
    chosen = spread(images)
    begin = 0.0
    for place, index in enumerate([chosen[0], *chosen]):
        if place == 1:  # the first image loaded the decoders
            begin = time.perf_counter()
        with suppress(CorruptImageError):  # fetch.data.max_corrupt may allow it
            read_image(images, index, shape, fit)
    return (time.perf_counter() - begin) / len(chosen)
