"""Images -> features by an extractor of ours or of torch-fidelity, with weights identified by their hash."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from torchvision.models import VGG16_Weights

from stages.data.images import PixelArray
from stages.protocol import thumbnail
from stages.protocol.bundled import BundledExtractor
from stages.protocol.digits import DIGITS_WEIGHTS, DigitsExtractor
from stages.protocol.inception import PytorchFidInception
from stages.protocol.params import ExtractorParams
from stages.protocol.resnet56 import RESNET56, RESNET56_SHA256, ResNet56Extractor
from stages.protocol.thumbnail import ThumbnailExtractor
from stages.runtime.errors import InputError, first_line
from stages.runtime.paths import expand_path
from stages.storage.files import file_sha256, temporary_folder

PYTORCH_FID = "inception-v3-pytorch-fid"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Source:
    """Download address and expected hash of the weights of a torch-fidelity extractor."""

    url: str
    file_name: str
    """Name of the file in PyTorch's cache."""
    sha256: str
    """The expected sha256, or its first digits."""
    holds_code: bool = False
    """Whether the file is a TorchScript archive, which is opened only with exactly this sha256."""


def _sources() -> dict[str, Source]:
    inception, vgg = URL_INCEPTION_V3.rsplit("/", 1)[-1], VGG16_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    clip = {
        name: Source(url, f"{name}-{MODEL_METADATA[name]['hash']}.pt", MODEL_METADATA[name]["hash"], holds_code=True)
        for name, url in MODEL_URLS.items()
    }
    return {
        "inception-v3-compat": Source(URL_INCEPTION_V3, inception, INCEPTION_SHA256),
        PYTORCH_FID: Source(URL_INCEPTION_V3, inception, INCEPTION_SHA256),
        "vgg16": Source(VGG16_Weights.DEFAULT.url, vgg, vgg.rsplit("-", 1)[-1].removesuffix(".pth")),
        **clip,
    }


SOURCES = _sources()
BUNDLED: dict[str, tuple[type[BundledExtractor], Path]] = {
    "digits": (DigitsExtractor, DIGITS_WEIGHTS),
    "thumbnail": (ThumbnailExtractor, Path(thumbnail.__file__)),
}
"""The bundled extractors and the file whose hash identifies each: its weights, or its code if it has no weights."""
GIVEN: dict[str, tuple[type[BundledExtractor], str]] = {RESNET56: (ResNet56Extractor, RESNET56_SHA256)}
"""The extractors of ours whose weights the user gives as a safetensors file, and the sha256 of the published ones."""
OURS = {
    PYTORCH_FID: PytorchFidInception,
    **{name: extractor for name, (extractor, _) in [*BUNDLED.items(), *GIVEN.items()]},
}
"""The extractors that torch-fidelity does not have."""


class RgbImages(Dataset[torch.Tensor]):
    """The dataset that torch-fidelity reads: uint8 [3, H, W] per image, with a grey channel repeated."""

    def __init__(self, pixels: PixelArray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.pixels[index])).expand(3, -1, -1)


class Extractor:
    """A registered extractor of torch-fidelity with verified weights.

    Args:
        params: Name, and path and hash of the weights.
        batch_size: Images per batch.

    Raises:
        InputError: The name is unknown, or the weights are missing, have another hash or hold more than tensors.
    """

    def __init__(self, params: ExtractorParams, batch_size: int) -> None:
        for name, extractor in OURS.items():
            if name not in FEATURE_EXTRACTORS_REGISTRY:
                register_feature_extractor(name, extractor)
        self.name, self.batch_size = params.name, batch_size
        path = _find_weights(params)
        self.layer = str(FEATURE_EXTRACTORS_REGISTRY[params.name].get_default_feature_layer_for_metric("fid"))
        self.cuda = torch.cuda.is_available()
        if params.name not in SOURCES:
            self.sha256, self.network = _check_hash(path, params), self._load(path)
            return
        with _private_copy(path) as copied:
            self.sha256 = _check_hash(copied, params)
            if not SOURCES[params.name].holds_code:
                _check_tensors(copied)
            self.network = self._load(copied)

    def _load(self, path: Path) -> Any:  # noqa: ANN401  # torch-fidelity has no types
        try:
            return create_feature_extractor(
                self.name, [self.layer], cuda=self.cuda, feature_extractor_weights_path=str(path), verbose=False
            )
        except Exception as error:  # noqa: BLE001  # tensors, but not of this network, fail in many ways
            found = f"{path} does not hold weights of {self.name} ({type(error).__name__})"
            raise InputError(f"{found}; correct reference.extractor") from None

    def features(self, pixels: PixelArray) -> torch.Tensor:
        """[N, C, H, W] uint8 -> [N, D] float32."""
        check_image_shape(self.name, pixels.shape[-3:])
        found = get_featuresdict_from_dataset(
            RgbImages(pixels), self.network, self.batch_size, cuda=self.cuda, save_cpu_ram=True, verbose=False
        )
        features: torch.Tensor = found[self.layer].float()
        return features


@contextmanager
def _private_copy(path: Path) -> Iterator[Path]:
    """Copy weights to where nobody changes them between their checks and torch-fidelity's unpickling.

    Raises:
        InputError: There is no room for the copy. An InputError of the block names the original.
    """
    place = Path(tempfile.gettempdir())
    try:
        with temporary_folder(path.parent, place) as folder:
            shutil.copyfile(path, folder / path.name)
            yield folder / path.name
    except OSError as error:
        if str(error.filename) == str(path):
            raise InputError(f"cannot read {path}: {error.strerror}; correct reference.extractor.weights") from None
        found = f"{path} cannot be copied to {place} ({first_line(error)})"
        raise InputError(f"{found}; set TMPDIR to another folder") from None


def check_image_shape(extractor: str, shape: Sequence[int]) -> None:
    """Check that an extractor accepts images of the shape [C, H, W].

    Raises:
        InputError: The extractor is digits and the images are not grey.
    """
    if extractor == "digits" and shape[0] != 1:
        found = "×".join(map(str, shape))
        raise InputError(f"the extractor digits takes grey images, found {found}; use another reference.extractor")


def find_extractor(params: ExtractorParams) -> Path:
    """Check the name of an extractor, and return where its weights are or, where they would be downloaded, will be.

    Raises:
        InputError: The name is unknown, or the weights that it names are missing.
    """
    if params.name in BUNDLED:
        return BUNDLED[params.name][1]
    if params.name not in {**SOURCES, **GIVEN}:
        reason = ", which runs code of no fixed version" if params.name.startswith("dinov2") else ""
        known = ", ".join([*BUNDLED, *SOURCES, *GIVEN])
        raise InputError(f"reference.extractor.name is {params.name!r}{reason}; allowed: {known}")
    if params.weights is not None:
        path = expand_path(params.weights, "reference.extractor.weights")
        if not path.is_file():
            raise InputError(f"no extractor weights at {path}; correct reference.extractor.weights")
        return path
    return Path(torch.hub.get_dir()) / "checkpoints" / SOURCES[params.name].file_name


def _find_weights(params: ExtractorParams) -> Path:
    """Return the path of the weights: the given one, or one in PyTorch's cache, downloaded if necessary."""
    cached = find_extractor(params)
    if not cached.is_file():
        source = SOURCES[params.name]
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source.url, str(cached), source.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            found = f"the weights of {params.name} are not at {cached} and could not be downloaded"
            advice = "put the file there, set reference.extractor.weights, or use the extractor thumbnail"
            raise InputError(f"{found} ({first_line(error)}); {advice}") from None
    return cached


def _check_hash(path: Path, params: ExtractorParams) -> str:
    found = file_sha256(path)
    published = {name: source.sha256 for name, source in SOURCES.items()}
    published |= {name: sha256 for name, (_, sha256) in GIVEN.items()}
    known = published.get(params.name, "")
    expected = params.sha256 or known
    if params.name in SOURCES and SOURCES[params.name].holds_code and not found.startswith(known):
        raise InputError(f"{path} has sha256 {found}; {params.name} is opened only with {known}; use that file")
    if not found.startswith(expected):
        advice = "download it again, or set reference.extractor.sha256 to the hash of these weights"
        raise InputError(f"{path} has sha256 {found}, expected {expected}; {advice}")
    return found


def _check_tensors(path: Path) -> None:
    """Check that a file holds only tensors, since torch-fidelity unpickles any content.

    Raises:
        InputError: The file is damaged or holds other objects.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # files break in many ways, and PyTorch's own advice is unsafe
        raise InputError(
            f"{path} holds something other than tensors ({type(error).__name__}); use other weights"
        ) from None
