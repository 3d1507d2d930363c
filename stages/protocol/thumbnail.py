"""Images -> 8×8 thumbnails as features, without weights: for trying out a pipeline, too coarse to judge quality.

The sha256 of this file identifies the extractor in a protocol, so every edit of it makes a new protocol.
"""

import torch
from torch.nn.functional import interpolate

from stages.protocol.bundled import BundledExtractor

SIDE = 8


class ThumbnailExtractor(BundledExtractor):
    """[N, 3, H, W] uint8 -> [N, 192] float32: the mean colours of an 8×8 grid, in [-1, 1]."""

    num_features = 3 * SIDE * SIDE

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Compute the thumbnails of a batch of RGB images."""
        small = interpolate(images.float(), (SIDE, SIDE), mode="area")
        return (small.flatten(1) / 127.5 - 1,)
