"""Images of two models from the same noise -> how alike they are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure


def images_to_ssim(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> torch.Tensor:
    """Compare pairs, [N, C, H, W] uint8 each -> SSIM [N] (Wang et al., 2004, eq. 13; 11×11 Gaussian window, σ 1.5)."""
    left, right = torch.from_numpy(images).double(), torch.from_numpy(others).double()
    similarity = structural_similarity_index_measure(left, right, sigma=1.5, data_range=255.0, reduction="none")
    assert isinstance(similarity, torch.Tensor)
    return similarity
