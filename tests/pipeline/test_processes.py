"""Heavy stages on several processes: the command with --processes, or under torchrun."""

import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.data.images import Images, write_images
from stages.evaluate.__main__ import main as evaluate
from stages.importance.__main__ import main as importance
from stages.models.pipeline import write_pipeline
from stages.reference.__main__ import main as reference

COMMANDS = {"reference": reference, "importance": importance, "evaluate": evaluate}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m")


@pytest.fixture
def stages(tmp_path, root, make_unet, scheduler):
    """Return a function that runs the three stages one after the other, and returns the files that they wrote."""
    for seed, name in enumerate(("dense", "pruned", "finetuned")):
        write_pipeline(tmp_path / name, make_unet(seed, sample_size=16), scheduler)
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 16, 16)).astype(np.uint8)
    write_images(tmp_path / "data", Images(pixels[:12], pixels[12:]), {})
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    tree["reference"] |= {"num_images": 7, "sets": 2, "batch_size": 2, "kid_subset_size": 5, "sampler": {"steps": 4}}
    tree["importance"] |= {"num_images": 2, "stride": 100, "report": {"timesteps": 3, "draws": 2}}
    tree["finetune"]["samples"] = None
    YAML().dump(tree, tmp_path / "params.yaml")

    def arguments(stage, out):
        inputs = {
            "reference": {"model": "dense", "data": "data", "out": f"{out}/reference"},
            "importance": {"model": "dense", "data": "data", "out": f"{out}/importance", "report": f"{out}/losses"},
            "evaluate": {
                **{name: name for name in ("dense", "pruned", "finetuned")},
                "reference": f"{out}/reference",
                "report": f"{out}/evaluate",
            },
        }[stage]
        given = [argument for key, path in inputs.items() for argument in (f"--{key}", str(tmp_path / path))]
        return ["--params", str(tmp_path / "params.yaml"), *given]

    def run(out, *options, before=(sys.executable, "-m")):
        (tmp_path / out).mkdir()
        for stage, main in COMMANDS.items():
            if options or before == TORCHRUN:
                command = [*before, f"stages.{stage}", *arguments(stage, out), *options]
                done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ)
                assert done.returncode == 0, done.stderr
            else:
                result = CliRunner().invoke(main, arguments(stage, out))
                assert result.exit_code == 0, result.output
        return contents(tmp_path / out)

    run.arguments = arguments
    return run


def contents(folder):
    """Return the content of each file that does not say where and when it was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "provenance" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.e2e
def test_two_processes_and_torchrun_write_what_one_writes(stages):
    """Every file of reference, importance and evaluate, bit for bit, and no other file."""
    alone = stages("one")

    assert {"reference/samples.npy", "importance/saliency.safetensors", "evaluate/evaluation.json"} <= alone.keys()
    assert stages("two", "--processes", "2") == alone
    assert stages("three", before=TORCHRUN) == alone


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (float("nan"), "conv_out.bias holds values that are not finite"),
        (3e38, "dense, set 1 of 2 draws 2 of 2 images with values that are not finite"),
    ],
)
def test_a_process_that_fails_ends_all_and_leaves_nothing(stages, tmp_path, root, make_unet, scheduler, bias, message):
    """One line, exit code 1 and no folder that is half written, whether found at once or while drawing."""
    unet = make_unet(0, sample_size=16)
    unet.conv_out.bias.data.fill_(bias)
    write_pipeline(tmp_path / "dense", unet, scheduler)
    (tmp_path / "broken").mkdir()
    command = [sys.executable, "-m", "stages.reference", *stages.arguments("reference", "broken"), "--processes", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ)

    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Error: ") == 1
    assert message in done.stderr
    assert list((tmp_path / "broken").iterdir()) == []


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_heavy_stage_takes_a_number_of_processes(stage):
    """At least one; 0 is refused before anything is read."""
    result = CliRunner().invoke(COMMANDS[stage], ["--processes", "0"])

    assert result.exit_code == 2
    assert "Invalid value for '--processes': 0 is not in the range x>=1" in result.output
