"""espalier grid: cells from the same noise, kept once they are finished, and what is refused."""

import csv
import json
import threading

import numpy as np
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from stages.evaluate.consistency import images_to_ssim
from stages.evaluate.quality import features_to_statistics, frechet_distance
from stages.grid import cells, report
from stages.grid.grid import hold_store
from stages.grid.params import GridParams
from stages.grid.settings import Setting, make_settings
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.sampling import draw, image_seeds
from stages.protocol.extractors import Extractor
from stages.protocol.grid import read_grid
from stages.protocol.params import ExtractorParams
from stages.protocol.reference import read_reference
from stages.report.grid_figure import PLOTS
from stages.storage.files import read_json, write_json
from tests.few_images import FEW_IMAGES
from tests.orchestra import until

STEPS = ("--steps", "2,4")
original = cells.draw_set


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    """Leave the figures out, which take seconds; test_grid_text.py draws them."""
    nothing = {name: {"light": b"", "dark": b""} for name in PLOTS}
    monkeypatch.setattr(report, "draw_grid_figures", lambda _: nothing)
    monkeypatch.setattr(report, "draw_figure", lambda *_: b"")


def test_a_grid_is_measured_once_and_shown(write_project, grid, tmp_path, monkeypatch):
    """Every model at every setting; a second call draws nothing, and a larger one only what is new."""
    write_project()
    first = grid(*STEPS)
    assert first.exit_code == 0, first.output
    record = read_grid(tmp_path / "reports/grid")
    drawn = []
    monkeypatch.setattr(cells, "draw_set", lambda *given: drawn.append(given[5]) or original(*given))
    again = grid(*STEPS)

    assert [(cell.model, cell.steps) for cell in record.cells] == [
        (name, steps) for steps in (2, 4) for name in ("dense", "finetuned")
    ]
    assert "4 cells, 0 of them measured before" in first.output
    assert "about 0 s left" in first.output
    assert "4 cells, 4 of them measured before" in again.output
    assert drawn == []
    assert read_grid(tmp_path / "reports/grid") == record
    more = grid("--steps", "2,4", "--model", "finetuned", "--model", "pruned")
    assert more.exit_code == 0, more.output
    assert {label.split(",")[0] for label in drawn} == {"pruned"}
    assert {path.name for path in (tmp_path / "reports/grid").iterdir()} >= {
        *("grid.csv", "grid.json", "fid.svg", "fid.png", "ssim.svg", "index.html", "table.md", "run.json")
    }
    with (tmp_path / "reports/grid/grid.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "By FID, best are dense with" in (tmp_path / "reports/grid/index.html").read_text()


def test_a_metric_stands_beside_the_dense_models_at_the_same_setting(write_project, grid, tmp_path):
    """The difference is given of those that measure one model, and not of distances from the dense one."""
    write_project()
    assert grid("--steps", "2,5").exit_code == 0
    record = read_grid(tmp_path / "reports/grid")
    for dense, finetuned in zip(record.of("dense"), record.of("finetuned"), strict=True):
        apart = {name: metric.above_dense for name, metric in finetuned.metrics.items()}
        alone = {name for name, difference in apart.items() if difference is None}

        assert alone == {"ssim", "fid_dense", "ssim_protocol"}
        for name in apart.keys() - alone:
            assert apart[name].mean == pytest.approx(finetuned.metrics[name].mean - dense.metrics[name].mean)


def test_pairs_start_from_the_same_noise(write_project, grid, tmp_path):
    """SSIM and FID to dense at a setting are those of images drawn by hand from the seeds of the protocol."""
    write_project()
    assert grid("--steps", "2").exit_code == 0
    found = {cell.model: cell.metrics for cell in read_grid(tmp_path / "reports/grid").cells}
    reference = read_reference(tmp_path / "artifacts/reference")
    folder = tmp_path / "artifacts/pretrained"
    extractor = Extractor(ExtractorParams(**FEW_IMAGES["extractor"]), 8)
    for index in range(2):
        images = {}
        for name in ("pretrained", "finetuned"):
            unet, seeds = read_unet(tmp_path / "artifacts" / name), image_seeds(reference.protocol.seed, 8, index)
            sampler = SamplerParams(steps=2)
            images[name] = draw(unet, read_scheduler(folder), seeds, sampler, batch_size=8, label="x")
        by_setting = images_to_ssim(images["finetuned"], images["pretrained"]).mean()
        by_protocol = images_to_ssim(images["pretrained"], reference.samples[index]).mean()
        statistics = [features_to_statistics(extractor.features(drawn)) for drawn in images.values()]

        assert found["finetuned"]["ssim"].sets[index] == pytest.approx(by_setting)
        assert found["finetuned"]["fid_dense"].sets[index] == pytest.approx(frechet_distance(*statistics))
        assert found["dense"]["ssim_protocol"].sets[index] == pytest.approx(by_protocol)


def test_the_protocols_own_setting_is_that_of_the_reference(write_project, grid, tmp_path, monkeypatch):
    """Its dense images are not drawn again: SSIM 1, and the same protocol id."""
    write_project()
    drawn = []
    monkeypatch.setattr(cells, "draw_set", lambda *given: drawn.append(given[5]) or original(*given))
    assert grid("--steps", "4").exit_code == 0
    record = read_grid(tmp_path / "reports/grid")
    dense = record.of("dense")[0]

    assert {label.split(",")[0] for label in drawn} == {"finetuned"}
    assert dense.protocol_id == record.protocol_id == read_reference(tmp_path / "artifacts/reference").protocol.id
    assert dense.metrics["ssim_protocol"].sets == [1, 1]


def test_a_stopped_grid_goes_on(write_project, grid, tmp_path, monkeypatch):
    """What stopped in the third cell repeats the first two not, and ends with the same numbers."""
    write_project()
    drawn = []

    def stop(*given):
        drawn.append(given[5])
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(cells, "draw_set", stop)
    assert grid("--steps", "2,5").exit_code != 0
    assert not (tmp_path / "reports/grid").exists()
    resumed = grid("--steps", "2,5")
    labels = [label.rpartition(", cell")[0] for label in drawn]

    assert "4 cells, 2 of them measured before" in resumed.output
    assert [labels.count(label) for label in dict.fromkeys(labels)] == [2, 2, 3, 2]
    record = read_grid(tmp_path / "reports/grid")
    whole = grid("--steps", "2,5", "--store", "other", "--out", "whole")
    assert whole.exit_code == 0, whole.output
    assert read_grid(tmp_path / "whole") == record


def test_other_weights_and_packages_are_other_cells(write_project, grid, tmp_path, monkeypatch):
    """Of a model that was pruned anew, the dense one's images are used again; other packages may draw others."""
    write_project()
    assert grid("--steps", "2").exit_code == 0
    (tmp_path / "artifacts/pruned").rename(tmp_path / "artifacts/other")
    (tmp_path / "artifacts/finetuned").rename(tmp_path / "artifacts/pruned")
    (tmp_path / "artifacts/other").rename(tmp_path / "artifacts/finetuned")

    assert "2 cells, 1 of them measured before" in grid("--steps", "2").output
    monkeypatch.setattr(cells, "version", lambda _: "0")
    assert "2 cells, 0 of them measured before" in grid("--steps", "2").output


def test_guidance_is_a_row_of_a_conditional_model(write_project, grid, tmp_path):
    """Each scale has other images and, above 1, two predictions for a step; those of the reference have none."""
    write_project(classes=4)
    result = grid("--steps", "4", "--guidance", "1,3", "--sets", "1")
    assert result.exit_code == 0, result.output
    record = read_grid(tmp_path / "reports/grid")
    one, three = record.of("finetuned")

    assert (one.calls, three.calls, three.macs) == (4, 8, 2 * one.macs)
    assert [cell.metrics["ssim_protocol"].mean == 1 for cell in record.of("dense")] == [True, False]
    assert one.metrics["fid"].mean != three.metrics["fid"].mean
    assert one.metrics["fid"].half_width is None
    assert one.protocol_id != three.protocol_id
    assert "with one set there are no intervals" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "1,2"], "grid.guidance is 1.0, and artifacts/pretrained takes no conditions; set it to null"),
        (["--steps", "3"], "grid.steps 3 does not divide the 1000 timesteps of the model"),
        (["--steps", "2,2"], "steps names a value twice"),
        (["--steps", "x"], "grid.steps.0 is 'x'"),
        (["--sampler", "DDIMM"], "grid.samplers.0.scheduler is 'DDIMM': input should be 'DDIM'"),
        (["--sampler", "PNDM:quadratic"], "scheduler PNDM has neither eta nor spacing quadratic"),
        (["--model", "dense"], "grid.models.0 is 'dense': input should be 'pruned' or 'finetuned'"),
        (["--num-images", "9"], "grid.num_images 9 is more than the 8 of the reference"),
        (["--num-images", "2"], "grid.num_images 2 is not more than reference.neighbours 2"),
        (["--sets", "3"], "grid.sets 3 is more than the 2 of the reference"),
        (["--out", "artifacts/pruned"], "artifacts/pruned holds files that no stage wrote"),
        (["--artifacts", "nowhere"], "nowhere"),
        (
            ["--store", "artifacts/reference"],
            "--store artifacts/reference lies in artifacts/reference, which the grid reads",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(write_project, grid, tmp_path, options, message):
    """Before anything is drawn, and nothing is written."""
    if not (tmp_path / "artifacts").exists():
        write_project()
    result = grid("--steps", "2", *options)
    (line,) = [text for text in result.output.splitlines() if text.startswith("Error")]

    assert result.exit_code == 1
    assert message in line
    assert not (tmp_path / "reports").exists()
    assert not list((tmp_path / "checkpoints/grid").glob("*/cell.json"))


def test_another_protocol_is_refused(write_project, grid, tmp_path):
    """The reference has to be that of params.yaml; the message names the field."""
    write_project()
    tree = YAML(typ="safe").load((tmp_path / "params.yaml").read_text())
    tree["reference"]["sampler"]["steps"] = 5
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    result = grid("--steps", "2")

    assert result.exit_code == 1
    assert "sampler.steps is 4 and 5" in result.output


def test_options_replace_keys_of_the_block(write_project, grid, tmp_path):
    """The block grid of params.yaml holds where no option is given."""
    write_project()
    tree = YAML(typ="safe").load((tmp_path / "params.yaml").read_text())
    tree["grid"] = {"steps": [5], "sets": 1, "num_images": 4, "samplers": [{"spacing": "trailing"}]}
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    assert grid("--steps", "2").exit_code == 0
    record, params = (
        read_grid(tmp_path / "reports/grid"),
        read_json(tmp_path / "reports/grid/run.json")["params"]["grid"],
    )

    assert (record.protocol.sets, record.protocol.num_images) == (1, 4)
    assert {cell.sampler for cell in record.cells} == {"DDIM trailing"}
    assert params["steps"] == [2]


def test_settings_of_a_sampler_with_two_predictions_a_step_count_both(scheduler, params):
    """Heun predicts twice in every step but the last."""
    grid = GridParams(steps=(5,), samplers=({"scheduler": "HeunDiscrete"}, {"scheduler": "DDIM", "eta": 1}))
    heun, ddim = make_settings(grid, params.reference, scheduler, None, "x")

    assert (heun.calls, ddim.calls) == (9, 5)


def test_guidance_of_1_is_none(protocol, scheduler):
    """Both draw the same images, so a setting is the protocol's own with either."""
    one, three = (
        Setting(SamplerParams(steps=2), scale, 2).protocol(protocol, scheduler).guidance for scale in (1.0, 3.0)
    )

    assert (one, three) == (None, 3)


def test_a_damaged_cell_is_named(write_project, grid, tmp_path):
    """The line says which folder to remove."""
    write_project()
    assert grid("--steps", "2").exit_code == 0
    for path in (tmp_path / "checkpoints/grid").glob("*/cell.json"):
        path.write_text(json.dumps({"key": "x"}))
    result = grid("--steps", "2")

    assert result.exit_code == 1
    assert "remove checkpoints/grid/" in result.output
    assert np.isfinite(read_grid(tmp_path / "reports/grid").cells[0].metrics["fid"].mean)


def test_a_second_grid_waits_for_the_first(tmp_path, capsys):
    """Two grids at once in one folder do not measure the same cells; the second prints that it waits."""
    held = threading.Event()

    def hold():
        with hold_store(tmp_path):
            held.set()

    with hold_store(tmp_path):
        thread = threading.Thread(target=hold)
        thread.start()
        waiting = f"waiting for another espalier grid that uses {tmp_path}"
        said = until(lambda: capsys.readouterr().err)
        waited = not held.wait(0.3)
    thread.join(30)

    assert said == f"{waiting}\n"
    assert waited
    assert held.is_set()


@pytest.mark.parametrize("name", ["steps", "samplers", "guidance", "models"])
def test_a_list_is_empty_or_wrong_and_not_both(name):
    """An empty list is refused, and one with a wrong value is not called empty."""
    with pytest.raises(ValidationError, match=f"{name} is empty; name at least one value"):
        GridParams(**{name: ()})
    with pytest.raises(ValidationError) as wrong:
        GridParams(**{name: ("x",)})
    assert wrong.value.error_count() == 1


def test_another_config_is_another_cell(write_project, grid, tmp_path, monkeypatch):
    """The weights alone do not decide what a model draws."""
    write_project(classes=3)
    drawn = []
    monkeypatch.setattr(cells, "draw_set", lambda *given: drawn.append(given[5]) or original(*given))
    first = grid("--steps", "2")
    assert first.exit_code == 0, first.output
    before = len(drawn)
    config = tmp_path / "artifacts/finetuned/unet/config.json"
    write_json(config, {**read_json(config), "norm_eps": 1e-3})
    again = grid("--steps", "2")

    assert again.exit_code == 0, again.output
    assert {label.split(",")[0] for label in drawn[before:]} == {"finetuned"}
