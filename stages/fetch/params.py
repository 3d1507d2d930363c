"""Where a pretrained model and its data come from: the block fetch of params.yaml."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.runtime.errors import InputError
from stages.runtime.schema import Commit, Section, Sha256
from stages.storage.s3 import BUCKET_URI


def _check_uri(uri: str) -> str:
    if not re.fullmatch(BUCKET_URI, uri):
        raise ValueError("give s3://BUCKET or s3://BUCKET/PREFIX")
    return uri


def locate(path: Path, key: str) -> Path:
    """Fill the variables of the environment into a path, and the home folder in place of ~.

    Raises:
        InputError: One is not set.
    """
    try:
        filled = os.path.expandvars(path.expanduser())
    except RuntimeError:  # ~ of a user that there is none of
        raise InputError(f"{key} is {path}, and there is no such home folder; give a whole path") from None
    if missing := re.search(r"\$\{?(\w+)", filled):
        raise InputError(f"{key} is {path} and ${missing[1]} is not set; set it to the folder that holds the rest")
    return Path(filled)


class BundledSource(Section):
    """Something that ships with the repository."""

    source: Literal["bundled"]
    name: Literal["digits"]


class FolderModel(Section):
    """A diffusers folder on this machine. DVC does not watch it: pin it by its hash, or force `fetch`."""

    source: Literal["folder"]
    path: Path
    """$VARIABLES of the environment are filled in as it is fetched."""
    sha256: Sha256 | None = None
    """Of the UNet's safetensors file; null trusts the folder."""


class HubModel(Section):
    """A diffusers model on the Hugging Face Hub."""

    source: Literal["hub"]
    repo: str = Field(min_length=1)
    """For example google/ddpm-cifar10-32."""
    revision: Commit
    """The commit of the repository; a branch name may move and is not allowed."""


class S3Source(Section):
    """Plain objects in a bucket, their keys as paths; endpoint and credentials come from the environment."""

    source: Literal["s3"]
    uri: Annotated[str, AfterValidator(_check_uri)]
    """s3://BUCKET/PREFIX; whatever lies below the prefix counts. DVC does not watch it, the hash pins it."""


class S3Model(S3Source):
    """A diffusers folder in a bucket."""

    sha256: Sha256
    """Of the UNet's safetensors file; needed, because others may write to a bucket."""


System = Literal["cifar10", "celeba-hq-64", "lsun-256", "imagenet-ldm"]
"""Of the paper."""


class CheckpointModel(Section):
    """A checkpoint of the code that a model was published with, converted as it is fetched."""

    source: Literal["checkpoint"]
    layout: Literal["ddim", "ldm"]
    """ddim is a UNet of the DDIM authors (ermongroup/ddim), ldm a class-conditional model.ckpt of CompVis with its
    autoencoder and class embedding."""
    path: Path
    """$VARIABLES of the environment are filled in as it is fetched."""
    system: System
    """What it must hold: a config in stages/fetch/systems."""
    sha256: Sha256 | None = None
    """Of the file; null trusts it to be the one that is meant, never to hold more than tensors."""


class RegistryModel(Section):
    """A version of a model in MLflow's registry, whose address comes from MLFLOW_TRACKING_URI."""

    source: Literal["registry"]
    uri: str = Field(pattern=r"^models:/[^/@]+/[1-9][0-9]*$")
    """models:/NAME/VERSION; aliases move and are not allowed."""
    sha256: Sha256 | None = None
    """Of the UNet's safetensors file; null trusts the registry."""


class Fitted(Section):
    """How pictures of any size become those of the model's."""

    fit: Literal["exact", "crop", "celeba"] = "exact"
    """exact refuses images that are not of the model's size, crop takes the centre square and resizes it, celeba takes
    the 128×128 around the face of an aligned CelebA image of 178×218, as DDIM does, and resizes it."""
    resample: Literal["lanczos", "bilinear", "bicubic", "box"] = "lanczos"
    """The filter of that."""
    max_corrupt: int = Field(0, ge=0)
    """Images that cannot be read which are left out and named; one more, and nothing is fetched."""


class FolderData(Fitted):
    """A folder of images on this machine; subfolders count. DVC does not watch it: pin it, or force `fetch`."""

    source: Literal["folder"]
    path: Path
    """$VARIABLES of the environment are filled in as it is fetched."""
    labels: bool = False
    """Whether the folders right below are classes, numbered in the order of their names."""
    sha256: Sha256 | None = None
    """Of the packed images, as data/dataset.json reports it; null trusts the folder."""


class S3Data(S3Source, Fitted):
    """Images in a bucket."""

    labels: bool = False
    """As of a folder."""
    sha256: Sha256
    """Of the packed images, as data/dataset.json reports it for a folder of the same files."""


class NpzData(Fitted):
    """Arrays of uint8 images in one .npz file: [N, H, W] or [N, H, W, C]."""

    source: Literal["npz"]
    path: Path
    """$VARIABLES of the environment are filled in as it is fetched."""
    images: str = "arr_0"
    """Key of the images."""
    heldout_images: str | None = None
    """Key of images of their own to hold out, which takes the place of fetch.heldout."""
    labels: str | None = None
    """Key of the classes, integers [N]; null for a model that takes none."""
    heldout_labels: str | None = None
    """Of heldout_images."""
    sha256: Sha256 | None = None
    """Of the packed images, as data/dataset.json reports it; null trusts the file."""

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        if (self.heldout_labels is not None) != (None not in (self.labels, self.heldout_images)):
            raise ValueError("heldout_labels go with labels and heldout_images; give all three or leave them out")
        if self.heldout_images == self.images:
            raise ValueError("heldout_images are the images themselves; give a key of others, or leave it out")
        return self


class HubData(Fitted):
    """A dataset with an image column on the Hugging Face Hub."""

    source: Literal["hub"]
    repo: str = Field(min_length=1)
    """For example uoft-cs/cifar10."""
    revision: Commit
    split: str = "train"
    column: str = "img"
    """The column that holds the images."""
    labels: str | None = None
    """The column that holds the classes, integers; null for a model that takes none."""


ModelSource = BundledSource | FolderModel | S3Model | HubModel | CheckpointModel | RegistryModel
DataSource = BundledSource | FolderData | S3Data | NpzData | HubData


class FetchParams(Section):
    """Where the pretrained model and its data come from."""

    model: Annotated[ModelSource, Field(discriminator="source")]
    data: Annotated[DataSource, Field(discriminator="source")]
    heldout: float = Field(gt=0, lt=1)
    """Share of the images kept away from finetuning, for the held-out loss."""
