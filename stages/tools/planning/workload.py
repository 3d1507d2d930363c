"""params.yaml and the size of a model -> what each stage computes, counted in passes of one image."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from stages.evaluate.evaluation import STRIP_FRAMES, STRIP_IMAGES
from stages.finetune.params import FinetuneParams
from stages.importance.calibration import choose_timesteps
from stages.importance.criteria import CRITERIA
from stages.params import Params
from stages.prune.params import CompensateParams
from stages.runtime.wording import count

Pass = Literal[
    "pack",
    "encode",
    "decode",
    "dense",
    "pruned",
    "gradient",
    "step",
    "jacobian step",
    "heldout",
    "features",
    "similarity",
    "read",
    "write",
    "cut",
]
"""What is done with one image, or below "similarity" with weights. pack: read and fit it. encode, decode: by the
autoencoder. dense, pruned: the model's prediction. gradient: that of the dense model's weights. step, jacobian step: a
training step without and with the Jacobian loss. heldout: the held-out loss. features: by the extractor. similarity: to
the dense model's image. read, write: one parameter of a model, from and to the disk, with its hash. cut: the plan and
the cut of the model."""
STOPS_AT = 0.35
"""Share of the timesteps after which the threshold of the importance ends its sum. Measured at T = .05: .25 on
CIFAR-10's model and .5 on the digits'; this lies within a factor of 1.5 of both."""
BACKWARD = 3
"""Cost of a forward and a backward pass relative to a forward pass."""
JACOBIAN = 3.1
"""Cost of a step with the Jacobian loss on all images, with one vector, relative to a step without it."""
BYTES = 4
"""Per float32."""


@dataclass(frozen=True)
class ModelSize:
    """What the work on a model depends on."""

    dense_params: int
    pruned_params: int
    dense_macs: float
    """Of one forward pass of one image."""
    pruned_macs: float
    num_readers: int = 0
    """Layers that read cut channels."""
    num_branches: int = 0
    """Residual branches of the dense model that prune.depth may remove."""
    num_removed: int = 0
    """Those of them that the pruned model has not."""
    num_timesteps: int = 1000
    sample_numbers: int = 0
    """Numbers of one sample: C·H·W of the UNet's input."""
    image_bytes: int = 0
    """Of one image as uint8."""
    is_latent: bool = False


@dataclass(frozen=True)
class Work:
    """What a stage computes and writes."""

    passes: Mapping[Pass, float] = field(default_factory=dict)
    text: str = ""
    """The work in a few words, such as "2500 images × 50 steps"."""
    steps: int = 0
    """Optimiser or sampling steps, or timesteps."""
    images: int = 0
    """Images that are drawn, measured or trained on in a step."""
    disk_bytes: float = 0
    alone: Mapping[Pass, float] = field(default_factory=dict)
    """Those of the passes that one process computes while the others wait."""


def count_work(params: Params, size: ModelSize, num_images: int | None, sampler_calls: int) -> dict[str, Work]:
    """Count what each stage computes.

    Args:
        params: All of params.yaml.
        size: Sizes of the dense and of the pruned model.
        num_images: Images of the data; None where it is not known yet.
        sampler_calls: Predictions of the model for one image of the protocol, without guidance.

    Raises:
        InputError: The timesteps of the importance do not fit the model.
    """
    calls = _guided(sampler_calls, params.reference.guidance)
    works = {
        "code": Work(),
        "fetch": _fetch(size, num_images),
        "reference": _draw(params, size, num_images, calls, "dense"),
        "importance": _importance(params, size),
        "prune": _prune(params, size),
        "rounds": _rounds(params, size),
        "finetune": _finetune(params, size, num_images),
        "evaluate": _evaluate(params, size, num_images, calls),
        "variants": _variants(params, size, num_images, calls),
        "costs": Work(text=f"{count(len(params.costs.settings), 'setting')}, at most {params.costs.seconds:g} s each"),
        "report": Work(disk_bytes=2 * size.pruned_params * BYTES),
    }
    handled = _count_weights(params, size)
    return {
        name: replace(work, passes=Counter(work.passes) + handled.get(name, Counter())) for name, work in works.items()
    }


def _count_weights(params: Params, size: ModelSize) -> dict[str, Counter[Pass]]:
    """Count the parameters that each stage reads and writes: models, saliency, checkpoints."""
    dense, pruned = size.dense_params, size.pruned_params
    finetune, models = params.finetune, 2 + len(params.finetune.snapshots)
    checkpoints = finetune.steps // finetune.checkpoint_every * _models_of_checkpoint(finetune)
    teacher = dense if finetune.loss.needs_teacher else 0
    return {
        "fetch": Counter({"read": dense, "write": dense}),
        "reference": Counter({"read": dense}),
        "importance": Counter({"read": dense, "write": dense}),
        "prune": Counter({"read": 2 * dense, "write": pruned, "cut": 1}),
        "finetune": Counter({"read": pruned + teacher, "write": pruned * (models - 1 + checkpoints)}),
        "evaluate": Counter({"read": dense + models * pruned}),
        "costs": Counter({"read": dense + 2 * pruned}),
        "report": Counter({"read": 2 * pruned, "write": 2 * pruned}),
    }


def _fetch(size: ModelSize, num_images: int | None) -> Work:
    images = num_images or 0
    passes: Counter[Pass] = Counter({"pack": images, "encode": images if size.is_latent else 0})
    each = size.image_bytes + (2 * size.sample_numbers if size.is_latent else 0)
    text = "the number of images is not known yet" if num_images is None else count(images, "image")
    return Work(passes, text, images=images, disk_bytes=size.dense_params * BYTES + images * each)


def _guided(calls: int, guidance: float | None) -> int:
    """Return the predictions for one image; guidance needs two in place of each."""
    return calls if guidance in (None, 1) else 2 * calls


def _draw(params: Params, size: ModelSize, num_images: int | None, calls: int, model: Pass) -> Work:
    """Count the images of the protocol, drawn by one model, and for the dense one the features of the real images."""
    protocol = params.reference
    drawn = protocol.num_images * protocol.sets
    real = min(num_images or 0, protocol.real_images or math.inf) if model == "dense" else 0
    passes: Counter[Pass] = Counter({model: drawn * calls, "features": drawn + real})
    passes["decode"] = drawn if size.is_latent else 0
    passes["similarity"] = 0 if model == "dense" else drawn
    text = f"{count(drawn, 'image')} × {count(protocol.sampler.steps, 'step')}"
    return Work(passes, text, protocol.sampler.steps, drawn, drawn * size.image_bytes)


def used_timesteps(params: Params, num_timesteps: int) -> float:
    """Estimate how many timesteps the importance sums over, before its threshold ends the sum."""
    importance = params.importance
    chosen = len(choose_timesteps(num_timesteps, importance.stride, importance.num_timesteps))
    stops = CRITERIA[importance.criterion].has_threshold and importance.threshold > 0
    return min(chosen, max(1.0, STOPS_AT * num_timesteps / importance.stride)) if stops else chosen


def _importance(params: Params, size: ModelSize, *, with_report: bool = True) -> Work:
    """Count the gradients of the importance and of its diagnostics, and the images that it draws for them."""
    importance = params.importance
    if not CRITERIA[importance.criterion].needs_gradients:
        return Work(text=f"{importance.criterion} needs no passes", disk_bytes=size.dense_params * BYTES)
    used = used_timesteps(params, size.num_timesteps)
    pairs = used * importance.batches * importance.noises
    if importance.report and with_report:
        pairs += min(importance.report.timesteps, used) * (1 + importance.report.draws)
    passes: Counter[Pass] = Counter({"gradient": pairs * importance.num_images})
    if importance.draw:
        passes["dense"] = passes["gradient"] * _guided(importance.draw.steps, importance.draw.guidance)
    most = len(choose_timesteps(size.num_timesteps, importance.stride, importance.num_timesteps))
    timesteps = count(round(used), "timestep")
    text = f"about {timesteps}, at most {most}," if used < most else timesteps
    text = f"{text} × {count(importance.num_images, 'image')}"
    return Work(passes, text, round(used), importance.num_images, size.dense_params * BYTES)


def _depth(params: Params, size: ModelSize) -> Counter[Pass]:
    """Count the predictions that choose branches for prune.depth; a search may have to order all of them."""
    depth, passes = params.prune.depth, Counter[Pass]()
    if depth is None or not depth.needs_images:
        return passes
    pairs, is_search = depth.num_images * depth.num_timesteps, depth.remove == "search"
    if depth.order == "greedy":
        ordered = size.num_branches if is_search else size.num_removed
        passes["dense"] = pairs * sum(1 + size.num_branches - before for before in range(ordered))
    elif depth.order == "similarity":
        passes["dense"] = pairs
    if is_search:
        tried: dict[Pass, int] = {"dense": pairs, "pruned": pairs, "cut": 1}
        passes.update({kind: depth.candidates * number for kind, number in tried.items()})
    return passes


def compensation_pairs(compensate: CompensateParams, num_readers: int) -> float:
    """Count the passes of one image by each of both models that compensate a cut which that many layers read."""
    parts = min(compensate.rounds or num_readers, num_readers)  # at most: equal inputs are one part
    through = (parts + 1) / 2  # a pass for a part ends at its last layer
    timesteps = through * compensate.num_timesteps + 2 * (compensate.num_timesteps + 1)  # the error before and after
    return compensate.num_images * timesteps


def _prune(params: Params, size: ModelSize) -> Work:
    compensate, written, depth = params.prune.compensate, size.pruned_params * BYTES, _depth(params, size)
    if compensate is None:
        return Work(depth, disk_bytes=written)
    pairs = compensation_pairs(compensate, size.num_readers)
    passes: Counter[Pass] = Counter({"dense": pairs, "pruned": pairs})
    passes.update(depth)
    text = f"{count(compensate.num_images, 'image')} × {count(compensate.num_timesteps, 'timestep')}"
    return Work(passes, text, compensate.num_timesteps, compensate.num_images, written)


def _rounds(params: Params, size: ModelSize) -> Work:
    """Count the rounds before the last: an importance after each, and a recovery without samples."""
    rounds = params.rounds
    if rounds.count == 1:
        return Work(text="one round, nothing to do")
    passes: Counter[Pass] = Counter()
    for _ in range(rounds.count - 1):
        passes.update(_importance(params, size, with_report=False).passes)
        passes.update(_prune(params, size).passes)
        passes.update(_training(params, rounds.steps, heldout=2 + rounds.steps // params.finetune.heldout_every))
    text = f"{count(rounds.count, 'round')}, {count(rounds.steps, 'step')} between two"
    return Work(passes, text, rounds.steps_before_last, params.finetune.batch_size, size.pruned_params * BYTES)


def _training(params: Params, steps: int, heldout: int, available: int | None = None) -> Counter[Pass]:
    """Count a training of some steps and measurements of the held-out loss, on the images that are available."""
    finetune = params.finetune
    jacobian = finetune.loss.jacobian
    with_jacobian = steps // jacobian.every if jacobian else 0
    images = min(finetune.heldout_images, available or finetune.heldout_images)
    measured = heldout * images * len(finetune.ema_decays)
    plain, batch = steps - with_jacobian, finetune.batch_size
    return Counter({"step": plain * batch, "jacobian step": with_jacobian * batch, "heldout": measured})


def _finetune(params: Params, size: ModelSize, num_images: int | None) -> Work:
    finetune = params.finetune.after_rounds(params.rounds)
    steps, samples = range(1, finetune.steps + 1), finetune.samples
    sampled = {step for step in steps if samples and (step % samples.every == 0 or step == finetune.steps)}
    measured = {step for step in steps if step % finetune.heldout_every == 0} | sampled | {*finetune.snapshots}
    available = None if num_images is None else round(num_images * params.fetch.heldout)
    measurements = len(measured | {finetune.steps}) + 2  # at the start, and for the forecast
    passes = _training(params, finetune.steps, measurements, available)
    if samples:
        passes["pruned"] = (len(sampled) + 1) * samples.num_images * samples.steps
        passes["decode"] = (len(sampled) + 1) * samples.num_images if size.is_latent else 0
    weights = size.pruned_params * BYTES
    checkpoints = min(finetune.keep_checkpoints, finetune.steps // finetune.checkpoint_every) + 1
    disk = weights * (1 + len(finetune.snapshots)) + checkpoints * weights * _models_of_checkpoint(finetune)
    text = f"{count(finetune.steps, 'step')} × {count(finetune.batch_size, 'image')}"
    return Work(passes, text, finetune.steps, finetune.batch_size, disk)


def _evaluate(params: Params, size: ModelSize, num_images: int | None, calls: int) -> Work:
    models = 2 + len(params.finetune.snapshots)
    one = _draw(params, size, num_images, calls, "pruned")
    passes: Counter[Pass] = Counter({name: models * number for name, number in one.passes.items()})
    strip = STRIP_IMAGES * calls
    frames = (models + 1) * STRIP_IMAGES * STRIP_FRAMES if size.is_latent else 0
    alone: Counter[Pass] = Counter({"dense": strip, "pruned": models * strip, "decode": frames})
    text, images = f"{models} models × {one.text}", models * one.images
    return Work(passes + alone, text, one.steps, images, models * one.disk_bytes, alone)


def _variants(params: Params, size: ModelSize, num_images: int | None, calls: int) -> Work:
    """Count the images that each variant draws, as if each took as long as its model.

    The models of which there are variants draw once more, to compare with, but the dense one.
    """
    if params.variants is None:
        return Work()
    kinds, passes, disk_bytes = len(params.variants.kinds), Counter[Pass](), 0.0
    for name in params.variants.models:
        model: Pass = "dense" if name == "dense" else "pruned"
        one = _draw(params, size, num_images, calls, "pruned")
        times = kinds + (name != "dense")
        passes.update({model if key == "pruned" else key: times * number for key, number in one.passes.items()})
        passes["similarity"] += kinds * one.images * (name != "dense")
        disk_bytes += kinds * (size.dense_params if name == "dense" else size.pruned_params) * BYTES
    number = kinds * len(params.variants.models)
    return Work(passes, f"{count(number, 'variant')} × {one.text}", one.steps, number * one.images, disk_bytes)


def training_bytes(params: Params, size: ModelSize) -> float:
    """Return the bytes of weights, gradients, the optimiser's moments, EMA and teacher, without activations."""
    teacher = size.dense_params if params.finetune.loss.needs_teacher else 0
    return BYTES * ((1 + _models_of_checkpoint(params.finetune)) * size.pruned_params + teacher)


def _models_of_checkpoint(finetune: FinetuneParams) -> int:
    """Count the sizes of the model in a checkpoint: weights, the optimiser's moments, each EMA and snapshot."""
    return 1 + finetune.num_moments + len(finetune.ema_decays) + len(finetune.snapshots)


def pass_macs(params: Params, size: ModelSize) -> dict[Pass, float]:
    """Return the multiply-accumulates of each kind of pass of the UNets; those of other networks are left out."""
    loss = params.finetune.loss
    step = BACKWARD * size.pruned_macs + (size.dense_macs if loss.distils else 0)
    share = 1.0
    if loss.jacobian:
        share = (loss.jacobian.images or params.finetune.batch_size) / params.finetune.batch_size
        share *= loss.jacobian.vectors
    return {
        "dense": size.dense_macs,
        "pruned": size.pruned_macs,
        "gradient": BACKWARD * size.dense_macs,
        "step": step,
        "jacobian step": step * (1 + (JACOBIAN - 1) * share),
        "heldout": size.pruned_macs,  # the teacher predicts the held-out images once
    }
