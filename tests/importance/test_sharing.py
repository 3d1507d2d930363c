"""The importance on several processes: the bits of one."""

import copy

import numpy as np
import pytest
import torch

from stages.importance.calibration import calibrate
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.importance.ordered_sum import OrderedSum
from stages.importance.stability import measure_diagnostics
from stages.runtime.processes import Processes
from tests.together import run_together

DRAWS = torch.Generator().manual_seed(0)
BATCHES = [CalibrationBatch(*torch.randn(2, 2, 1, 8, 8, generator=DRAWS)) for _ in range(2)]
STEPS = range(0, 1000, 150)


def test_a_sum_is_added_in_one_order():
    """1e8 + 1 − 1e8 depends on the order in float32; several processes give what one gives, over several rounds."""
    values = torch.tensor([1e8, 1.0, -1e8, 3.0, 1e-3, -7.0, 1e8, 1e-4])
    expected = torch.zeros(())
    for value in values:
        expected = expected + value

    def add(processes):
        total = OrderedSum(processes)
        for start in range(0, len(values), processes.count):
            own = values[start : start + processes.count][processes.index :][:1]
            total.add([own.clone()], range(len(values[start : start + processes.count])))
        return total.result([torch.zeros(1)])[0].item()

    for count in (1, 2, 3):
        assert run_together(count, add) == [expected.item()] * count


@pytest.mark.parametrize(
    ("criterion", "timesteps_per_pass", "count"),
    [("taylor", 1, 2), ("diff-pruning", 3, 2), ("no-cancel-taylor", 1, 3), ("fisher", 1, 3), ("snr-taylor", 1, 3)],
)
def test_the_number_of_processes_changes_no_bit(unet, scheduler, criterion, timesteps_per_pass, count):
    """Of saliencies and losses, on every process, for two batches and seven timesteps."""
    chosen = {"criterion": criterion, "formula": "paper", "threshold": 0.0, "timesteps_per_pass": timesteps_per_pass}

    def measure(processes):
        model = copy.deepcopy(unet)
        return measure_importance(model, scheduler, BATCHES, STEPS, **chosen, label=None, processes=processes)

    (alone,) = run_together(1, measure)
    assert any(values.abs().sum() > 0 for values in alone.saliency.values())
    for found in run_together(count, measure):
        assert found.losses == alone.losses
        assert found.saliency.keys() == alone.saliency.keys()
        assert all(torch.equal(values, alone.saliency[name]) for name, values in found.saliency.items())


@pytest.mark.parametrize("formula", ["paper", "diffusers"])
def test_the_sum_ends_at_the_same_timestep(unet, scheduler, formula):
    """Timesteps that another process has computed beyond the threshold are left out."""
    losses = measure_importance(
        unet, scheduler, BATCHES, STEPS, criterion="taylor", formula=formula, label=None
    ).losses[0]
    threshold = min(loss / max(losses[: index + 1]) for index, loss in enumerate(losses)) + 1e-6

    def measure(processes):
        chosen = {"criterion": "diff-pruning", "formula": formula, "threshold": threshold}
        model = copy.deepcopy(unet)
        return measure_importance(model, scheduler, BATCHES, STEPS, **chosen, label=None, processes=processes)

    (alone,) = run_together(1, measure)
    assert 0 < len(alone.losses[0]) < len(STEPS)
    for found in run_together(3, measure):
        assert found.losses == alone.losses
        assert all(torch.equal(values, alone.saliency[name]) for name, values in found.saliency.items())


def test_calibration_and_diagnostics_are_those_of_one_process(unet, scheduler, images, params):
    """Also with more processes than timesteps."""
    chosen = params.importance.model_copy(update={"num_images": 2, "num_timesteps": 3, "stride": 100, "threshold": 0.0})

    def measure(processes):
        model = copy.deepcopy(unet)
        importance = calibrate(model, scheduler, images, chosen, 0, processes)
        return importance, *measure_diagnostics(importance, model, scheduler, images, chosen, 0, processes)

    ((importance, heat, stability),) = run_together(1, measure)
    for found, found_heat, found_stability in run_together(4, measure):
        assert all(torch.equal(values, importance.saliency[name]) for name, values in found.saliency.items())
        assert np.array_equal(found_heat.contribution, heat.contribution)
        assert np.array_equal(found_heat.cancellation, heat.cancellation)
        assert found_stability == stability


def test_items_are_shared_without_rest():
    """Each item has one process, whatever was shared before; no process has two more than another."""
    for count in (1, 2, 3):
        for before in range(4):
            shares = [share(index, count, before) for index in range(count)]

            assert sorted(item for items in shares for item in items) == list(range(7))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert 0 in shares[before % count]


def share(index, count, before):
    """Return the share of one of several processes."""
    processes = Processes(torch.device("cpu"))
    processes.index, processes.count = index, count
    return list(processes.share(range(7), before))
