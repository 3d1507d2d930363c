"""Features of an extractor -> the classes that its classifier predicts, for the extractors that have one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.protocol.extractors import Extractor
from stages.protocol.resnet56 import RESNET56


@dataclass(frozen=True)
class Classifier:
    """The last layer of an extractor's network."""

    names: tuple[str, ...]
    """Names of the classes, in the order of the logits."""
    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    """Network and features [N, D] -> logits [N, K]."""


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSIFIERS = {
    # The digits' features are divided by their root mean square, and the head reads them as they were before.
    "digits": Classifier(tuple("0123456789"), lambda net, found: net.classifier.head(found * net.classifier.rms)),
    RESNET56: Classifier(CIFAR10, lambda net, found: net.classifier.linear(found)),
}
"""Name of an extractor -> its classifier; other extractors have none, or one without names for its classes."""


@torch.inference_mode()
def predict(extractor: Extractor, features: torch.Tensor) -> NDArray[np.int64] | None:
    """Features [..., D] -> predicted classes [...]; None if the extractor has no classifier."""
    if extractor.name not in CLASSIFIERS:
        return None
    device = next(extractor.network.parameters()).device
    logits = CLASSIFIERS[extractor.name].logits(extractor.network, features.to(device))
    return logits.argmax(dim=-1).cpu().numpy()
