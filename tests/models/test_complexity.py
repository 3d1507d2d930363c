"""Parameters and multiply-accumulates."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.models.complexity import count_attention_macs, count_macs, count_params
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


class Attention(nn.Module):
    """PyTorch's attention as a module, or the same of two layers and its function."""

    def __init__(self, width, *, is_module):
        super().__init__()
        self.whole = nn.MultiheadAttention(width, 2, batch_first=True) if is_module else None
        self.qkv, self.proj = (None, None) if is_module else (nn.Linear(width, 3 * width), nn.Linear(width, width))

    def forward(self, x, **_):
        """[B, C, H, W] -> [B, C, H, W]."""
        tokens = x.flatten(2).transpose(1, 2)
        if self.whole:
            mixed, _ = self.whole(tokens, tokens, tokens, need_weights=False)
        else:
            q, k, v = self.qkv(tokens).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def test_the_products_of_a_module_of_attention_count_once(make_unet):
    """Both sums are alike within 1 %: torch-pruning also counts the module's scaling and softmax."""
    found = []
    for is_module in (True, False):
        unet = make_unet()
        width = unet.mid_block.attentions[0].to_q.in_features
        unet.mid_block.attentions[0] = Attention(width, is_module=is_module)
        found.append((count_macs(unet), count_attention_macs(unet)))
    (with_module, rest), (with_layers, products) = found
    tokens = (8 // 2) ** 2

    assert products - rest == 2 * tokens**2 * width
    assert with_module > with_layers
    assert with_module + rest == pytest.approx(with_layers + products, rel=0.01)
