"""Features of a DiT: the width between the blocks whole, hidden channels by those that the plan keeps."""

import pytest
import torch

from stages.finetune.distillation import FeatureHooks, kept_channels
from stages.models.families import example_inputs, forward
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut


@pytest.fixture
def pair(dit, magnitude_of):
    """A DiT that lost hidden channels alone, and the plan."""
    plan = plan_pruning(dit, magnitude_of(dit), PruneParams(target={"ratio": 0.5}, include=("*ff*",)))
    return cut(dit, plan), plan


def recorded(model, channels):
    """The features of one forward pass on noise."""
    hooks = FeatureHooks(model, channels)
    inputs = example_inputs(model, 2)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    hooks.start()
    forward(model, inputs)
    return dict(zip(channels, hooks.stop(), strict=True))


def test_hidden_channel_i_of_the_student_is_channel_k_i_of_the_teacher(dit, pair):
    """In the first block nothing before it was cut, so both are equal; its output has the width of the dense model."""
    pruned, plan = pair
    channels = kept_channels(dit, plan)
    student, teacher = recorded(pruned, dict.fromkeys(channels)), recorded(dit, channels)
    hidden, block = "transformer_blocks.0.ff.net.0", "transformer_blocks.0"

    assert channels[block] is None
    assert channels[hidden] == plan.layers[f"{hidden}.proj"].outputs
    assert student[hidden].shape == (2, 16, 48)
    torch.testing.assert_close(student[hidden], teacher[hidden])
    assert student[block].shape == teacher[block].shape == (2, 16, 24)
    assert not torch.allclose(student[block], teacher[block])
    assert list(channels) == [*(f"transformer_blocks.{n}" for n in (0, 1)), hidden, hidden.replace("0", "1", 1)]
