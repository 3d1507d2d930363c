"""How far the importance can be trusted."""

import csv
import json

import numpy as np
import pytest
import torch

from stages.importance.calibration import calibrate, draw_calibration
from stages.importance.measure import measure_importance
from stages.importance.report import write_report
from stages.importance.stability import Heat, compare_rankings, measure_heat, measure_reliability, spaced
from stages.models.groups import Group, find_groups
from stages.models.scores import score_group
from stages.runtime.errors import InputError


@pytest.fixture
def chosen(params):
    """Few images and timesteps."""
    report = params.importance.report.model_copy(update={"timesteps": 4, "draws": 3})
    return params.importance.model_copy(update={"stride": 100, "num_images": 4, "report": report, "threshold": 0.0})


def groups_of(*widths):
    """Groups of these widths."""
    return [Group(str(index), width, 1, []) for index, width in enumerate(widths)]


def test_equal_rankings_agree_wholly_and_reversed_ones_not_at_all():
    """Spearman 1 and −1; the lowest 30 % the same and disjoint."""
    scores = torch.arange(10).float()

    same = compare_rankings(groups_of(10), [[scores], [scores * 2]])
    assert (same.spearman, same.overlap) == (pytest.approx(1), 1)
    opposite = compare_rankings(groups_of(10), [[scores], [-scores]])
    assert opposite.spearman == pytest.approx(-1)
    assert opposite.overlap == 0


def test_wide_groups_weigh_more():
    """The mean is over channels: one group of 30 that agrees, one of 10 that does not."""
    wide, narrow = torch.arange(30).float(), torch.arange(10).float()

    found = compare_rankings(groups_of(30, 10), [[wide, narrow], [wide, -narrow]])
    assert found.spearman == pytest.approx((30 - 10) / 40)
    assert found.overlap == pytest.approx(30 / 40)


def test_random_rankings_overlap_by_chance():
    """Three in ten, and no correlation."""
    draws = torch.Generator().manual_seed(0)
    scores = [[torch.rand(1000, generator=draws) for _ in range(20)] for _ in range(2)]
    found = compare_rankings(groups_of(*[1000] * 20), scores)

    assert found.overlap == pytest.approx(0.3, abs=0.02)
    assert found.spearman == pytest.approx(0.0, abs=0.02)


def test_one_timestep_cancels_nothing_and_opposite_ones_all(unet, scheduler, images, chosen):
    """A share between 0 and 1, 0 for a single timestep; contributions are those of the timesteps alone."""
    draw = next(draw_calibration(unet, images, chosen, 0))
    single, several = (measure_heat(unet, scheduler, draw, steps) for steps in ([100], [100, 500, 900]))

    np.testing.assert_allclose(single.cancellation, 0, atol=1e-6)
    assert ((several.cancellation >= 0) & (several.cancellation < 1)).all()
    assert several.cancellation.max() > 0
    np.testing.assert_allclose(several.contribution[:, 0], single.contribution[:, 0], rtol=1e-5)


def test_timesteps_are_spread_over_those_that_counted(unet, scheduler, images, chosen):
    """From the first to the last, none twice."""
    importance = calibrate(unet, scheduler, images, chosen, 0)

    assert spaced(importance, 4) == [0, 300, 600, 900]
    assert spaced(importance, 99) == list(range(0, 1000, 100))


def test_the_report_holds_curves_layers_figures_and_a_picture(tmp_path, unet, scheduler, images, chosen):
    """One row a timestep, one a layer; everything that DVC and MLflow show."""
    chosen = chosen.model_copy(update={"batches": 2, "noises": 2})
    importance = calibrate(unet, scheduler, images, chosen, 0)
    write_report(importance, *measure_reliability(importance, unet, scheduler, images, chosen, 0), tmp_path)
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


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_what_looks_at_no_loss_has_a_report_too(tmp_path, unet, scheduler, images, chosen, criterion):
    """An empty one: nothing was drawn, nothing can vary."""
    chosen = chosen.model_copy(update={"criterion": criterion})
    importance = calibrate(unet, scheduler, images, chosen, 0)
    write_report(importance, *measure_reliability(importance, unet, scheduler, images, chosen, 0), tmp_path)

    assert json.loads((tmp_path / "metrics.json").read_text()) == {"timesteps_used": 0}
    assert (tmp_path / "losses.csv").read_text() == "timestep,loss\n"


def test_several_batches_are_several_draws(unet, images, chosen):
    """Two batches under three noises each: two sets of images, six of noise, one at a time."""
    draws = list(draw_calibration(unet, images, chosen.model_copy(update={"batches": 2, "noises": 3}), 0))

    assert len({draw.images.sum().item() for draw in draws}) == 2
    assert len({draw.noise.sum().item() for draw in draws}) == 6


def test_scores_serve_every_target(unet, scheduler, images, chosen):
    """One measurement ranks the channels once; a bigger target cuts what a smaller one cuts, and more."""
    from stages.prune.params import PruneParams
    from stages.prune.selection import plan_pruning

    importance = calibrate(unet, scheduler, images, chosen, 0)
    small, large = (
        plan_pruning(unet, importance, PruneParams(target={"macs": amount}, order="upfront"))
        for amount in ("80%", "50%")
    )
    assert all(set(a.cut) <= set(b.cut) for a, b in zip(small.groups, large.groups, strict=True))


def test_heat_is_of_layers_that_are_scored(unet, scheduler, images, chosen):
    """Convolutions and linear layers, in the order of the model."""
    draw = next(draw_calibration(unet, images, chosen, 0))
    heat = measure_heat(unet, scheduler, draw, [0, 500])
    importance = measure_importance(unet, scheduler, [draw], [0], criterion="taylor", formula="diffusers")

    assert isinstance(heat, Heat)
    assert set(heat.layers) == set(importance.saliency)
    assert heat.contribution.shape == (len(heat.layers), 2)
    assert float(score_group(find_groups(unet)[0], importance, {}).sum()) > 0


def test_a_model_of_zeros_has_a_report(tmp_path, unet, scheduler, images, chosen):
    """Nothing contributes, nothing can be ranked; the picture is drawn all the same."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    importance = calibrate(unet, scheduler, images, chosen, 0)
    write_report(importance, *measure_reliability(importance, unet, scheduler, images, chosen, 0), tmp_path)

    assert "spearman" not in json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "importance.png").is_file()


def test_losses_that_overflow_are_refused(unet, scheduler, images, chosen):
    """Before anything is written."""
    with torch.no_grad():
        unet.conv_out.weight.fill_(1e38)

    with pytest.raises(InputError, match="losses or gradients are not finite"):
        calibrate(unet, scheduler, images, chosen, 0)
