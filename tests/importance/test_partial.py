"""An importance that was stopped goes on from its last file."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stages.data.images import write_images
from stages.importance.folders import _open_partial
from stages.importance.measure import CalibrationBatch, _Measurement, measure_importance
from stages.importance.partial import METADATA_KEY, PartialSum, Position
from stages.models.pipeline import write_pipeline
from stages.storage.tensors import read_metadata

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [CalibrationBatch(X, NOISE), CalibrationBatch(NOISE, X)]
STEPS = range(0, 1000, 250)


@pytest.fixture
def measure(unet, scheduler, monkeypatch):
    """Measure on two batches, ended by Ctrl-C in a pass if one is given; returns the importance and its passes."""
    monkeypatch.setattr(PartialSum, "is_due", True)
    forward = _Measurement.forward

    def run(criterion, partial=None, stop=None, each=1):
        taken = []

        def count(self, *arguments):
            taken.append(None)
            if len(taken) == stop:
                raise KeyboardInterrupt
            return forward(self, *arguments)

        monkeypatch.setattr(_Measurement, "forward", count)
        given = {"criterion": criterion, "formula": "paper", "timesteps_per_pass": each, "label": None}
        return measure_importance(unet, scheduler, BATCHES, STEPS, partial=partial, **given), len(taken)

    return run


@pytest.mark.parametrize(("each", "stop"), [(1, 2), (1, 5), (1, 7), (2, 2)])
@pytest.mark.parametrize("criterion", ["diff-pruning", "no-cancel-taylor"])
def test_a_stopped_measurement_goes_on_to_the_same_bits(measure, tmp_path, criterion, each, stop):
    """Within a batch and between two, for sums of gradients and of saliencies; no pass is taken twice."""
    path = tmp_path / "checkpoints" / "sum.safetensors"
    whole, total = measure(criterion, each=each)
    with pytest.raises(KeyboardInterrupt):
        measure(criterion, PartialSum(path), stop, each)
    partial = PartialSum(path)
    resumed, left = measure(criterion, partial, each=each)

    assert left == total - (stop - 1)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.saliency[name], values) for name, values in whole.saliency.items())
    partial.clear()
    assert not path.exists()


def test_a_damaged_file_begins_again(measure, tmp_path, capsys):
    """With a warning, and to the same result."""
    path = tmp_path / "sum.safetensors"
    whole, total = measure("diff-pruning")
    path.write_bytes(b"damaged")
    again, taken = measure("diff-pruning", PartialSum(path))

    assert (again.losses, taken) == (whole.losses, total)
    assert "is damaged; this measurement begins again" in capsys.readouterr().err


def test_a_file_holds_its_position_with_every_digit(tmp_path):
    """Losses decide where a sum ends."""
    position = Position(losses=[[0.1, 1 / 3]], used=[2 / 3], largest=2 / 3, rounds=1)
    partial = PartialSum(tmp_path / "sum.safetensors")
    partial.write(position, {"a": torch.ones(2)})

    assert METADATA_KEY in read_metadata(tmp_path / "sum.safetensors")
    assert partial.read()[0] == position
    assert not partial.is_due


@pytest.mark.parametrize("is_main", [True, False])
def test_several_processes_say_that_they_keep_no_sum(tmp_path, params, capsys, is_main):
    """In one line of the main process, since each has a part of the sum alone; nothing is kept."""
    together = SimpleNamespace(count=2, is_main=is_main)
    partial = _open_partial(tmp_path, tmp_path, params.importance, 0, together)

    assert partial.path is None
    assert capsys.readouterr().err.splitlines() == [
        "2 processes share the timesteps; if they are stopped, they begin again"
    ] * int(is_main)


def test_a_sum_is_that_of_its_labels(unet, scheduler, latents, params, tmp_path):
    """dataset.json has the hash of the images alone."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    names = set()
    for shift in (0, 0, 1):
        (tmp_path / "data").mkdir(exist_ok=True)
        train = (latents.conditions.train + shift) % 4
        write_images(tmp_path / "data", replace(latents, conditions=replace(latents.conditions, train=train)), {})
        one = SimpleNamespace(count=1, is_main=True)
        names.add(_open_partial(tmp_path / "model", tmp_path / "data", params.importance, 0, one).path)

    assert len(names) == 2
