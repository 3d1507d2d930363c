"""Each stage on a GPU against the CPU, on a tiny model; every test also runs on the CPU alone."""

import numpy as np
import pytest

from stages.models.complexity import weights_bytes
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet
from stages.models.saliency import read_importance
from stages.protocol.costs import read_costs
from stages.protocol.evaluation import METRICS, read_evaluation
from stages.protocol.reference import read_reference
from stages.storage.files import read_json
from tests.gpu.commands import MODELS, UPDATES, contents, gap, steps_between, weights

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
slow_on_the_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.e2e), CUDA])

SUMS = 1e-4
"""Relative error of a loss, a feature, a saliency or a corrected weight. Each device adds in its own order: the CPU
with and without oneDNN differs by 3e-7, and a GPU may transform convolutions, which costs a digit or two."""
LEVELS = 1
"""Levels of 255 between pixels: an error of 1e-6, times the 160 by which the first step scales it, lies far below one
level, and moves a pixel across the edge between two."""
LEVELS_SHARE = 0.02
"""Share of the pixels that may lie on such an edge."""
DRAWN = 0.01
"""Relative error of a feature or metric of drawn images, whose pixels may differ by a level here and there; metrics
below 0.01 may differ by 1e-4."""


def compare(commands, stage, device):
    """Run a stage twice on a device, which repeats every bit, and on the CPU; returns the folders of CPU and device."""
    found, again = commands.run(stage, device), commands.run(stage, device)
    assert contents(found) == contents(again)
    return again if device == "cpu" else commands.run(stage, "cpu"), found


@slow_on_the_cpu
def test_importance(commands, device):
    """The same timesteps count; losses and saliencies agree."""
    expected, found = (read_importance(folder / "out") for folder in compare(commands, "importance", device))

    assert len(expected.losses[0]) > 1
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=SUMS)
    assert gap(found.saliency, expected.saliency) < SUMS


@slow_on_the_cpu
def test_reference(commands, device):
    """Images differ by a level here and there, features of real images by rounding."""
    expected, found = (read_reference(folder / "out") for folder in compare(commands, "reference", device))
    differences = np.abs(found.samples.astype(int) - expected.samples)

    assert found.protocol.id == expected.protocol.id
    assert expected.samples.std() > 1
    assert differences.max() <= LEVELS
    assert (differences > 0).mean() < LEVELS_SHARE
    assert gap({"real": found.real_features}, {"real": expected.real_features}) < SUMS
    assert gap({"dense": found.features}, {"dense": expected.features}) < DRAWN


@on_each_device
def test_prune_and_compensate(commands, device):
    """The same channels go, and the corrected weights agree."""
    expected, found = compare(commands, "prune", device)

    assert read_json(found / "out" / PLAN) == read_json(expected / "out" / PLAN)
    assert gap(weights(found / "out"), weights(expected / "out")) < SUMS
    assert gap(weights(expected / "out"), weights(commands.folder / "pruned")) > 100 * SUMS  # compensation took place


@slow_on_the_cpu
def test_finetune(commands, device):
    """Losses agree, and so does the way that the weights went."""
    expected, found = compare(commands, "finetune", device)
    ways = [steps_between(commands.folder / "pruned", folder / "out") for folder in (found, expected)]
    curves = [np.genfromtxt(folder / "report" / "curve.csv", delimiter=",", names=True) for folder in (found, expected)]

    assert gap(*ways) < UPDATES
    assert curves[0]["heldout_loss"] == pytest.approx(curves[1]["heldout_loss"], rel=10 * SUMS)


@slow_on_the_cpu
def test_evaluate(commands, device):
    """Metrics of the images in the reference are the same numbers, those of images drawn anew agree."""
    commands.run("reference", "cpu").joinpath("out").rename(commands.folder / "reference")
    expected, found = (read_evaluation(folder / "report") for folder in compare(commands, "evaluate", device))

    assert found.protocol_id == expected.protocol_id
    for name, model in expected.models.items():
        tolerance = SUMS if name == "dense" else DRAWN
        for metric in METRICS:
            values = found.models[name].metric(metric).sets
            assert values == pytest.approx(model.metric(metric).sets, rel=tolerance, abs=1e-4), (name, metric)


@slow_on_the_cpu
def test_costs(commands, device):
    """Every setting is timed on the device; memory holds the weights at least, and grows with the batch."""
    expected, found = (read_costs(commands.run("costs", where) / "report").costs for where in ("cpu", device))
    sizes = {name: weights_bytes(read_unet(commands.folder / name)) for name in MODELS}

    assert [(row.model, row.batch, row.left_out) for row in found] == [(it.model, it.batch, "") for it in expected]
    assert all(row.median_ms > 0 for row in found)
    assert {row.device for row in found} != {""}
    for name, size in sizes.items():
        one, many = (row.peak_bytes for row in found if row.model == name)
        counted = [row.peak_bytes for row in expected if row.model == name]
        assert size < one < many
        assert many > counted[1] / 2  # what the CPU counts are live tensors; a GPU adds scratch memory, and fuses some
