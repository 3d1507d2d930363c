"""Drawn and real images -> FID and KID, through torch-fidelity."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from stages.errors import InputError
from stages.evaluate.extractors import register_extractors
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
        InputError: The extractor's weights cannot be had.
    """
    register_extractors()
    layer = FEATURE_EXTRACTORS_REGISTRY[params.extractor].get_default_feature_layer_for_metric("fid")
    cuda = torch.cuda.is_available()
    with _missing_weights(params.extractor_weights):
        weights = str(params.extractor_weights) if params.extractor_weights else None
        extractor = create_feature_extractor(
            params.extractor, [layer], cuda=cuda, feature_extractor_weights_path=weights, verbose=False
        )
    found = get_featuresdict_from_dataset(
        RgbImages(pixels), extractor, params.batch_size, cuda=cuda, save_cpu_ram=True, verbose=False
    )
    features: torch.Tensor = found[layer].double()
    return features


@contextmanager
def _missing_weights(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        where = f"at {path}" if path else "on the download page (set evaluate.extractor_weights to a local file)"
        raise InputError(f"the extractor's weights are not {where}: {str(error).splitlines()[0]}") from None


def features_to_quality(drawn: torch.Tensor, real: torch.Tensor, params: EvaluateParams, seed: int) -> Quality:
    """[N, D], [M, D] float64 -> FID (Heusel et al., 2017, eq. 6) and KID (Bińkowski et al., 2018, eq. 4).

    Raises:
        InputError: A KID subset is larger than the real set.
    """
    if params.kid_subset_size > len(real):
        found = f"evaluate.kid_subset_size {params.kid_subset_size} is more than the {len(real)} real images"
        raise InputError(f"{found}; lower it in params.yaml")
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
