"""FID's Inception network with the preprocessing of pytorch-fid, which the authors of Diff-Pruning measured with."""

import torch
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

SIDE = 299
"""Height and width of the images that the network reads."""


class PytorchFidInception(FeatureExtractorInceptionV3):  # type: ignore[misc]  # torch-fidelity has no types
    """[N, 3, H, W] uint8 -> the 2,048 features of the last pooling, float32.

    Weights and layers are those of inception-v3-compat. Only what precedes them differs: images are resized by
    bilinear interpolation with half-pixel centres and scaled to [-1, 1] by 2x/255 - 1, where inception-v3-compat
    resizes as TensorFlow 1 did, with centres at the pixels' upper left corners, and scales by (x - 128) / 128.
    """

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the feature layers."""
        return ("2048",)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Resize the images and run every layer but the classifier."""
        pixels = images.to(self.feature_extractor_internal_dtype) / 255
        resized = functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        features = 2 * resized - 1
        for layer in self.children():
            if layer is not self.fc:
                features = layer(features)
        return (features.flatten(1).float(),)
