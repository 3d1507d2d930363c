"""Consistency, latency, tables and pictures."""

import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from skimage.metrics import structural_similarity

from stages.artifacts import write_atomically
from stages.diffusion.latency import measure_latencies_ms
from stages.errors import InputError
from stages.evaluate.compare import compare
from stages.evaluate.consistency import check_size, images_to_ssim
from stages.evaluate.pictures import images_to_grid
from stages.evaluate.report import write_report
from stages.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut

DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_ssim_is_that_of_scikit_image(shape):
    """11×11 Gaussian window, σ 1.5, range 255, mean over the pixels whose window lies inside: within 1e-6."""
    left = DRAWS.integers(0, 256, (4, *shape)).astype(np.uint8)
    right = np.clip(left + DRAWS.normal(0, 40, left.shape), 0, 255).astype(np.uint8)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [
        structural_similarity(x.astype(float), y.astype(float), channel_axis=0, **settings)
        for x, y in zip(left, right, strict=True)
    ]

    np.testing.assert_allclose(images_to_ssim(left, right).numpy(), expected, atol=1e-6)


def test_an_image_is_like_itself():
    """SSIM 1 for each pair, whatever the batch."""
    images = DRAWS.integers(0, 256, (3, 1, 16, 16)).astype(np.uint8)

    assert images_to_ssim(images, images, batch_size=2).tolist() == pytest.approx([1.0] * 3)


def test_images_smaller_than_the_window_are_refused():
    """8×8 has no place for an 11×11 window."""
    images = np.zeros((2, 1, 8, 8), np.uint8)

    with pytest.raises(InputError, match="SSIM needs images of at least 11×11, the models draw 8×8"):
        check_size(images)


def test_latency_is_a_time(unet):
    """Positive, one for each model."""
    latencies_ms = measure_latencies_ms({"a": unet, "b": unet}, repeats=3)

    assert list(latencies_ms) == ["a", "b"]
    assert all(0 < value < 10_000 for value in latencies_ms.values())


def test_a_grid_holds_the_images_in_reading_order():
    """The second image stands right of the first, the seventh below it."""
    images = np.arange(48, dtype=np.uint8)[:, None, None, None].repeat(4, axis=2).repeat(4, axis=3)
    grid = images_to_grid(images)[..., 0]

    assert (grid[2, 2], grid[2, 8], grid[8, 2], grid[-3, -3]) == (0, 1, 6, 47)


@pytest.fixture
def comparison(make_unet, scheduler, magnitude, params):
    """A dense and a pruned model, compared on a few images of the digits' size."""
    unet = make_unet(sample_size=16)
    few = {"num_images": 6, "batch_size": 4, "sampler_steps": 2, "kid_subset_size": 4, "latency_repeats": 2}
    real = DRAWS.integers(0, 256, (10, 1, 16, 16)).astype(np.uint8)
    pruned = cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3})))
    return compare({"dense": unet, "pruned": pruned}, scheduler, real, params.evaluate.model_copy(update=few), seed=3)


def test_every_number_stands_beside_its_protocol(comparison):
    """Each model has every metric, the dense one is like itself, and the protocol says under what they were taken."""
    wanted = {"params", "macs", "fid", "kid", "kid_std", "ssim", "ssim_std", "latency_ms"}

    assert set(comparison.metrics) == {"protocol", "dense", "pruned"}
    assert set(comparison.metrics["dense"]) == set(comparison.metrics["pruned"]) == wanted
    assert comparison.metrics["dense"]["ssim"] == pytest.approx(1)
    assert comparison.metrics["pruned"]["macs"] < comparison.metrics["dense"]["macs"]
    protocol = comparison.metrics["protocol"]
    assert (protocol["num_images"], protocol["num_real_images"], protocol["seed"]) == (6, 10, 3)
    assert len(comparison.drawn["dense"]) == 6


def test_the_report_is_there_to_read_and_to_see(comparison, tmp_path):
    """JSON for programs, a table for people, and pictures that open."""
    write_report(comparison, tmp_path)

    assert json.loads((tmp_path / "metrics.json").read_text()) == comparison.metrics
    table = (tmp_path / "results.md").read_text()
    assert table.splitlines()[2].startswith("| dense | ")
    for name in ("dense", "pruned", "summary"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100


def test_the_readme_gets_the_table_between_its_marks(tmp_path, root):
    """And nothing else of it changes; a README without marks is refused."""
    spec = importlib.util.spec_from_file_location("results", root / "docs" / "results.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    report, page, picture = tmp_path / "report", tmp_path / "README.md", tmp_path / "summary.png"
    write_atomically(report / "results.md", b"| new |\n")
    write_atomically(report / "summary.png", b"pixels")
    page.write_text(f"before\n{readme.BEGIN}\n| old |\n{readme.END}\nafter\n")
    arguments = ["--report", str(report), "--readme", str(page), "--picture", str(picture)]

    assert CliRunner().invoke(readme.main, arguments).exit_code == 0
    assert page.read_text() == f"before\n{readme.BEGIN}\n| new |\n\n{readme.END}\nafter\n"
    assert picture.read_bytes() == b"pixels"
    page.write_text("no marks")
    refused = CliRunner().invoke(readme.main, arguments)
    assert refused.exit_code == 1
    assert "lacks the marks" in refused.output
