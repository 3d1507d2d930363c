"""Images of two models from the same noise -> SSIM and MSE of each pair."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

SIGMA = 1.5
"""Standard deviation of the Gaussian window in pixels; scikit-image truncates it at 3.5 σ, so the window is 11×11."""


@dataclass(frozen=True)
class Pairs:
    """SSIM and MSE between the n-th images of two models: [sets, N] each."""

    ssim: NDArray[np.float64]
    mse: NDArray[np.float64]

    @classmethod
    def of_equals(cls, shape: tuple[int, ...]) -> Self:
        """Return SSIM 1 and MSE 0, their values for equal images, which need no computation."""
        return cls(np.ones(shape), np.zeros(shape))

    def means(self) -> dict[str, list[float]]:
        """Mean of both over the images of each set."""
        return {name: [float(row.mean()) for row in values] for name, values in vars(self).items()}

    def worst(self, count: int) -> list[tuple[int, int]]:
        """Return (set, index) of the pairs with the lowest SSIM, lowest first."""
        order = np.argsort(self.ssim, axis=None, kind="stable")[:count]
        return [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, self.ssim.shape), strict=True)]


def images_to_ssim(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """SSIM of pairs, [N, C, H, W] uint8 each -> [N] (Wang et al., 2004, eq. 13), over windows inside the image."""
    settings = {"gaussian_weights": True, "sigma": SIGMA, "use_sample_covariance": False, "data_range": 255}
    return np.array([structural_similarity(x, y, channel_axis=0, **settings) for x, y in _as_floats(images, others)])


def images_to_mse(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """MSE of pairs, [N, C, H, W] uint8 each -> [N], of pixels scaled to [0, 1]."""
    return np.array([(((x - y) / 255) ** 2).mean() for x, y in _as_floats(images, others)])


def _as_floats(
    images: NDArray[np.uint8], others: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    return ((x.astype(np.float64), y.astype(np.float64)) for x, y in zip(images, others, strict=True))
