"""espalier plan: what a run would do, take and refuse, before anything is computed."""

import json

import pytest
import torch
from click.testing import CliRunner

from flows.planning import RunPlan, plan
from flows.workspaces.staleness import StageStatus
from stages.fetch.params import FolderModel, HubModel
from stages.models.layout import WEIGHTS
from stages.models.pipeline import write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError, UnavailableError
from stages.tools.planning.planned_model import open_model
from stages.tools.planning.preview import Preview
from tests.hub import Repository, hub

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def _in_the_checkout(root, monkeypatch):
    """Plan the checkout, with passes that take little time."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("stages.tools.planning.probe.SECONDS", 0.01)


def run(*arguments):
    """Call the command."""
    return CliRunner().invoke(plan, arguments)


def test_every_mistake_is_shown_at_once_before_anything_is_computed():
    """One line each, and none of them stops the others from being found."""
    mistakes = {
        "reference.extractor.name=incepton": "reference.extractor.name is 'incepton'; allowed: digits",
        "reference.guidance=2": "reference.guidance is 2.0",
        "reference.sampler.steps=2000": "reference.sampler.steps",
        "importance.stride=1000": "importance.stride 1000 leaves only timestep 0 of 1000",
        "importance.num_images=5000": "importance.num_images 5000 is more than the 1438 training images",
        "finetune.batch_size=2048": "finetune.batch_size 2048 is more than the 1438 training images",
        "prune.target.macs=1%": "is out of reach: possible from",
        "grid.guidance=[1,2]": "grid.guidance is 1.0",
    }
    result = run(*(part for mistake in mistakes for part in ("--set", mistake)))
    lines = [line for line in result.stdout.splitlines() if line.startswith("✗")]

    assert result.exit_code == 1
    for expected in mistakes.values():
        assert sum(expected in line for line in lines) == 1, expected
    assert len(lines) == len(mistakes)


@pytest.mark.parametrize(
    "block",
    [
        {"target": {"latency_ms": 1e-6}},
        {"target": {"macs": "1%"}, "ranking": "global"},
        {"target": {"macs": "1%"}, "depth": {"remove": 2}},
        {"target": {"ratio": 0.999}, "depth": {"remove": 2}},
        {"include": ["mid_block.*"], "depth": {"remove": 13}},
    ],
    ids=str,
)
def test_what_milliseconds_scores_or_drawn_branches_decide_is_only_possibly_refused(block):
    """The stage may find other branches and another range than the plan, whose scores are random."""
    result = run("--tflops", "1", "--json", *overrides(block))
    found = json.loads(result.stdout)

    assert result.exit_code == 0
    assert found["refusals"] == []
    assert len(found["possible_refusals"]) == 1
    assert found["model"] is None


def test_a_possible_refusal_is_a_warning_of_the_plan():
    """As of the run; the table of stages is above it."""
    result = run("--tflops", "1", *overrides({"target": {"latency_ms": 1e-6}}))

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(
        "Warning: a stage may refuse this: prune.target 1e-06 ms is out of"
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"depth": {"remove": 40}}, "prune.depth.remove 40 is more than the 14 branches that can go"),
        ({"target": {"macs": "1%"}, "depth": {"remove": ["mid_block.resnets.0"]}}, "is out of reach: possible from"),
        (
            {"target": {"macs": "0.01%"}, "depth": {"remove": "search"}},
            "out of reach by depth and width: possible from",
        ),
        ({"target": {"macs": "1%"}, "depth": {"remove": "target"}}, "out of reach by depth alone: possible from"),
    ],
    ids=str,
)
def test_what_no_order_of_the_branches_changes_is_refused(block, message):
    """A run would end with it in the stage prune."""
    result = run("--tflops", "1", "--json", *overrides(block))
    found = json.loads(result.stdout)

    assert result.exit_code == 1
    assert found["possible_refusals"] == []
    (refusal,) = found["refusals"]
    assert message in refusal


@pytest.mark.parametrize(
    "block",
    [
        {"target": {"macs": "1%"}, "depth": {"remove": "search"}},
        {"target": {"macs": "50%"}, "depth": {"remove": "target", "order": "greedy"}},
    ],
    ids=str,
)
def test_a_target_that_depth_and_width_meet_is_planned(block):
    """Width alone could not: its smallest model has 3 % of the MACs. What planning prints is not among the JSON."""
    result = run("--tflops", "1", "--json", *overrides(block))
    size = json.loads(result.stdout)["model"]

    assert result.exit_code == 0
    share = float(block["target"]["macs"].strip("%")) / 100
    assert size["pruned_macs"] <= 1.01 * share * size["dense_macs"]


def overrides(block):
    """Write changes of the block prune as options; the packed images of the checkout may be missing."""
    changes = {"compensate": None, **block}
    return [part for key, value in changes.items() for part in ("--set", f"prune.{key}={json.dumps(value)}")]


@pytest.mark.e2e
def test_a_folder_that_is_missing_is_a_refusal_beside_the_forecast(monkeypatch):
    """A preset knows the config of its model, so that it is planned offline, before anything is downloaded."""
    monkeypatch.setenv("ESPALIER_DATA", "/nowhere")
    result = run(
        "--preset", "photos", "--set", "fetch.model={source: bundled, name: digits}", "--tflops", "1", "--json"
    )
    found = json.loads(result.stdout)

    assert result.exit_code == 1
    assert any("image folder /nowhere/photos/train does not exist" in message for message in found["refusals"])
    assert found["seconds"] > 0


@pytest.mark.e2e
def test_a_known_system_is_planned_without_its_weights(monkeypatch):
    """CIFAR-10's UNet at ratio 0.3: the paper's sizes, from the config alone, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("--preset", "cifar10", "--tflops", "40", "--price", "2.5", "--json")
    found = json.loads(result.stdout)
    stages = {stage["name"]: stage for stage in found["stages"]}

    assert result.exit_code == 0, result.output
    assert found["model"]["dense_params"] == pytest.approx(35.7463e6, rel=1e-5)
    assert found["model"]["pruned_macs"] == pytest.approx(3.3919e9, rel=1e-4)
    assert stages["reference"]["seconds"] == pytest.approx(50_000 * 100 * 6.0641e9 * 2 / 40e12, rel=1e-3)
    assert found["price"] == pytest.approx(2.5 * found["seconds"] / 3600)


@pytest.mark.e2e
def test_the_default_run_is_timed_on_this_device():
    """Every stage that would run has a time; memory and disk are estimated, and a changed key is the reason."""
    result = run("--set", "prune.target.ratio=0.25")
    assert result.exit_code == 0, result.output
    assert "prune.target.ratio changed" in result.output
    assert "stages would run: about" in result.output
    assert "450 steps × 64 images" in result.output


@pytest.mark.e2e
def test_drawn_images_are_in_no_memory():
    """They are on disk: 256 MB of digits leave the estimate of evaluate and reference as it is."""
    few, many = (json.loads(run("--set", f"reference.num_images={count}", "--json").stdout) for count in (500, 100_000))

    for name in ("reference", "evaluate"):
        one, other = (
            next(stage["memory_bytes"] for stage in found["stages"] if stage["name"] == name) for found in (few, many)
        )
        assert abs(other - one) < 64e6


def test_a_grid_is_counted_beside_the_stages():
    """It is in no sum, since no run draws it; without the block there is no line."""
    rate = ("--tflops", "1", "--json")
    plain = json.loads(run(*rate).stdout)
    found = json.loads(run("--set", "grid.steps=[5,10]", *rate).stdout)

    assert plain["grid"] is None
    assert found["grid"]["work"] == "4 cells × 2500 images"
    assert found["grid"]["seconds"] > 0
    assert found["seconds"] == pytest.approx(plain["seconds"])
    assert "grid" not in [stage["name"] for stage in found["stages"]]


def test_weights_that_will_be_downloaded_are_named(monkeypatch, tmp_path):
    """A reader without a network learns it here, and not after the stage fetch; JSON has it, too."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    arguments = ("--set", "reference.extractor.name=inception-v3-compat", "--tflops", "1")

    assert "Warning: the weights of inception-v3-compat will be downloaded to " in run(*arguments).stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert "use the extractor thumbnail" in found["download"]


def test_a_run_that_measures_nothing_downloads_no_extractor():
    """Weights that are missing matter only to a stage that would run."""
    statuses = [StageStatus("prune", "runs"), StageStatus("reference", "up to date")]
    preview = Preview([], [], None, None, [], "weights are missing")

    assert RunPlan("params.yaml", "cpu", statuses, preview).download is None
    assert RunPlan("params.yaml", "cpu", [StageStatus("evaluate", "runs")], preview).download == "weights are missing"


def test_gpus_without_a_rate_are_refused():
    """Passes are timed on one device, so that nothing says how several share them."""
    result = run("--gpus", "8")
    assert result.exit_code == 2
    assert "--gpus needs --tflops" in result.output


@pytest.mark.parametrize("rate", ["nan", "inf", "0"])
def test_a_rate_is_a_finite_number_above_zero(rate):
    """One line says so."""
    result = run("--tflops", rate)
    assert result.exit_code == 2
    assert "Invalid value for '--tflops'" in result.output


def test_a_model_folder_is_planned_by_its_config(tmp_path, make_unet, scheduler):
    """The weights need not be read to know what passes cost."""
    write_pipeline(tmp_path / "model", make_unet(sample_size=16), scheduler)
    (tmp_path / "model/unet" / WEIGHTS).write_bytes(b"not opened")
    found = open_model(FolderModel(source="folder", path=tmp_path / "model"), None, torch.device("cpu"))

    assert found.unet.config["sample_size"] == 16


CHANGES = {
    "no config": ({"unet/config.json": None}, "has no unet/config.json; give the repository of a diffusers pipeline"),
    "an own class": (
        {"unet/config.json": {"_class_name": "Mine"}},
        "has an own class; fetch it first: dvc repro fetch",
    ),
    "an autoencoder": ({"model_index.json": {"vae": ["diffusers", "AutoencoderKL"]}}, "has more parts than a UNet; "),
    "classes": (
        {"unet/config.json": {"num_class_embeds": 4}},
        "has classes, of which one may be empty; fetch it first",
    ),
    "no norm": ({"unet/config.json": {"norm_num_groups": 0}}, "is not a valid config"),
    "no repository": ({}, "correct fetch.model.repo or .revision"),
}


@pytest.fixture
def on_the_hub(hub, make_unet, scheduler, tmp_path, monkeypatch):
    """Put the configs of a small UNet on the Hub, with changes; returns the source."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = {
        "unet/config.json": json.loads(make_unet(sample_size=16).to_json_string()),
        "scheduler/scheduler_config.json": json.loads(scheduler.to_json_string()),
        "model_index.json": {},
    }

    def put(changes):
        contents = {path: json.dumps({**tree, **(changes.get(path) or {})}).encode() for path, tree in files.items()}
        for path in [path for path, change in changes.items() if change is None]:
            del contents[path]
        hub.repositories["me/model"] = Repository(private=False, history=[("1" * 40, contents)])
        return HubModel(source="hub", repo="me/model", revision="1" * 40, trust=True)

    return put


def test_a_model_of_the_hub_is_planned_by_its_configs(on_the_hub):
    """No weights are downloaded."""
    found = open_model(on_the_hub({}), None, torch.device("cpu"))

    assert (found.unet.config["sample_size"], found.origin) == (16, "me/model")


@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_of_the_hub_whose_configs_do_not_suffice_is_refused(hub, on_the_hub, kind):
    """The line says what to do."""
    changes, message = CHANGES[kind]
    source = on_the_hub(changes)
    if kind == "no repository":
        hub.repositories.clear()

    with pytest.raises(InputError, match=message):
        open_model(source, None, torch.device("cpu"))


def test_a_hub_that_does_not_answer_is_an_outage(on_the_hub, monkeypatch):
    """It may be back later."""
    source = on_the_hub({})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(UnavailableError, match=r"me/model: unet/config\.json cannot be read .*; check the network"):
        open_model(source, None, torch.device("cpu"))


def test_a_model_that_was_pruned_before_has_random_weights(tmp_path, unet, magnitude, scheduler, monkeypatch):
    """Its class leaves them as they were in memory, here not a number; then the plan's own cut could not be checked."""
    pruned = cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.2})))
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **given: empty(*shape, **given).fill_(torch.nan))
    source = FolderModel(source="folder", path=tmp_path / "pruned")
    found = open_model(source, None, torch.device("cpu")).unet.state_dict()

    assert {name: it.shape for name, it in found.items()} == {k: it.shape for k, it in pruned.state_dict().items()}
    assert all(tensor.isfinite().all() for tensor in found.values())
