"""Diagnostics of the importance: heatmap, stability and report."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from stages.importance.calibration import calibrate, calibration_batches
from stages.importance.measure import measure_importance
from stages.importance.report import write_report
from stages.importance.stability import (
    Heatmap,
    compare_rankings,
    evenly_spaced_timesteps,
    measure_diagnostics,
    measure_heatmap,
    measure_stability,
)
from stages.models.groups import Group, find_groups
from stages.models.scores import score_group
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256


@pytest.fixture
def hashed(monkeypatch):
    """Record each hashing of all weights, which still happens."""
    found = []

    def record(tensors):
        found.append(tensors_sha256(tensors))
        return found[-1]

    monkeypatch.setattr("stages.importance.measure.tensors_sha256", record)
    return found


@pytest.fixture
def chosen(params):
    """Importance params with few images and timesteps."""
    report = params.importance.report.model_copy(update={"timesteps": 4, "draws": 3})
    return params.importance.model_copy(update={"stride": 100, "num_images": 4, "report": report, "threshold": 0.0})


def groups_of(*widths):
    """Groups of these widths, without members."""
    return [Group(str(index), width, 1, []) for index, width in enumerate(widths)]


def test_equal_and_reversed_rankings_have_extreme_stability():
    """Spearman 1 and −1, overlap 1 and 0 (closed form)."""
    scores = torch.arange(10).float()

    same = compare_rankings(groups_of(10), [[scores], [scores * 2]])
    assert (same.spearman, same.overlap) == (pytest.approx(1), 1)
    opposite = compare_rankings(groups_of(10), [[scores], [-scores]])
    assert opposite.spearman == pytest.approx(-1)
    assert opposite.overlap == 0


def test_groups_are_weighted_by_width():
    """A group of 30 that agrees and one of 10 that is reversed (closed form)."""
    wide, narrow = torch.arange(30).float(), torch.arange(10).float()

    found = compare_rankings(groups_of(30, 10), [[wide, narrow], [wide, -narrow]])
    assert found.spearman == pytest.approx((30 - 10) / 40)
    assert found.overlap == pytest.approx(30 / 40)


def test_random_rankings_overlap_by_chance():
    """Overlap 0.3 and no correlation."""
    draws = torch.Generator().manual_seed(0)
    scores = [[torch.rand(1000, generator=draws) for _ in range(20)] for _ in range(2)]
    found = compare_rankings(groups_of(*[1000] * 20), scores)

    assert found.overlap == pytest.approx(0.3, abs=0.02)
    assert found.spearman == pytest.approx(0.0, abs=0.02)


def test_cancellation_is_zero_for_one_timestep_and_positive_for_several(unet, scheduler, images, chosen):
    """It is below 1; the contribution of a timestep does not depend on the others."""
    batch = next(calibration_batches(unet, images, chosen, 0))
    single, several = (measure_heatmap(unet, scheduler, batch, steps) for steps in ([100], [100, 500, 900]))

    np.testing.assert_allclose(single.cancellation, 0, atol=1e-6)
    assert ((several.cancellation >= 0) & (several.cancellation < 1)).all()
    assert several.cancellation.max() > 0
    np.testing.assert_allclose(several.contribution[:, 0], single.contribution[:, 0], rtol=1e-5)


def test_diagnostic_timesteps_are_evenly_spaced_over_the_used_ones(unet, scheduler, images, chosen):
    """From the first to the last, without duplicates."""
    importance = calibrate(unet, scheduler, images, chosen, 0)

    assert evenly_spaced_timesteps(importance, 4) == [0, 300, 600, 900]
    assert evenly_spaced_timesteps(importance, 99) == list(range(0, 1000, 100))
    shorter = dataclasses.replace(importance, losses=[importance.losses[0], importance.losses[0][:2]])
    assert evenly_spaced_timesteps(shorter, 4) == [0, 100], "every draw used them"


def test_the_stability_compares_independent_draws_of_one_batch_each(unet, scheduler, images, chosen):
    """Draws of the same images and noise would rank alike; how many the importance itself has does not count."""
    several = chosen.model_copy(update={"batches": 2, "noises": 2})
    one, other = (measure_stability(unet, scheduler, images, given, [0, 500], 2, 0) for given in (chosen, several))

    assert one == other
    assert one.spearman < 0.999


def test_the_stability_is_that_of_the_formula(unet, scheduler, images, chosen):
    """The same draws rank otherwise by another formula."""
    found = [
        measure_stability(unet, scheduler, images, chosen.model_copy(update={"formula": name}), [0, 500], 2, 0)
        for name in ("paper", "diffusers")
    ]

    assert found[0] != found[1]


def test_the_report_has_losses_layers_metrics_and_a_figure(tmp_path, unet, scheduler, images, chosen):
    """One row per timestep and one per layer."""
    chosen = chosen.model_copy(update={"batches": 2, "noises": 2})
    importance = calibrate(unet, scheduler, images, chosen, 0)
    write_report(importance, *measure_diagnostics(importance, unet, scheduler, images, chosen, 0), tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    losses, layers = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("losses.csv", "layers.csv")
    )

    assert len(importance.losses) == 4
    assert [int(row["timestep"]) for row in losses] == list(range(0, 1000, 100))
    assert float(losses[0]["loss"]) == pytest.approx(np.mean([curve[0] for curve in importance.losses]))
    assert "conv_in" in {row["layer"] for row in layers}
    assert set(metrics) == {"timesteps_used", "cancellation", "spearman", "overlap"}
    assert -1 <= metrics["spearman"] <= 1
    assert (tmp_path / "importance.png").stat().st_size > 10_000
    header, *rows = (line.split(",") for line in (tmp_path / "heatmap.csv").read_text().splitlines())
    assert header[0] == "layer"
    sums = {layer: sum(map(float, values)) for layer, *values in rows}
    assert sums == pytest.approx({row["layer"]: float(row["contribution"]) for row in layers})


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_criteria_without_a_loss_have_an_empty_report(tmp_path, unet, scheduler, images, chosen, criterion):
    """The CSV files have only their headers."""
    chosen = chosen.model_copy(update={"criterion": criterion})
    importance = calibrate(unet, scheduler, images, chosen, 0)
    write_report(importance, *measure_diagnostics(importance, unet, scheduler, images, chosen, 0), tmp_path)

    assert json.loads((tmp_path / "metrics.json").read_text()) == {"timesteps_used": 0}
    assert (tmp_path / "losses.csv").read_text() == "timestep,loss\n"
    assert (tmp_path / "layers.csv").read_text() == "layer,contribution,cancellation\n"
    assert (tmp_path / "heatmap.csv").read_text() == "layer\n"


def test_each_batch_is_paired_with_each_noise(unet, images, chosen):
    """Two batches with three noises each: two sets of images and six noise tensors."""
    batches = list(calibration_batches(unet, images, chosen.model_copy(update={"batches": 2, "noises": 3}), 0))

    assert len({batch.images.sum().item() for batch in batches}) == 2
    assert len({batch.noise.sum().item() for batch in batches}) == 6


def test_scores_serve_every_target(unet, scheduler, images, chosen):
    """With one measurement, a smaller target size cuts the channels of a larger one, and more."""
    from stages.prune.params import PruneParams
    from stages.prune.selection import plan_pruning

    importance = calibrate(unet, scheduler, images, chosen, 0)
    small, large = (
        plan_pruning(unet, importance, PruneParams(target={"macs": amount}, order="upfront"))
        for amount in ("80%", "50%")
    )
    assert all(set(a.cut) <= set(b.cut) for a, b in zip(small.groups, large.groups, strict=True))


def test_the_heatmap_has_the_scored_layers(unet, scheduler, images, chosen):
    """One row for each convolution and linear layer."""
    batch = next(calibration_batches(unet, images, chosen, 0))
    heatmap = measure_heatmap(unet, scheduler, batch, [0, 500])
    importance = measure_importance(unet, scheduler, [batch], [0], criterion="taylor", formula="diffusers")

    assert isinstance(heatmap, Heatmap)
    assert set(heatmap.layers) == set(importance.saliency)
    assert heatmap.contribution.shape == (len(heatmap.layers), 2)
    assert float(score_group(find_groups(unet)[0], importance, {}).sum()) > 0


def test_a_model_of_zeros_has_a_report(tmp_path, unet, scheduler, images, chosen):
    """Without stability, since nothing can be ranked, and without cancellation, since nothing contributes."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    importance = calibrate(unet, scheduler, images, chosen, 0)
    heatmap, stability = measure_diagnostics(importance, unet, scheduler, images, chosen, 0)
    write_report(importance, heatmap, stability, tmp_path)

    assert not heatmap.cancellation.any()
    assert "spearman" not in json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "importance.png").is_file()


def test_losses_that_overflow_are_refused(unet, scheduler, images, chosen):
    """The message names the precision to use."""
    with torch.no_grad():
        unet.conv_out.weight.fill_(1e38)

    with pytest.raises(InputError, match="losses or gradients are not finite"):
        calibrate(unet, scheduler, images, chosen, 0)


def test_the_weights_are_hashed_once(unet, scheduler, images, chosen, hashed):
    """For the importance, every timestep of the heatmap and every draw of the stability together."""
    importance = calibrate(unet, scheduler, images, chosen, 0)
    heatmap, stability = measure_diagnostics(importance, unet, scheduler, images, chosen, 0)

    assert hashed == [tensors_sha256(unet.state_dict())] == [importance.model_sha256]
    assert (len(heatmap.timesteps), stability is None) == (4, False)
