"""The block reference of params.yaml: the protocol under which every model is measured."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stages.models.params import SamplerParams
from stages.runtime.schema import Section, Sha256


class ExtractorParams(Section):
    """What sees the images in place of people."""

    name: str = Field(min_length=1)
    """digits and thumbnail are ours; inception-v3-compat, vgg16 and others are torch-fidelity's, with fixed weights."""
    weights: Path | None = None
    """Its weights on this machine; null takes them from PyTorch's cache or their download page."""
    sha256: Sha256 | None = None
    """Of that file; null takes what the weights' own name or torch-fidelity promises, if they promise anything."""

    @model_validator(mode="after")
    def _has_weights(self) -> "ExtractorParams":
        if self.name in ("digits", "thumbnail") and self.weights is not None:
            raise ValueError(f"extractor {self.name} brings what it needs; leave weights null")
        return self


class ReferenceParams(Section):
    """The protocol: how every model's images are drawn, seen and scored."""

    sampler: SamplerParams
    guidance: float | None = Field(None, ge=0)
    """Scale of classifier-free guidance of a conditional model; 1, as null, draws without."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and activations; the sampler computes in float32."""
    num_images: int = Field(ge=2)
    """Images of a set; FID, KID, precision and recall are taken on one set at a time."""
    sets: int = Field(1, ge=1, le=1000)
    """Sets drawn from seeds of their own; intervals need two or more."""
    batch_size: int = Field(ge=1, le=1_000_000)
    """Images drawn or seen at once; no part of the protocol, though DVC draws anew when it changes."""
    extractor: ExtractorParams
    real_images: int | None = Field(None, ge=4)
    """Training images to compare with, at most, evenly spaced; null takes all, which costs memory for each."""
    kid_subsets: int = Field(ge=1, le=1_000_000)
    kid_subset_size: int = Field(ge=2)
    """Images in each of KID's subsets; at most num_images."""
    neighbours: int = Field(3, ge=1)
    """k of precision and recall: how far an image's neighbourhood reaches."""

    @model_validator(mode="after")
    def _images_suffice(self) -> "ReferenceParams":
        if self.kid_subset_size > self.num_images:
            raise ValueError(f"kid_subset_size {self.kid_subset_size} is more than num_images {self.num_images}")
        if self.neighbours >= self.num_images:
            raise ValueError(f"neighbours {self.neighbours} needs more than num_images {self.num_images}")
        return self
