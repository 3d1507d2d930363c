"""Images of two models from the same noise -> how alike they are, pair by pair."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

SIGMA, RADIUS = 1.5, 5
"""Of the Gaussian window, in pixels: 11×11."""
BATCH_SIZE = 64


@dataclass(frozen=True)
class Pairs:
    """How alike the n-th images of two models are, for every set: [sets, N] each."""

    ssim: NDArray[np.float64]
    mse: NDArray[np.float64]

    def worst(self, count: int) -> list[tuple[int, int]]:
        """Find the (set, index) of the pairs with the lowest SSIM, the worst first."""
        order = np.argsort(self.ssim, axis=None, kind="stable")[:count]
        return [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, self.ssim.shape), strict=True)]


def compare_pairs(samples: NDArray[np.uint8], reference: NDArray[np.uint8]) -> Pairs:
    """Compare two models' images of the same seeds, [sets, N, C, H, W] uint8 each."""
    rows = [(images_to_ssim(a, b), images_to_mse(a, b)) for a, b in zip(samples, reference, strict=True)]
    ssim, mse = zip(*rows, strict=True)
    return Pairs(np.stack(ssim), np.stack(mse))


def images_to_mse(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compare pairs, [N, C, H, W] uint8 each -> mean squared difference [N] of pixels scaled to [0, 1]."""
    squares = [((left.astype(np.float64) - right) / 255) ** 2 for left, right in zip(images, others, strict=True)]
    return np.array([square.mean() for square in squares])


def images_to_ssim(
    images: NDArray[np.uint8], others: NDArray[np.uint8], batch_size: int = BATCH_SIZE
) -> NDArray[np.float64]:
    """Compare pairs, [N, C, H, W] uint8 each -> SSIM [N] (Wang et al., 2004, eq. 13).

    Averaged over the windows that lie wholly inside the image, as scikit-image does; torchmetrics by itself also counts
    those that reach into a mirrored border.
    """
    starts = range(0, len(images), batch_size)
    batches = [
        _batch_to_ssim(*(torch.tensor(side[start : start + batch_size]).double() for side in (images, others)))
        for start in starts
    ]
    result: NDArray[np.float64] = torch.cat(batches).numpy()
    return result


def _batch_to_ssim(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    _, windows = structural_similarity_index_measure(
        left, right, sigma=SIGMA, data_range=255.0, reduction="none", return_full_image=True
    )
    return windows[..., RADIUS:-RADIUS, RADIUS:-RADIUS].mean(dim=(1, 2, 3))
