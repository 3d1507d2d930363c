"""The block `fetch` of params.yaml: the sources of the pretrained model and of its data."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.runtime.schema import Commit, Section, Sha256
from stages.storage.s3_bucket import BUCKET_URI


def _check_uri(uri: str) -> str:
    if not re.fullmatch(BUCKET_URI, uri):
        name = "3 to 63 small letters, digits, dots, hyphens or underscores"
        raise ValueError(f"give s3://BUCKET or s3://BUCKET/PREFIX, where BUCKET has {name}")
    return uri


class BundledModel(Section):
    """A model that ships with the repository."""

    source: Literal["bundled"]
    name: Literal["digits", "photos"]
    """digits: a small DDPM trained on scikit-learn's UCI digits, 1×16×16. photos: one trained on CIFAR-10, 3×32×32."""


class BundledData(Section):
    """The images that ship with the repository."""

    source: Literal["bundled"]
    name: Literal["digits"]
    """digits: scikit-learn's UCI digits, scaled up to 1×16×16."""


class ModelFolder(Section):
    """A diffusers folder of others."""

    trust: bool = Field(default=False, strict=True, exclude_if=lambda trust: not trust)
    """Whether `denoiser.py` in it, the class of a model that diffusers does not know, is run: in this stage and in all
    that read its model. Read the file first (docs/how-to/own-class.md)."""


class FolderModel(ModelFolder):
    """A diffusers folder on this machine; DVC does not track it: set sha256 or force the stage."""

    source: Literal["folder"]
    path: Path
    """The diffusers folder; ~ and $VARIABLES are expanded when the stage runs."""
    sha256: Sha256 | None = None
    """Hash of all weights that are read, one file after the other: the denoiser's, those of the autoencoder of a latent
    model, and those of the class embedding, such as
    `cat unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors | sha256sum`; shards are
    ordered by name, and copies in 16 bits are not read. Of an own class, with trust, its files follow
    (`cat diffusion_pytorch_model.safetensors denoiser.py denoiser.json config.json | sha256sum`). null skips the
    check."""


class HubModel(ModelFolder):
    """A diffusers model on the Hugging Face Hub."""

    source: Literal["hub"]
    repo: str = Field(min_length=1)
    """OWNER/NAME of the repository, for example google/ddpm-cifar10-32."""
    revision: Commit
    """Commit of the repository; branch names are rejected because they can move."""


class S3Source(Section):
    """Plain objects in a bucket, whose keys are file paths; endpoint and credentials come from the environment."""

    source: Literal["s3"]
    uri: Annotated[str, AfterValidator(_check_uri)]
    """s3://BUCKET or s3://BUCKET/PREFIX; every object below the prefix belongs to the source. DVC does not track it;
    sha256 pins it."""


class S3Model(S3Source, ModelFolder):
    """A diffusers folder in a bucket."""

    sha256: Sha256
    """Hash of all weights, and of the files of an own class, as for a folder; required because others may be able to
    write to the bucket."""


System = Literal["cifar10", "celeba-hq-64", "lsun-256", "imagenet-ldm", "imagenet-dit"]
"""The models of the Diff-Pruning paper, and DiT-XL/2 at 256×256; each name is a config in stages/fetch/systems."""


class CheckpointModel(Section):
    """A checkpoint in the format of the code that the model was published with; it is converted to diffusers."""

    source: Literal["checkpoint"]
    layout: Literal["ddim", "ldm", "dit"]
    """ddim: a UNet of the DDIM authors (ermongroup/ddim). ldm: a class-conditional model.ckpt of CompVis, with
    autoencoder and class embedding. dit: a DiT of its authors (facebookresearch/DiT), which needs `autoencoder`."""
    path: Path
    """The checkpoint file; ~ and $VARIABLES are expanded when the stage runs."""
    system: System
    """The architecture that the checkpoint must hold."""
    ema: bool | None = None
    """Whether the denoiser's EMA weights are taken. null takes what the authors draw with: the EMA of a `ddim`
    checkpoint that has one, and the weights themselves of an `ldm` checkpoint, whose config has use_ema false."""
    autoencoder: Path | None = None
    """For layout `dit`: the diffusers folder of its AutoencoderKL, such as a copy of stabilityai/sd-vae-ft-ema."""
    sha256: Sha256 | None = None
    """Hash of the file; null skips the check. Files that hold more than tensors are refused either way."""
    autoencoder_sha256: Sha256 | None = Field(None, exclude_if=lambda sha256: sha256 is None)
    """Hash of the weights of `autoencoder`, its file of safetensors or .bin; null skips the check."""

    @model_validator(mode="after")
    def _check_autoencoder(self) -> "CheckpointModel":
        if self.autoencoder_sha256 is not None and self.autoencoder is None:
            raise ValueError("autoencoder_sha256 is the hash of an autoencoder; give autoencoder or remove it")
        if self.layout == "dit" and self.autoencoder is None:
            raise ValueError("layout dit needs autoencoder, the folder of its AutoencoderKL; give it")
        if self.layout != "dit" and self.autoencoder is not None:
            raise ValueError(f"layout {self.layout} has no use for autoencoder; remove it")
        return self


class RegistryModel(ModelFolder):
    """A model version in the MLflow registry at MLFLOW_TRACKING_URI."""

    source: Literal["registry"]
    uri: str = Field(pattern=r"^models:/[^/@]+/[1-9][0-9]*$")
    """models:/NAME/VERSION; aliases are rejected because they can move."""
    sha256: Sha256 | None = None
    """Hash of all weights, with trust also of the files of an own class, as for a folder; null skips the check."""


Level = Annotated[int, Field(strict=True, ge=0, le=255)]


class FitParams(Section):
    """How images of any size are brought to the size of the model."""

    background: tuple[Level, Level, Level] = (255, 255, 255)
    """Red, green and blue, 0 … 255, on which transparent pixels are packed."""
    fit: Literal["exact", "crop", "celeba"] = "exact"
    """exact: refuse images of another size. crop: resize the largest centred part of the model's proportions, a square
    for most models. celeba: resize the 128×128 pixels around the face of an aligned 178×218 CelebA image, as DDIM
    does."""
    resample: Literal["lanczos", "bilinear", "bicubic", "box"] = "lanczos"
    """Pillow's resampling filter for crop and celeba."""
    max_corrupt: int = Field(0, ge=0)
    """Number of unreadable images that may be left out; they are listed in dataset.json. With more, fetch fails."""


class ClassFolders(FitParams):
    """Images whose classes may be the folders that they lie in."""

    labels: bool = False
    """Whether the folders directly below the path or prefix are classes."""
    classes: Path | None = None
    """Text file with the name of one of these folders per line, in the order of the class numbers; ~ and $VARIABLES are
    expanded. null numbers the folders in natural order, class2 before class10."""

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.classes is not None and not self.labels:
            raise ValueError("classes numbers the class folders; set labels: true or remove it")
        return self


class FolderData(ClassFolders):
    """A folder of images on this machine, with subfolders; DVC does not track it: set sha256 or force the stage."""

    source: Literal["folder"]
    path: Path
    """The image folder; ~ and $VARIABLES are expanded when the stage runs."""
    sha256: Sha256 | None = None
    """Hash of the packed images, as in data/dataset.json; null skips the check."""


class S3Data(S3Source, ClassFolders):
    """Images in a bucket."""

    sha256: Sha256
    """Hash of the packed images, as data/dataset.json has it for a folder with the same files."""


class NpzData(FitParams):
    """Arrays of uint8 images in one .npz file: [N, H, W] or [N, H, W, C]."""

    source: Literal["npz"]
    path: Path
    """The .npz file; ~ and $VARIABLES are expanded when the stage runs."""
    images: str = "arr_0"
    """Key of the images."""
    heldout_images: str | None = None
    """Key of the held-out images; null holds out the share fetch.heldout of `images`."""
    labels: str | None = None
    """Key of the classes of `images`, integers [N]; null for an unconditional model."""
    heldout_labels: str | None = None
    """Key of the classes of `heldout_images`, integers [N]; set if and only if labels and heldout_images are."""
    sha256: Sha256 | None = None
    """Hash of the packed images, as in data/dataset.json; null skips the check."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if (self.heldout_labels is not None) != (None not in (self.labels, self.heldout_images)):
            raise ValueError("heldout_labels go with labels and heldout_images; give all three or leave them out")
        if self.heldout_images == self.images:
            raise ValueError("heldout_images has the key of images; give another key or leave it out")
        return self


class HubData(FitParams):
    """A dataset with an image column on the Hugging Face Hub."""

    source: Literal["hub"]
    repo: str = Field(min_length=1)
    """OWNER/NAME of the dataset, for example uoft-cs/cifar10."""
    revision: Commit
    """Commit of the dataset; branch names are rejected because they can move."""
    split: str = "train"
    """Split of the dataset that is packed."""
    column: str = "img"
    """Name of the image column."""
    labels: str | None = None
    """Name of the class column, integers; null for an unconditional model."""


ModelSource = BundledModel | FolderModel | S3Model | HubModel | CheckpointModel | RegistryModel
DataSource = BundledData | FolderData | S3Data | NpzData | HubData


class FetchParams(Section):
    """The sources of the pretrained model and of its data."""

    model: Annotated[ModelSource, Field(discriminator="source")]
    """Where the pretrained model comes from."""
    data: Annotated[DataSource, Field(discriminator="source")]
    """Where the images come from."""
    heldout: float = Field(0.1, gt=0, lt=1)
    """Share of the images kept out of finetuning, for the held-out loss; ignored if the source has held-out images
    of its own."""
