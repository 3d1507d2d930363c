"""FID to the dense model's images, paired by noise and unpaired."""

import numpy as np
import pytest
import torch

from stages.evaluate import scores
from stages.evaluate.drawn import drawn_files
from stages.evaluate.scores import Measurer, by_set
from stages.protocol.evaluation import FID_DENSE, FID_DENSE_UNPAIRED
from stages.protocol.reference import Reference
from stages.runtime.processes import Processes
from tests.together import run_together

DRAWS = np.random.default_rng(0)
SETS, IMAGES, FEATURES = 3, 200, 4
MEANS = np.array([[0.0, 0, 0, 0], [1, 0, 2, 0], [0, 3, 0, -1]])
"""Mean of the features of each dense set; all pairs have different distances."""
SCALE, SHIFT = np.array([1.0, 2.0, 3.0, 0.5]), np.array([0.0, 1.0, -2.0, 0.0])


def make_features():
    """Draw features of which each set has exactly its mean in MEANS, and covariance 1."""
    draws = DRAWS.standard_normal((SETS, IMAGES, FEATURES))
    whitened = [(part - part.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(part.T)).T) for part in draws]
    return np.stack(whitened) + MEANS[:, None]


def between(one, other):
    """Squared distance of the means of two dense sets, their FID, since their covariances are equal."""
    return ((MEANS[one] - MEANS[other]) ** 2).sum()


@pytest.fixture
def measure(protocol, tmp_path):
    """Measure a pruned model with these features of its images, [sets, N, D]: model -> metric -> value of each set."""

    def measure_features(dense, pruned, processes=None, name="scores"):
        folder, (sets, num_images, _) = tmp_path / name, dense.shape
        folder.mkdir(exist_ok=True)
        own = protocol.model_copy(update={"sets": sets, "num_images": num_images, "kid_subset_size": 4})
        samples = np.zeros((sets, num_images, 1, 1, 1), np.uint8)
        real = torch.from_numpy(DRAWS.standard_normal((10, dense.shape[2]))).float()
        reference = Reference(own, "a" * 64, samples, torch.from_numpy(dense).float(), real)
        files = drawn_files(folder, "pruned", reference)
        files.features.create()
        files.features.write(0, pruned.reshape(-1, pruned.shape[2]))
        measurer = Measurer(reference, {"pruned": files}, folder, processes or Processes(torch.device("cpu")))
        found = measurer.measure(["dense", "pruned"])
        return {model: by_set(np.array(rows)) for model, rows in zip(("dense", "pruned"), found, strict=True)}

    return measure_features


def test_fid_to_dense_of_gaussians_is_the_closed_form(measure):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½): to the same set scale and shift alone, to the next its mean, too."""
    dense = make_features()
    pruned = measure(dense, (dense - MEANS[:, None]) * SCALE + SHIFT + MEANS[:, None])["pruned"]
    spread = ((1 - SCALE) ** 2).sum()
    unpaired = [((MEANS[index] + SHIFT - MEANS[(index + 1) % SETS]) ** 2).sum() + spread for index in range(SETS)]

    assert pruned[FID_DENSE] == pytest.approx([(SHIFT**2).sum() + spread] * SETS, rel=1e-5)
    assert pruned[FID_DENSE_UNPAIRED] == pytest.approx(unpaired, rel=1e-5)


def test_the_floor_compares_different_dense_sets(measure):
    """Set 1 with 2, 2 with 3, and 3 with 1; never a set with itself."""
    floor = measure(make_features(), make_features())["dense"][FID_DENSE_UNPAIRED]

    assert floor == pytest.approx([between(0, 1), between(1, 2), between(2, 0)], rel=1e-5)


@pytest.mark.parametrize("num_images", [IMAGES, FEATURES])
def test_equal_images_have_no_distance(measure, num_images):
    """Paired 0, for the dense model exactly; unpaired the floor, bit for bit; with singular covariances, too."""
    dense = DRAWS.standard_normal((SETS, num_images, FEATURES))
    found = measure(dense, dense)

    assert found["dense"][FID_DENSE] == [0.0] * SETS
    assert found["pruned"][FID_DENSE] == pytest.approx([0.0] * SETS, abs=1e-6)
    assert found["pruned"][FID_DENSE_UNPAIRED] == found["dense"][FID_DENSE_UNPAIRED]


def test_noise_is_paired(measure):
    """Images slightly off the dense model's lie far below the floor, which the unpaired value does not leave."""
    dense = DRAWS.standard_normal((SETS, IMAGES, FEATURES))
    found = measure(dense, dense + 0.05 * DRAWS.standard_normal(dense.shape))
    floor = found["dense"][FID_DENSE_UNPAIRED]

    assert max(found["pruned"][FID_DENSE]) < min(floor) / 3
    assert found["pruned"][FID_DENSE_UNPAIRED] == pytest.approx(floor, rel=0.5)


def test_one_set_has_no_floor(measure):
    """There is no other dense set, so no number is made up; the paired value does not need one."""
    dense = make_features()[:1]
    found = measure(dense, dense + SHIFT)

    assert found["pruned"][FID_DENSE] == pytest.approx([(SHIFT**2).sum()], rel=1e-5)
    assert not any(FID_DENSE_UNPAIRED in metrics for metrics in found.values())


def test_statistics_of_a_set_are_computed_once(measure, monkeypatch):
    """Those of each set, those of all sets of a model, and those of the first dense set again, after the last."""
    counted, compute = [], scores.features_to_statistics
    monkeypatch.setattr(
        scores, "features_to_statistics", lambda features: counted.append(len(features)) or compute(features)
    )
    dense = make_features()
    measure(dense, dense + SHIFT)

    assert counted.count(IMAGES) == 2 * SETS + 1
    assert counted.count(SETS * IMAGES) == 2


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_no_distance(measure, count):
    """Every process finds the dense sets that its own are compared with."""
    dense, pruned = make_features(), make_features()
    (alone,) = run_together(1, lambda processes: measure(dense, pruned, processes, "alone"))
    found = run_together(count, lambda processes: measure(dense, pruned, processes, "shared"))

    for metric in (FID_DENSE, FID_DENSE_UNPAIRED):
        assert [it["pruned"][metric] for it in found] == [alone["pruned"][metric]] * count
