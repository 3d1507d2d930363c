"""FID, KID, precision and recall."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from stages.evaluate import neighbours
from stages.evaluate.quality import QualityMetrics
from stages.fetch.data import bundled_digits
from stages.fetch.split import split
from stages.protocol.extractors import Extractor

DRAWS = np.random.default_rng(0)


def test_fid_of_gaussians_is_the_closed_form(protocol):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the samples' own moments, for commuting covariances."""
    left = DRAWS.standard_normal((4000, 4))
    left = (left - left.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(left.T)).T)  # moments exactly 0 and 1
    scale, shift = np.array([1.0, 2.0, 3.0, 0.5]), np.array([0.0, 1.0, -2.0, 0.0])
    quality = QualityMetrics(torch.from_numpy(left * scale + shift), protocol)(torch.from_numpy(left))

    assert quality.fid == pytest.approx(np.sum(shift**2) + np.sum((1 - scale) ** 2), rel=1e-6)


def test_kid_is_the_direct_formula(protocol):
    """The unbiased MMD² with kernel (x·y/d + 1)³, by loops over pairs, when a subset is the whole set."""
    drawn, real = DRAWS.standard_normal((12, 3)), DRAWS.standard_normal((12, 3)) + 0.5
    whole = protocol.model_copy(update={"kid_subsets": 2, "kid_subset_size": 12})
    quality = QualityMetrics(torch.from_numpy(real), whole)(torch.from_numpy(drawn))

    def mean(left, right, *, off_diagonal):
        kernel = [
            (x @ y / 3 + 1) ** 3 for i, x in enumerate(left) for j, y in enumerate(right) if i != j or not off_diagonal
        ]
        return np.mean(kernel)

    expected = mean(drawn, drawn, off_diagonal=True) + mean(real, real, off_diagonal=True)
    expected -= 2 * mean(drawn, real, off_diagonal=False)
    assert quality.kid == pytest.approx(expected, rel=1e-9)


def test_each_set_has_as_many_subsets_of_its_own_as_the_protocol_says(protocol):
    """KID is their mean, and the same again for the same set."""
    drawn, real = (torch.from_numpy(DRAWS.standard_normal((20, 3))) for _ in range(2))
    few, more = (
        QualityMetrics(real, protocol.model_copy(update={"kid_subset_size": 5, "kid_subsets": subsets}))
        for subsets in (1, 2)
    )

    assert len({few(drawn, index).kid for index in range(3)}) == 3
    assert few(drawn, 1).kid == few(drawn, 1).kid != more(drawn, 1).kid


def test_precision_and_recall_are_shares_of_neighbourhoods(protocol):
    """By loops: a point counts that is no farther from some other than that one's k-th neighbour is."""
    drawn, real = DRAWS.standard_normal((30, 2)), DRAWS.standard_normal((40, 2)) + 0.7
    quality = QualityMetrics(torch.from_numpy(real), protocol)(torch.from_numpy(drawn))

    def covered(points, others):
        radii = [sorted(np.linalg.norm(others - other, axis=1))[protocol.neighbours] for other in others]
        hits = [any(np.linalg.norm(point - o) <= r for o, r in zip(others, radii, strict=True)) for point in points]
        return np.mean(hits)

    assert quality.precision == pytest.approx(covered(drawn, real))
    assert quality.recall == pytest.approx(covered(real, drawn))


def test_points_as_far_as_the_neighbour_are_covered(protocol):
    """Sets of the same repeated points cover each other, though no neighbour has any distance."""
    points = torch.from_numpy(DRAWS.standard_normal((6, 3))).repeat(protocol.neighbours + 1, 1)
    quality = QualityMetrics(points, protocol)(points)

    assert (quality.precision, quality.recall) == (1, 1)


def test_the_seed_of_the_protocol_decides_the_halves_of_the_floor(protocol):
    """The same seed gives the same floor, another one another."""
    real = torch.from_numpy(DRAWS.standard_normal((20, 3)))
    one, again, other = (QualityMetrics(real, protocol.model_copy(update={"seed": seed})).floor() for seed in (1, 1, 2))

    assert one == again != other


def test_real_against_real_is_near_nothing_and_noise_is_far(params, protocol):
    """The digits' two splits are close, noise is not; the floor is that of one half against the other."""
    images = split(bundled_digits(), 0.3)
    extractor = Extractor(params.reference.extractor, 100)
    quality_metrics = QualityMetrics(
        extractor.features(images.train), protocol.model_copy(update={"kid_subset_size": 400})
    )
    noise = DRAWS.integers(0, 256, images.heldout.shape).astype(np.uint8)
    near, far = (quality_metrics(extractor.features(side)) for side in (images.heldout, noise))

    assert 10 * near.fid < far.fid
    assert 10 * abs(near.kid) < far.kid
    assert near.precision > 0.7
    assert far.precision < 0.1
    assert 0 < quality_metrics.floor() < far.fid / 10


def test_statistics_are_taken_in_double_precision(protocol):
    """float32 features with a large common offset give what float64 gives for the same values."""
    drawn, real = ((torch.from_numpy(DRAWS.standard_normal((500, 4))) + 1e3).float() for _ in range(2))
    expected = QualityMetrics(real.double(), protocol)(drawn.double())

    assert QualityMetrics(real, protocol)(drawn) == expected
    mean = real.mean(0).double() - drawn.mean(0).double()
    assert expected.fid > float(mean @ mean) / 2


@pytest.mark.parametrize("num_drawn", [30, 500])
def test_precision_and_recall_are_torch_fidelitys(protocol, num_drawn):
    """The same numbers for the same features, those of few points and those of matrix products (reference)."""
    drawn, real = DRAWS.standard_normal((num_drawn, 64)), DRAWS.standard_normal((437, 64)) * 1.1 + 0.05
    sides = [torch.from_numpy(side).float() for side in (drawn, real)]
    quality = QualityMetrics(sides[1], protocol)(sides[0])
    expected = prc_features_to_metric(
        *(side.double() for side in sides),
        prc_neighborhood=protocol.neighbours,
        prc_batch_size=10_000,
        save_cpu_ram=True,
        verbose=False,
    )

    assert (quality.precision, quality.recall) == (expected[KEY_METRIC_PRECISION], expected[KEY_METRIC_RECALL])
    assert 0 < quality.precision < 1
    assert 0 < quality.recall < 1


def test_neighbours_among_the_real_images_are_searched_once(protocol, monkeypatch):
    """For three sets, distances of drawn to drawn and of drawn to real thrice, of real to real once."""
    drawn, real = (torch.from_numpy(DRAWS.standard_normal((count, 4))) for count in (30, 40))
    pairs, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda x, y: pairs.append((len(x), len(y))) or cdist(x, y))
    metrics = QualityMetrics(real, protocol)
    qualities = [metrics(drawn, index) for index in range(3)]

    assert pairs.count((40, 40)) == 1
    assert [pairs.count(pair) for pair in ((30, 30), (30, 40), (40, 30))] == [3, 3, 3]
    assert len({(quality.precision, quality.recall) for quality in qualities}) == 1


def test_blocks_of_distances_change_no_share(protocol, monkeypatch):
    """Seven points at a time, and others eleven at a time, cover what all at once cover."""
    drawn, real = (torch.from_numpy(DRAWS.standard_normal((count, 4))) for count in (30, 40))
    whole = QualityMetrics(real, protocol)(drawn)
    monkeypatch.setattr(neighbours, "AT_ONCE", 11)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 7 * 8 * 40)

    assert [len(rows) for rows in neighbours.row_blocks(30, 40)] == [7, 7, 7, 7, 2]
    assert QualityMetrics(real, protocol)(drawn) == whole
