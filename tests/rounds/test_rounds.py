"""Pruning in several rounds: the params of each, what the stages in them make, and what is refused."""

import errno
import os
import signal
import subprocess
import sys

import psutil
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.data.images import write_images
from stages.finetune.__main__ import main as finetune
from stages.importance.__main__ import main as importance
from stages.models.layout import PLAN, latest_model
from stages.models.params import RoundsParams
from stages.models.pipeline import read_unet
from stages.models.plan import read_plan
from stages.models.saliency import write_importance
from stages.params import Params, load_params
from stages.prune.__main__ import main as prune
from stages.prune.kept import check_plan
from stages.prune.params import PruneParams, Target
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.rounds.__main__ import main
from stages.rounds.params import read_params
from stages.rounds.targets import find_targets
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.storage.provenance import write_run_record
from tests.orchestra import until

SMALL = {
    "importance": {"criterion": "magnitude", "report": None},
    "finetune": {"batch_size": 8, "heldout_every": 3, "checkpoint_every": 1, "samples": None},
}
STAGES = {"stages.importance": importance, "stages.prune": prune, "stages.finetune": finetune}


@pytest.fixture
def write_params(tmp_path, root):
    """Write params.yaml with changes of its blocks; returns its path."""

    def write(**blocks):
        tree = YAML(typ="safe").load((root / "params.yaml").read_text())
        for given in (SMALL, blocks):
            for name, values in given.items():
                tree[name] |= values
        YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
        return tmp_path / "params.yaml"

    return write


@pytest.fixture
def options(tmp_path, model_folder, images, magnitude):
    """The options of the stage rounds for the tiny UNet, as a list."""
    for name in ("data", "importance"):
        (tmp_path / name).mkdir()
    write_images(tmp_path / "data", images, {})
    write_importance(tmp_path / "importance", magnitude)
    places = {name: tmp_path / name for name in ("importance", "data", "checkpoints")}
    places |= {"model": model_folder, "out": tmp_path / "rounds", "params": tmp_path / "params.yaml"}
    return [text for key, path in places.items() for text in (f"--{key}", str(path))]


@pytest.fixture
def in_process(monkeypatch):
    """Run the stages of a round in this process, which takes no time to start; returns the list of those that ran."""
    ran = []

    def run_stage(package, given):
        ran.append(package)
        arguments = [text for key, path in given.items() for text in (f"--{key}", str(path))]
        result = CliRunner().invoke(STAGES[package], arguments)
        if result.exit_code:
            sys.exit(result.exit_code)

    monkeypatch.setattr("stages.rounds.rounds.run_stage", run_stage)
    return ran


@pytest.mark.parametrize(
    ("target", "dense", "expected"),
    [
        ({"ratio": 0.75}, 1.0, {"ratio": 0.5}),
        ({"macs": "25%"}, 8e9, {"macs": "50.000000%"}),
        ({"params": 0.25}, 8e9, {"params": "50.000000%"}),
        ({"macs": 2e9}, 8e9, {"macs": "50.000000%"}),
    ],
)
def test_equal_parts_of_the_way_shrink_by_equal_factors(target, dense, expected):
    """Half of the way to a quarter of the size is half of the size; all of it is the target, none the dense model."""
    found = Target(**target)

    assert found.on_the_way(0.5, dense).given() == expected
    assert found.on_the_way(1, dense).resolve(dense) == pytest.approx(found.resolve(dense))
    assert found.on_the_way(0, dense).resolve(dense) == pytest.approx(dense)


@pytest.mark.parametrize(("count", "steps"), [(1, 50), (2, 7), (3, 50), (10, 49)])
def test_the_steps_of_all_rounds_are_finetune_steps(write_params, count, steps):
    """Whatever their number and length."""
    params = read_params(write_params(rounds={"count": count, "steps": steps}))
    targets = [params.prune.target] * count
    spent = [tree["finetune"]["steps"] for tree in params.trees(targets)][:-1]  # the last round is only cut

    assert sum(spent) + params.finetune.after_rounds(params.rounds).steps == params.finetune.steps


def test_one_round_changes_no_params(params):
    """So the default trains, and is fingerprinted, as before there were rounds."""
    assert params.rounds.count == 1
    assert params.finetune.after_rounds(params.rounds) is params.finetune


def test_the_params_of_a_round_are_a_valid_file_with_draws_of_its_own(write_params, unet):
    """Each has its seed, a target nearer to the final one, one round, and no gate, which is for the last recovery."""
    params = read_params(write_params(rounds={"count": 4}, finetune={"gate": 0.1}))
    trees = [Params.model_validate(tree) for tree in params.trees(find_targets(unet, params.prune, 4))]
    ratios = [tree.prune.target.ratio for tree in trees]

    assert len({params.seed, *(tree.seed for tree in trees)}) == 5
    assert all(tree.rounds == RoundsParams() and tree.finetune.gate is None for tree in trees)
    assert ratios == sorted(set(ratios))
    assert ratios[-1] == params.prune.target.ratio


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"prune": {"target": {"latency_ms": 3}}}, "latency_ms cannot be divided into rounds"),
        ({"prune": {"geglu": "halves"}}, "geglu halves cannot be divided into rounds"),
        ({"finetune": {"init": "scratch", "loss": {"noise": 1.0}}}, "init scratch uses no weights of earlier rounds"),
        ({"finetune": {"steps": 100}}, "finetune.steps 100 leaves none after 2 × 50 of rounds.steps; raise it, or"),
        ({"finetune": {"warmup_steps": 50}}, "warmup_steps 50 takes all 50 steps of a round; lower it, or raise"),
        ({"finetune": {"snapshots": [25]}}, "finetune.snapshots are those of one training; empty it, or"),
        (
            {"finetune": {"loss": {"output": 1.0, "jacobian": {"weight": 0.1, "every": 60}}}},
            "finetune.loss.jacobian.every or .ramp_steps does not fit a round of 50; lower it, or raise",
        ),
        (
            {"finetune": {"loss": {"output": 1.0, "jacobian": {"weight": 0.1, "ramp_steps": 50}}}},
            "finetune.loss.jacobian.every or .ramp_steps does not fit a round of 50; lower it, or raise",
        ),
        ({"rounds": {"count": 0}}, "rounds.count is 0: "),
        ({"rounds": {"steps": 0}}, "rounds.steps is 0: "),
        ({"rounds": {"count": 2.5}}, "rounds.count is 2.5: "),
    ],
)
def test_what_cannot_be_divided_into_rounds_is_refused(write_params, options, tmp_path, blocks, message):
    """By the stage and by the check of all params, in one line, before anything is written."""
    path = write_params(**{"rounds": {"count": 3}, **blocks})
    result = CliRunner().invoke(main, options)

    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "rounds").exists()
    with pytest.raises(InputError):
        load_params(path)


def test_one_round_writes_no_model(write_params, options, tmp_path, model_folder):
    """Only its record; finetune then trains the model of the stage prune."""
    write_params()
    result = CliRunner().invoke(main, options)

    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["run.json"]
    assert latest_model(model_folder, tmp_path / "rounds", 1) == model_folder
    assert latest_model(tmp_path, model_folder, 2) == model_folder
    with pytest.raises(InputError, match="is not a folder; give the one that the rounds stage writes"):
        latest_model(model_folder, tmp_path / "nowhere", 1)
    with pytest.raises(InputError, match=r"rounds\.count is 2, and --rounds .* holds no model"):
        latest_model(model_folder, tmp_path / "rounds", 2)
    with pytest.raises(InputError, match=r"rounds\.count is 2, and no --rounds is given"):
        latest_model(model_folder, None, 2)


@pytest.mark.e2e
def test_three_rounds_end_at_the_size_of_one(write_params, options, in_process, tmp_path, unet):
    """With one plan in the numbering of the dense model, which teaches in every round, also in the last."""
    write_params(rounds={"count": 3, "steps": 2}, finetune={"steps": 5}, prune={"target": {"macs": "40%"}})
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    given = ["--params", tmp_path / "params.yaml", "--model", tmp_path / "model", "--out", tmp_path / "one"]
    given += ["--importance", tmp_path / "importance"]
    assert CliRunner().invoke(prune, [str(text) for text in given]).exit_code == 0
    plans = {name: read_plan(tmp_path / name / PLAN) for name in ("rounds", "one")}
    sizes = [{key: tensor.shape for key, tensor in read_unet(tmp_path / name).state_dict().items()} for name in plans]

    assert [name.removeprefix("stages.") for name in in_process] == [
        *("prune", "finetune"),
        *("importance", "prune", "finetune"),
        *("importance", "prune"),
    ]
    assert sizes[0] == sizes[1]
    assert plans["rounds"].base == plans["one"].base
    assert [cut.prune["target"]["macs"] for cut in plans["rounds"].earlier] == ["73.680630%", "54.288352%"]
    assert plans["rounds"].prune == plans["one"].prune
    check_plan(plans["rounds"], unet)
    assert read_json(tmp_path / "rounds/run.json")["stage"] == "rounds"
    assert list((tmp_path / "checkpoints").iterdir()) == []
    given = {"params": "params.yaml", "model": "one", "rounds": "rounds", "teacher": "model", "data": "data"}
    given |= {"checkpoints": "checkpoints", "out": "finetuned", "report": "curve"}
    result = CliRunner().invoke(
        finetune, [text for key, name in given.items() for text in (f"--{key}", str(tmp_path / name))]
    )
    assert result.exit_code == 0, result.output
    assert read_json(tmp_path / "finetuned/run.json")["params"]["finetune"]["steps"] == 5 - 2 * 2
    assert read_plan(tmp_path / "finetuned" / PLAN) == plans["rounds"]


@pytest.mark.e2e
def test_a_stopped_run_goes_on_with_the_stage_that_was_not_finished(
    write_params, options, in_process, tmp_path, monkeypatch
):
    """The weights are those of a run that was not stopped, and nothing is left of the rounds."""
    write_params(rounds={"count": 2, "steps": 1}, finetune={"steps": 2})
    assert CliRunner().invoke(main, options).exit_code == 0
    weights = (tmp_path / "rounds/unet/diffusion_pytorch_model.safetensors").read_bytes()
    run_stage, total = sys.modules["stages.rounds.rounds"].run_stage, len(in_process)

    def stop(package, given):
        if len(in_process) == total + 2:
            sys.exit(143)
        run_stage(package, given)

    again = [text.replace("/rounds", "/again") for text in options]
    with monkeypatch.context() as patch:
        patch.setattr("stages.rounds.rounds.run_stage", stop)
        assert CliRunner().invoke(main, again).exit_code == 143
    assert not (tmp_path / "again").exists()
    assert CliRunner().invoke(main, again).exit_code == 0

    assert in_process[:total] == ["stages.prune", "stages.finetune", "stages.importance", "stages.prune"]
    assert in_process[total:] == in_process[:total]
    assert (tmp_path / "again/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.e2e
def test_finished_rounds_stay_until_the_output_is_in_its_place(
    write_params, options, in_process, tmp_path, monkeypatch
):
    """A full disk at the very end loses none of them."""
    write_params(rounds={"count": 2, "steps": 1}, finetune={"steps": 2})

    def fail(folder, stage, **given):
        if stage == "rounds":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_run_record(folder, stage, **given)

    with monkeypatch.context() as patch:
        patch.setattr("stages.storage.provenance.write_run_record", fail)
        assert "free some space" in CliRunner().invoke(main, options).output
    ran = len(in_process)
    assert CliRunner().invoke(main, options).exit_code == 0

    assert len(in_process) == ran == 4
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (40, {"round_to": 8}, "rounds.count 40 is too high for these widths: round 1, at ratio 0.008877, has no"),
        (9, {"target": {"macs": "99%"}}, "rounds.count 9 is too high for these widths: round 7, at macs 99.221"),
        (3, {"target": {"macs": "1%"}}, "is out of reach: possible from"),
        (2, {"exclude": ["nowhere.*"]}, "prune.exclude 'nowhere.*' matches no layer"),
    ],
)
def test_more_rounds_than_the_widths_permit_are_refused(write_params, options, tmp_path, count, changes, message):
    """As is a target that one cut could not reach either; in one line, before the first importance is measured."""
    write_params(rounds={"count": count, "steps": 1}, prune=changes)
    result = CliRunner().invoke(main, options)

    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "rounds").exists()


def test_rounds_of_a_model_that_was_pruned_before_are_refused(unet, magnitude):
    """The plan of the first round would be one of the fetched widths, which no config holds."""
    pruned = cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.2})))
    target = PruneParams(target={"ratio": 0.5})

    assert len(find_targets(unet, target, 2)) == 2
    with pytest.raises(InputError, match=r"rounds\.count 2 needs a dense model, and fetch\.model is one"):
        find_targets(pruned, target, 2)


@pytest.mark.e2e
def test_a_stage_that_fails_ends_the_rounds_with_its_code(write_params, options, tmp_path, root):
    """It prints its own error."""
    write_params(rounds={"count": 2, "steps": 1}, finetune={"batch_size": 1000})
    command = [sys.executable, "-m", "stages.rounds", *options]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: finetune.batch_size 1000 ")
    assert "round 1 of 2: prune.target.ratio 0.16" in result.stdout
    assert not (tmp_path / "rounds").exists()


@pytest.mark.e2e
def test_sigterm_stops_the_stage_of_a_round_which_resumes(write_params, options, in_process, tmp_path, root):
    """The training in it saves a checkpoint first; no process is left, and the weights are the same afterwards."""
    write_params(rounds={"count": 2, "steps": 200}, finetune={"steps": 201})
    command = [sys.executable, "-m", "stages.rounds", *options]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert until(lambda: list((tmp_path / "checkpoints").rglob("step-*.safetensors")), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=40)

    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors
    assert not [child for child in children if child.is_running()]
    assert not (tmp_path / "rounds").exists()
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "finetune goes on from step" in result.stderr + result.stdout
    weights = (tmp_path / "rounds/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert CliRunner().invoke(main, [text.replace("/rounds", "/again") for text in options]).exit_code == 0
    assert in_process
    assert (tmp_path / "again/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
