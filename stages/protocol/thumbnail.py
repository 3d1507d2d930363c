"""Images -> features without any weights: what is left of them at 8×8. For trying a pipeline out, not for judging."""

import torch
from torch.nn.functional import interpolate
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

SIDE = 8
NUM_FEATURES = 3 * SIDE * SIDE


class ThumbnailExtractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """[N, 3, H, W] uint8 -> [N, 192]: the colours of an 8×8 miniature, in [-1, 1]."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Name the features."""
        return (str(NUM_FEATURES),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """All metrics use the same features."""
        del metric
        return str(NUM_FEATURES)

    @staticmethod
    def can_be_compiled() -> bool:
        """There is nothing to compile."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        """Is never compiled."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Shrink a batch of RGB images."""
        small = interpolate(images.float(), (SIDE, SIDE), mode="area")
        return (small.flatten(1) / 127.5 - 1,)
