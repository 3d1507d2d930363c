"""The commands that prune and export: what they write, and what they refuse before they write."""

import pytest
import torch
from click.testing import CliRunner

from stages.data.images import write_images
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.saliency import write_importance
from stages.prune.__main__ import main as prune
from stages.storage.files import read_json
from stages.tools.__main__ import main as tools


@pytest.fixture
def importance_folder(tmp_path, magnitude):
    """A folder with the magnitude importance of the tiny UNet."""
    (tmp_path / "importance").mkdir()
    write_importance(tmp_path / "importance", magnitude)
    return tmp_path / "importance"


@pytest.fixture
def run(tmp_path, root, monkeypatch):
    """Run a command with the default params and a prune block of YAML lines."""
    monkeypatch.chdir(tmp_path)

    def invoke(command, *arguments, prune_block=""):
        text = (root / "params.yaml").read_text()
        head, rest = text.split("\nprune:\n")
        tail = rest[rest.index("\nfinetune:") :]
        block = prune_block or "  target: {ratio: 0.3}\n"
        (tmp_path / "params.yaml").write_text(f"{head}\nprune:\n{block}{tail}")
        return CliRunner().invoke(command, [str(argument) for argument in arguments])

    return invoke


def test_prune_prints_the_range_the_target_and_the_result(run, tmp_path, model_folder, importance_folder):
    """First the budget, then the costs before and after."""
    result = run(
        prune,
        *("--model", model_folder, "--importance", importance_folder, "--out", tmp_path / "out"),
        prune_block="  target: {macs: 60%}\n  floor: 0.1\n",
    )

    assert result.exit_code == 0, result.output
    assert result.output.startswith("smallest ")
    assert " MACs, asked " in result.output
    assert "4.0772 M MACs -> 2.4" in result.output
    assert read_json(tmp_path / "out" / PLAN)["budget"]["quantity"] == "macs"


def test_a_plan_is_replayed_on_another_checkpoint(run, tmp_path, model_folder, importance_folder, make_unet, scheduler):
    """From its file, without importance: the same channels are cut from other weights."""
    other = make_unet(seed=1)
    write_pipeline(tmp_path / "other", other, scheduler)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(prune, "--model", model_folder, "--importance", importance_folder, "--out", first).exit_code == 0
    result = run(prune, "--model", tmp_path / "other", "--replay", first / PLAN, "--out", second)

    assert result.exit_code == 0, result.output
    kept = read_json(first / PLAN)["layers"]["conv_in"]["outputs"]
    assert torch.equal(read_unet(second).conv_in.weight, other.conv_in.weight[kept])
    assert read_json(second / PLAN)["replayed_from"] == read_json(first / PLAN)["sha256"]


def test_compensation_through_the_command_line(run, tmp_path, model_folder, importance_folder, images):
    """It changes the remaining weights and prints the difference before and after."""
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", images, {})
    common = ("--model", model_folder, "--importance", importance_folder, "--data", tmp_path / "data")
    block = "  target: {ratio: 0.3}\n  compensate: {num_images: 8, num_timesteps: 4}\n"
    plain = run(prune, *common, "--out", tmp_path / "plain")
    compensated = run(prune, *common, "--out", tmp_path / "compensated", prune_block=block)

    assert (plain.exit_code, compensated.exit_code) == (0, 0), compensated.output
    assert "compensated: mean square difference from the dense prediction" in compensated.output
    weights = [read_unet(tmp_path / name).conv_out.weight for name in ("plain", "compensated")]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("arguments", "block", "message"),
    [
        ((), "", "give either --importance, to make a plan, or --replay, to apply an existing one"),
        (("--importance", "{importance}", "--replay", "plan.json"), "", "give either --importance"),
        (("--replay", "plan.json"), "", "plan.json: No such file or directory"),
        (("--importance", "{importance}"), "  target: {macs: 1000}\n", "possible from "),
        (("--importance", "{importance}"), "  target: {macs: 60%, ratio: 0.3}\n", "give exactly one of"),
        (("--importance", "{importance}"), "  target: 0.3\n", "prune.target is 0.3"),
        (("--importance", "{importance}"), "  target: {ratio: 0.3}\n  include: up_blocks.*\n", "prune.include is 'up_"),
        (("--importance", "{importance}"), "  target: {ratio: 0.3}\n  exclude: [nowhere]\n", "matches no layer"),
        (
            ("--importance", "{importance}"),
            "  target: {ratio: 0.3}\n  compensate: {num_images: 8, num_timesteps: 4}\n",
            "give them with --data",
        ),
        (
            ("--importance", "{importance}"),
            "  target: {ratio: 0.3}\n  compensate: {num_images: 8, num_timesteps: 4, damping: .inf}\n",
            "prune.compensate.damping is inf",
        ),
        (
            ("--importance", "{importance}"),
            "  target: {ratio: 0.3}\n  compensate: {num_images: 8, num_timesteps: 4, early_weight: 0}\n",
            "prune.compensate.early_weight is 0",
        ),
    ],
)
def test_invalid_input_is_refused_in_one_line(
    run, tmp_path, model_folder, importance_folder, arguments, block, message
):
    """Exit code 1, the reason, no traceback, no output folder."""
    filled = [argument.format(importance=importance_folder) for argument in arguments]
    result = run(prune, "--model", model_folder, *filled, "--out", tmp_path / "out", prune_block=block)

    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("Error: ") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_export_writes_a_stock_folder_or_nothing(run, tmp_path, make_unet, scheduler, magnitude_of):
    """A uniform cut of a wide model is exported; at another ratio no stock config fits."""
    from stages.prune.params import PruneParams
    from stages.prune.selection import plan_pruning
    from stages.prune.surgery import cut

    unet = make_unet(block_out_channels=(128, 128), norm_num_groups=32)
    for name, ratio in (("even", 0.25), ("uneven", 0.3)):
        plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": ratio}))
        write_pipeline(tmp_path / name, cut(unet, plan), scheduler)
    even, uneven = (
        run(tools, "export", "--model", tmp_path / name, "--out", tmp_path / f"{name}-stock")
        for name in ("even", "uneven")
    )

    assert (even.exit_code, uneven.exit_code) == (0, 1)
    assert read_json(tmp_path / "even-stock/unet/config.json")["_class_name"] == "UNet2DModel"
    assert read_json(tmp_path / "even-stock/model_index.json")["unet"] == ["diffusers", "UNet2DModel"]
    assert uneven.output.startswith("Error: no stock config has these widths")
    assert not (tmp_path / "uneven-stock").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pruned_widths", {"conv_in": [0]}),
        ("pruned_widths", {"nowhere": [4, 4]}),
        ("pruned_widths", {"conv_in": "wide"}),
        ("pruned_widths", [1]),
        ("pruned_heads", {"mid_block.attentions.0": 3}),
        ("pruned_heads", {"mid_block.attentions.0": 2.0}),
        ("pruned_heads", {"conv_in": "two"}),
    ],
)
def test_invalid_widths_and_heads_are_refused(run, tmp_path, model_folder, importance_folder, key, value):
    """An edited config of a pruned model is refused."""
    import json

    given = ("--importance", importance_folder)
    assert run(prune, "--model", model_folder, *given, "--out", tmp_path / "out").exit_code == 0
    path = tmp_path / "out/unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    result = run(prune, "--model", tmp_path / "out", *given, "--out", tmp_path / "again")

    assert result.exit_code == 1
    assert "the weights do not fit the config" in result.output
