"""The base class of our own feature extractors, in the interface of torch-fidelity."""

from typing import ClassVar

from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class BundledExtractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A feature extractor with one layer of features, named by their number: [N, 3, H, W] uint8 -> [N, D] float32."""

    num_features: ClassVar[int]

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        """Return the names of the feature layers."""
        return (str(cls.num_features),)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        """Return the layer for a metric, the same for all metrics."""
        del metric
        return str(cls.num_features)
