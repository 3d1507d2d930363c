"""Drawn and real images -> FID and KID, through torch-fidelity."""

from dataclasses import dataclass
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from stages.errors import InputError, first_line
from stages.evaluate.extractors import DIGITS_SHAPE, register_extractors
from stages.params import EvaluateParams
from stages.seeds import derive_seed


@dataclass(frozen=True)
class Quality:
    """How close drawn images are to real ones."""

    fid: float
    kid: float
    """Mean over the subsets."""
    kid_std: float
    """Standard deviation over the subsets."""


class RgbImages(Dataset[torch.Tensor]):
    """Packed images as torch-fidelity wants them: uint8 [3, H, W] each, grey ones repeated."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.pixels[index])).expand(3, -1, -1)


def images_to_features(pixels: NDArray[np.uint8], params: EvaluateParams) -> torch.Tensor:
    """[N, C, H, W] uint8 -> [N, D] float64, on which statistics are taken in double precision.

    Raises:
        InputError: The extractor's weights cannot be had, or it does not see such images.
    """
    register_extractors()
    weights = check_extractor(pixels, params)
    layer = FEATURE_EXTRACTORS_REGISTRY[params.extractor].get_default_feature_layer_for_metric("fid")
    cuda = torch.cuda.is_available()
    extractor = create_feature_extractor(
        params.extractor, [layer], cuda=cuda, feature_extractor_weights_path=weights, verbose=False
    )
    found = get_featuresdict_from_dataset(
        RgbImages(pixels), extractor, params.batch_size, cuda=cuda, save_cpu_ram=True, verbose=False
    )
    features: torch.Tensor = found[layer].double()
    return features


def check_extractor(pixels: NDArray[np.uint8], params: EvaluateParams) -> str | None:
    """Make sure that the extractor sees such images and that its weights are tensors and nothing else.

    torch-fidelity unpickles Inception's weights whatever they hold, so they are first read by PyTorch's restricted
    unpickler, which refuses everything but tensors.

    Returns:
        The path of the weights, None where they are in PyTorch's cache or ship with the extractor.

    Raises:
        InputError: They cannot be had, hold something else, or the images are not for this extractor.
    """
    if params.extractor == "digits":
        if pixels.shape[1:] != DIGITS_SHAPE:
            found = "×".join(map(str, pixels.shape[1:]))
            raise InputError(f"the extractor digits sees 1×16×16 images, these are {found}; choose evaluate.extractor")
        return None
    path = params.extractor_weights
    try:
        if path is None:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", weights_only=True)
        else:
            torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        where = f"at {path}" if path else "on the download page (set evaluate.extractor_weights to a local file)"
        raise InputError(f"the extractor's weights are not {where}: {first_line(error)}") from None
    return None if path is None else str(path)


def features_to_quality(drawn: torch.Tensor, real: torch.Tensor, params: EvaluateParams, seed: int) -> Quality:
    """[N, D], [M, D] float64 -> FID (Heusel et al., 2017, eq. 6) and KID (Bińkowski et al., 2018, eq. 4)."""
    fid = fid_statistics_to_metric(fid_features_to_statistics(drawn), fid_features_to_statistics(real), verbose=False)
    kid = kid_features_to_metric(
        drawn,
        real,
        kid_subsets=params.kid_subsets,
        kid_subset_size=params.kid_subset_size,
        rng_seed=derive_seed(seed, "kid subsets") % 2**32,
        verbose=False,
    )
    return Quality(fid[KEY_METRIC_FID], kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD])
