"""What a training step makes the host wait for: numbers read from the device, and host data copied to it."""

import copy
import math
from collections import Counter

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode

from stages.finetune.batches import Batch
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.loss import Objective, Prediction
from stages.finetune.params import EngineParams, JacobianParams, LossParams
from stages.finetune.step_losses import READ_EVERY, StepLosses
from stages.finetune.trainer import Trainer
from stages.runtime.errors import InputError

NUM_STEPS = 4
ALL_LOSSES = LossParams(output=1, feature=0.1, jacobian=JacobianParams(weight=0.1, every=2, images=4), min_snr=5)


class Operations(TorchDispatchMode):
    """Counts operations by name; `blocking` counts those copies to another device that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count, self.blocking = Counter(), 0

    def __torch_dispatch__(self, operation, types, given=(), keywords=None):
        """Count the operation and run it."""
        keywords = keywords or {}
        self.count[str(operation.overloadpacket)] += 1
        device = keywords.get("device")
        if device is not None and given and isinstance(given[0], torch.Tensor) and device != given[0].device:
            self.blocking += not keywords.get("non_blocking")
        return operation(*given, **keywords)


@pytest.fixture
def start(unet, scheduler, images, short_training):
    """Return a function that builds a trainer that distils into a copy of its teacher, on all channels."""

    def build(device="cpu", **changes):
        blocks = {name: module for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)}
        channels = {name: list(range(block.conv2.out_channels)) for name, block in blocks.items()}
        params = short_training(steps=100, heldout_every=100, checkpoint_every=100, loss=ALL_LOSSES, **changes)
        student, dense = copy.deepcopy(unet).to(device), copy.deepcopy(unet).to(device)
        return Trainer(student, scheduler, images, params, 0, (dense, channels))

    return build


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_reads_no_number_and_copies_no_list(start, accumulate):
    """With every loss; `_local_scalar_dense` is what item() and bool() run, `lift_fresh` makes a tensor of a list."""
    run = start(engine=EngineParams(accumulate=accumulate))
    run.step()
    with Operations() as found:
        for _ in range(NUM_STEPS):
            run.step()

    assert found.count["aten._fused_adam_"] == NUM_STEPS  # the steps were seen
    assert (found.count["aten._local_scalar_dense"], found.count["aten.lift_fresh"], found.blocking) == (0, 0, 0)
    assert len(run.losses) == NUM_STEPS + 1


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits(start):
    """PyTorch itself raises where an operation would wait; the batch comes from pinned memory."""
    run = start(device="cuda")
    run.step()
    assert run.prefetcher.get(run.steps_done).images.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(NUM_STEPS):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_is_copied_to_the_device_without_waiting():
    """Every part of it."""
    numbers = torch.zeros(2, dtype=torch.long)
    with Operations() as found:
        Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), numbers, numbers).to(torch.device("meta"))

    assert (found.count["aten._to_copy"], found.blocking) == (4, 0)


def test_the_weights_of_the_timesteps_are_copied_to_the_device_once(scheduler):
    """Not at every step."""
    objective = Objective(scheduler, LossParams(min_snr=5))
    prediction = Prediction(*torch.zeros(2, 3, 1, 4, 4, device="meta"))
    timesteps = torch.zeros(3, dtype=torch.long, device="meta")
    with Operations() as found:
        for _ in range(NUM_STEPS):
            objective(prediction, timesteps)

    assert found.blocking == 1


def spoil(run, at):
    """Make the weights of a training NaN before the step `at`."""
    step = run.step

    def spoil_and_step():
        if run.steps_done == at:
            with torch.no_grad():
                run.unet.conv_in.weight.fill_(math.nan)
        step()

    run.step = spoil_and_step


@pytest.mark.parametrize(
    ("heldout_every", "checkpoint_every"), [(100, 4), (4, 100), pytest.param(100, 100, marks=pytest.mark.e2e)]
)
def test_a_loss_that_is_not_finite_is_named_by_its_own_step(start, tmp_path, heldout_every, checkpoint_every):
    """At the latest after READ_EVERY steps, before a row of the curve or a checkpoint can hold it."""
    run = start()
    run.params = run.params.model_copy(update={"heldout_every": heldout_every, "checkpoint_every": checkpoint_every})
    spoil(run, 5)
    with pytest.raises(InputError, match="the loss is nan and its gradient's norm nan at step 6; lower finetune"):
        run.run(Checkpoints(tmp_path, "run"))

    assert run.steps_done <= READ_EVERY
    assert all(math.isfinite(point.heldout_loss) for point in run.curve)
    saved = Checkpoints(tmp_path, "run").newest()
    assert saved.step == 4 if checkpoint_every == 4 else saved is None


def test_a_gradient_that_is_not_finite_ends_the_training_like_its_loss():
    """A finite loss may have one, whose step makes every weight NaN."""
    losses = StepLosses()
    losses.add(3, torch.tensor(1.0), torch.tensor(math.inf))

    with pytest.raises(InputError, match=r"the loss is 1\.0 and its gradient's norm inf at step 3; lower finetune"):
        losses.read()
