"""What two measurements must share to be compared; two protocols -> whether they are equal, or what differs."""

import hashlib
import json
from typing import Literal

from stages.models.params import PrecisionName, SamplerParams
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256, flatten

IMAGES_PER_FEATURE = 20
"""FID on fewer images per feature causes a warning; about 40,000 images for Inception's 2,048 features."""


class Protocol(Frozen):
    """All settings that comparable measurements share; batch size and device are not part of it."""

    sampler: SamplerParams
    """Sampler and number of steps, with `clip` resolved; null where the model's own rule is thresholding."""
    guidance: float | None = None
    """Classifier-free guidance scale; None or 1 disables it."""
    precision: PrecisionName
    """Precision of the model while drawing; only deterministic kernels run, on any device."""
    weights: Literal["stored"] = "stored"
    """The weights that generate the images: those of the model folders, where finetuning writes only its EMA."""
    schedule_sha256: Sha256
    """Hash of the noise schedule and all other settings of the sampler, as diffusers resolves them."""
    num_images: int
    """Images per set."""
    sets: int
    """Number of sets."""
    seed: int
    """Root seed; with the set's and the image's index it gives the seed of every image."""
    extractor: str
    """Name of the feature extractor."""
    layer: str
    """Name of its feature layer."""
    extractor_sha256: Sha256
    """Hash of its weights, or of its code if it has no weights."""
    num_real_images: int
    """Number of real images that the features are compared with."""
    real_sha256: Sha256
    """Hash of the real images' shape and pixels. The statistics of their features are not hashed, since they differ in
    the last digits between machines."""
    kid_subsets: int
    """Number of random subsets that KID averages over."""
    kid_subset_size: int
    """Images per subset."""
    neighbours: int
    """k of precision and recall."""

    @property
    def id(self) -> str:
        """The first 12 hexadecimal digits of the hash of all fields."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def check_same(one: Protocol, other: Protocol, names: tuple[str, str]) -> None:
    """Check that two protocols are equal.

    Raises:
        InputError: The protocols differ; every field that differs is named with both values.
    """
    pairs = zip(flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json")), strict=True)
    differing = [f"{name} is {brief(left)} and {brief(right)}" for (name, left), (_, right) in pairs if left != right]
    if differing:
        found = f"{names[0]} and {names[1]} were measured under protocols {one.id} and {other.id}"
        raise InputError(f"{found}: {'; '.join(differing)}; measure both under one protocol")


def brief(value: object) -> str:
    """Write a value of a protocol; a long one, such as a hash, by its first digits."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:8]}…"  # noqa: PLR2004  # the first digits distinguish two hashes


def bias_warning(protocol: Protocol, num_features: int) -> str | None:
    """Return a warning if FID is biased upwards by too few images; values with equal numbers remain comparable."""
    recommended = IMAGES_PER_FEATURE * num_features
    numbers = {"": protocol.num_images, "real ": protocol.num_real_images}
    kind = min(numbers, key=lambda it: numbers[it])
    if numbers[kind] >= recommended:
        return None
    found = f"FID on {numbers[kind]} {kind}images with {num_features} features is biased upwards"
    use = "give" if kind else "draw"
    return f"{found}, and its interval does not show it; compare only equal numbers, or {use} {recommended} or more"
