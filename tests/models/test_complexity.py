"""Parameters and multiply-accumulates."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.models.complexity import count_macs, count_params
from stages.models.families import example_inputs


def test_parameters_are_all_counted(unet):
    """The count is the number of elements of all tensors in the state dict."""
    assert count_params(unet) == sum(tensor.numel() for tensor in unet.state_dict().values())


def test_macs_are_those_of_convolutions_and_linear_layers(unet):
    """PyTorch's counter agrees within 3 %: it omits norms and biases, and ours omits the products inside attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**example_inputs(unet))
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    layers = sum(count for name, count in flops.items() if "attention" not in name) / 2

    assert layers < count_macs(unet) == pytest.approx(layers, rel=0.03)
