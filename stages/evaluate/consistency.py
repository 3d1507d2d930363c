"""Images of two models from the same noise -> how alike they are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

from stages.errors import InputError

SIGMA, RADIUS = 1.5, 5
"""Of the Gaussian window, in pixels: 11×11."""


def check_size(images: NDArray[np.uint8]) -> None:
    """Refuse images that are smaller than a window.

    Raises:
        InputError: They are.
    """
    if min(images.shape[2:]) <= 2 * RADIUS:
        found = f"{images.shape[2]}×{images.shape[3]}"
        raise InputError(f"SSIM needs images of at least {2 * RADIUS + 1}×{2 * RADIUS + 1}, the models draw {found}")


def images_to_ssim(images: NDArray[np.uint8], others: NDArray[np.uint8], batch_size: int = 64) -> torch.Tensor:
    """Compare pairs, [N, C, H, W] uint8 each -> SSIM [N] (Wang et al., 2004, eq. 13).

    Averaged over the windows that lie wholly inside the image, as scikit-image does; torchmetrics by itself also counts
    those that reach into a mirrored border.
    """
    pairs = zip(torch.from_numpy(images).split(batch_size), torch.from_numpy(others).split(batch_size), strict=True)
    return torch.cat([_batch_to_ssim(left.double(), right.double()) for left, right in pairs])


def _batch_to_ssim(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    _, windows = structural_similarity_index_measure(
        left, right, sigma=SIGMA, data_range=255.0, reduction="none", return_full_image=True
    )
    return windows[..., RADIUS:-RADIUS, RADIUS:-RADIUS].mean(dim=(1, 2, 3))
