"""The block reference of params.yaml: the protocol of all measurements."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from stages.models.params import PrecisionName, SamplerParams
from stages.runtime.schema import Section, Sha256

MOST_PER_SUBSET = 1000
"""Images of each subset of KID in the publications."""


class ExtractorParams(Section):
    """The feature extractor of FID, KID, precision and recall."""

    name: str = Field(min_length=1)
    """digits or thumbnail, which are bundled; inception-v3-compat or another one of torch-fidelity with fixed weights;
    inception-v3-pytorch-fid, which resizes as pytorch-fid does; or cifar10-resnet56, which needs `weights`."""
    weights: Path | None = None
    """Path of its weights; ~ and $VARIABLES are expanded when the stage runs. null takes them from PyTorch's cache or
    downloads them."""
    sha256: Sha256 | None = None
    """Expected sha256 of the weights; null takes the published one, or accepts any file if none is published."""

    @model_validator(mode="after")
    def _check_weights(self) -> "ExtractorParams":
        if self.name in ("digits", "thumbnail") and self.weights is not None:
            raise ValueError(f"extractor {self.name} is bundled; set weights to null")
        if self.name == "cifar10-resnet56" and self.weights is None:
            raise ValueError(f"extractor {self.name} needs weights; give the path of its safetensors file")
        return self


def _half_of_images(given: dict[str, Any]) -> int:
    """Return the default of kid_subset_size, of the values that stand above it."""
    return max(2, min(int(given["num_images"]) // 2, MOST_PER_SUBSET))


class ReferenceParams(Section):
    """The protocol: how the images of every model are drawn and measured."""

    sampler: SamplerParams
    """Sampler and number of steps."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale of a conditional model; null or 1 disables it, and 1 counts as null."""
    precision: PrecisionName = "float32"
    """Precision of the model: float32, tf32 (NVIDIA GPUs from Ampere on), or bfloat16 for weights and activations; the
    sampler always computes in float32."""
    num_images: int = Field(ge=2)
    """Images per set; FID, KID, precision and recall are computed for each set."""
    sets: int = Field(1, ge=1, le=1000)
    """Number of sets, each with its own seeds; confidence intervals need two or more."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Images per batch; not part of the protocol, but a change makes DVC run the stage again."""
    extractor: ExtractorParams
    """Feature extractor and its weights."""
    real_images: int | None = Field(None, ge=4)
    """Largest number of real images, evenly spaced over the training images; null takes all, at a cost in memory."""
    kid_subsets: int = Field(50, ge=1, le=1_000_000)
    """Number of random subsets that KID averages over."""
    kid_subset_size: int = Field(default_factory=_half_of_images, ge=2, validate_default=True)
    """Images per subset of KID; at most num_images, and by default half of them, but no more than 1000."""
    neighbours: int = Field(3, ge=1)
    """k of precision and recall: an image's neighbourhood reaches to its k-th nearest neighbour."""

    @field_validator("guidance")
    @classmethod
    def _disable(cls, scale: float | None) -> float | None:
        """Give images that are drawn alike one protocol."""
        return None if scale == 1 else scale

    @model_validator(mode="after")
    def _enough_images(self) -> "ReferenceParams":
        if self.kid_subset_size > self.num_images:
            raise ValueError(
                f"kid_subset_size {self.kid_subset_size} is more than num_images {self.num_images}; lower it"
            )
        if self.neighbours >= self.num_images:
            raise ValueError(f"neighbours {self.neighbours} is not less than num_images {self.num_images}; lower it")
        return self
