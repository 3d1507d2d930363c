"""Weights from numpy's generator, which the programs of the reference records drew as well, whatever PyTorch does."""

import numpy as np
import torch


def draw_weights(model, draws):
    """Draw the weights of a model by a RandomState, in the order of names: N/√fan-in, biases N/20, norms 1 + N/5."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters):
        parameter = parameters[name]
        normal = draws.standard_normal(tuple(parameter.shape))
        if parameter.ndim > 1:
            value = normal / np.sqrt(parameter[0].numel())
        else:
            value = 0.05 * normal if name.endswith("bias") else 1 + 0.2 * normal
        parameter.data.copy_(torch.from_numpy(value))
