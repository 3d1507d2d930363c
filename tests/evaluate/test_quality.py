"""FID and KID."""

import os
import pickle

import numpy as np
import pytest
import torch

from stages.errors import InputError
from stages.evaluate.compare import check_protocol
from stages.evaluate.quality import features_to_quality, images_to_features
from stages.fetch.data import bundled_digits, split

DRAWS = np.random.default_rng(0)


def test_fid_of_gaussians_is_the_closed_form(params):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the samples' own moments, for commuting covariances."""
    left = DRAWS.standard_normal((4000, 4))
    left = (left - left.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(left.T)).T)  # moments exactly 0 and 1
    scale, shift = np.array([1.0, 2.0, 3.0, 0.5]), np.array([0.0, 1.0, -2.0, 0.0])
    quality = features_to_quality(
        torch.from_numpy(left), torch.from_numpy(left * scale + shift), params.evaluate, seed=0
    )

    assert quality.fid == pytest.approx(np.sum(shift**2) + np.sum((1 - scale) ** 2), rel=1e-6)


def test_kid_is_the_direct_formula(params):
    """The unbiased MMD² with kernel (x·y/d + 1)³, by loops over pairs, when a subset is the whole set."""
    drawn, real = DRAWS.standard_normal((12, 3)), DRAWS.standard_normal((12, 3)) + 0.5
    whole = params.evaluate.model_copy(update={"kid_subsets": 2, "kid_subset_size": 12})
    quality = features_to_quality(torch.from_numpy(drawn), torch.from_numpy(real), whole, seed=0)

    def mean(left, right, *, off_diagonal):
        kernel = [
            (x @ y / 3 + 1) ** 3 for i, x in enumerate(left) for j, y in enumerate(right) if i != j or not off_diagonal
        ]
        return np.mean(kernel)

    expected = mean(drawn, drawn, off_diagonal=True) + mean(real, real, off_diagonal=True)
    expected -= 2 * mean(drawn, real, off_diagonal=False)
    assert quality.kid == pytest.approx(expected, rel=1e-9)
    assert quality.kid_std == pytest.approx(0, abs=1e-9)


def test_real_against_real_is_near_nothing_and_noise_is_far(params):
    """The digits' two splits are close, noise is not; the extractor sees what people see."""
    images = split(bundled_digits(), 0.3)
    few = params.evaluate.model_copy(update={"kid_subset_size": 400})
    real = images_to_features(images.train, few)
    noise = DRAWS.integers(0, 256, images.heldout.shape).astype(np.uint8)
    near, far = (features_to_quality(images_to_features(side, few), real, few, 0) for side in (images.heldout, noise))

    assert 10 * near.fid < far.fid
    assert 10 * abs(near.kid) < far.kid


def test_features_do_not_depend_on_the_batch(params):
    """1, 7 and 64 images at a time give the same features."""
    images = bundled_digits()[:20]
    sizes = [params.evaluate.model_copy(update={"batch_size": size}) for size in (1, 7, 64)]
    features = [images_to_features(images, size) for size in sizes]

    assert features[0].dtype == torch.float64
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features[0], features[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({}, (100, 1, 16, 16), r"kid_subset_size 500 is more than the 100 real images"),
        ({}, (600, 1, 8, 8), r"SSIM needs images of at least 11×11"),
        ({"sampler_steps": 600}, (600, 1, 16, 16), r"sampler_steps 600 does not divide the 1000 timesteps"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused(params, scheduler, changes, shape, words):
    """Before anything is drawn, with the numbers and the key to change."""
    with pytest.raises(InputError, match=words):
        check_protocol(scheduler, np.zeros(shape, np.uint8), params.evaluate.model_copy(update=changes))


def test_images_that_the_extractor_does_not_see_are_refused(params):
    """Colour pictures are no digits."""
    with pytest.raises(InputError, match="sees 1×16×16 images, these are 3×16×16; choose evaluate"):
        images_to_features(np.zeros((2, 3, 16, 16), np.uint8), params.evaluate)


def test_weights_that_run_code_are_never_unpickled(params, tmp_path):
    """A file that would run a command when opened is refused, and the command does not run."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "inception.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    inception = {"extractor": "inception-v3-compat", "extractor_weights": tmp_path / "inception.pth"}

    with pytest.raises(InputError, match="the extractor's weights are not at"):
        images_to_features(np.zeros((2, 3, 32, 32), np.uint8), params.evaluate.model_copy(update=inception))
    assert not (tmp_path / "ran").exists()


def test_missing_inception_weights_are_named(params, tmp_path):
    """With the path that was tried, in one line."""
    absent = {"extractor": "inception-v3-compat", "extractor_weights": tmp_path / "inception.pth"}
    inception = params.evaluate.model_copy(update=absent)

    with pytest.raises(InputError, match=r"the extractor's weights are not at .*inception\.pth") as caught:
        images_to_features(bundled_digits()[:2], inception)
    assert "\n" not in caught.value.message
