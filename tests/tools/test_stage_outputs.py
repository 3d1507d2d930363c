"""Outputs of commands beside the pipeline: never those of its stages."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages.grid.__main__ import main as grid
from stages.runtime.errors import InputError
from stages.runtime.stage_outputs import check_no_stage_output
from stages.storage.tensors import write_tensors
from stages.tools.__main__ import main

COMMANDS = {
    "draw": ["draw"],
    "shards": ["draw", "--format", "parquet"],
    "export": ["export", "--model", "m"],
    "lora": ["lora", "--adapter", "a", "--plan", "p"],
    "pull": ["pull", "owner/name"],
    "sweep-table": ["sweep-table", "--cells", "c"],
    "method-table": ["method-table", "--cells", "c", "--preset", "digits"],
    "curve-table": ["curve-table", "--cells", "c", "--rows", "a", "--preset", "digits"],
    "grid": [],
}


@pytest.fixture
def project(root, tmp_path, monkeypatch):
    """A folder with dvc.yaml and a finished output, as the current folder."""
    shutil.copyfile(root / "dvc.yaml", tmp_path / "dvc.yaml")
    (tmp_path / "artifacts/pruned").mkdir(parents=True)
    (tmp_path / "artifacts/pruned/run.json").write_text('{"stage": "prune"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_replaces_the_output_of_a_stage(project, name):
    """Its --out is refused in one line before anything else, and the output stays."""
    result = CliRunner().invoke(grid if name == "grid" else main, [*COMMANDS[name], "--out", "artifacts/pruned"])

    assert result.exit_code == 1
    assert result.output == (
        f"Error: --out artifacts/pruned is pruned, an output of the stage prune in {project / 'dvc.yaml'}; "
        "choose a folder beside those of the pipeline\n"
    )
    assert [path.name for path in (project / "artifacts/pruned").iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["export", "lora"])
def test_no_command_replaces_a_model_that_another_wrote(tmp_path, monkeypatch, name):
    """A released model that was copied elsewhere, or the images of draw."""
    monkeypatch.chdir(tmp_path)
    for place in ("m", "a", "p", "copy"):
        (tmp_path / place).mkdir()
    write_tensors(tmp_path / "a/pytorch_lora_weights.safetensors", {})
    (tmp_path / "copy/run.json").write_text('{"stage": "finetune"}')
    result = CliRunner().invoke(main, [*COMMANDS[name], "--out", "copy"])

    assert result.exit_code == 1
    assert result.output == f"Error: copy was written by finetune; give {name} another folder\n"
    assert (tmp_path / "copy/run.json").exists()


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("artifacts/pruned/samples", "lies in pruned, an output of the stage prune"),
        ("artifacts", "holds "),
        ("..", "holds "),
        ("artifacts/variants", "is variants, an output of the stage variants"),  # which does not exist yet
        ("reports/index.html", "is index.html, an output of the stage report"),
        ("../{name}/artifacts/data", "is data, an output of the stage fetch"),
        ("link", "is pruned, an output of the stage prune"),
    ],
)
def test_a_folder_in_or_around_an_output_is_refused(project, out, found):
    """Also before the stage has run, and by another path to it, from any folder."""
    (project / "link").symlink_to("artifacts/pruned")
    with pytest.raises(InputError, match=found):
        check_no_stage_output(Path(out.format(name=project.name)), "--out")


@pytest.mark.parametrize("out", ["samples", "artifacts/pruned-samples", "reports/grid", "/nowhere/artifacts/pruned"])
def test_other_folders_are_free(project, out):  # noqa: ARG001
    """Beside outputs, and outside of the project."""
    check_no_stage_output(Path(out), "--out")


@pytest.mark.parametrize("text", ["[]", "stages: 3", "stages: {a: 3, b: {outs: 4}, c: {cmd: x}}"])
def test_a_file_that_is_no_pipeline_names_no_outputs(tmp_path, monkeypatch, text):
    """It belongs to someone else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(text)

    check_no_stage_output(Path("artifacts/pruned"), "--out")


@pytest.mark.parametrize("text", ["stages: [", f"# {'x' * 2**18}\nstages: {{a: {{cmd: x, outs: [model]}}}}"])
def test_a_pipeline_that_cannot_be_read_is_named(tmp_path, monkeypatch, text):
    """Not passed over: DVC reads files that are larger than the limit here, and their outputs would be lost."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(text)

    with pytest.raises(InputError, match=r"--out cannot be compared with .*dvc\.yaml.*; correct or shorten that file"):
        check_no_stage_output(Path("model"), "--out")


@pytest.mark.parametrize("entry", ["metrics: [scores.json]", "plots: [{scores.json: {cache: false}}]"])
def test_metrics_and_plots_of_a_stage_are_its_outputs(tmp_path, monkeypatch, entry):
    """DVC writes and restores them as any other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{a: {{cmd: x, {entry}}}}}")

    with pytest.raises(InputError, match=r"is scores\.json, an output of the stage a"):
        check_no_stage_output(Path("scores.json"), "--out")


def test_outputs_with_options_and_in_another_folder_count(tmp_path, monkeypatch):
    """DVC writes an output with options as a mapping, and wdir is where its path begins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {a: {wdir: sub, cmd: x, outs: [{model: {cache: false}}]}}")

    with pytest.raises(InputError, match="is model, an output of the stage a"):
        check_no_stage_output(Path("sub/model"), "--out")


@pytest.mark.parametrize("path", ["artifacts/small/model", "artifacts/large", "cut-0.3-8", "plain"])
def test_stages_made_from_templates_have_outputs(tmp_path, monkeypatch, path):
    """DVC makes them by foreach, matrix and variables, also from a params.yaml beside the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("folder: artifacts")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {each: {foreach: [small, large], do: {cmd: x, outs: ['${folder}/${item}']}}, "
        "grid: {matrix: {ratio: [0.3], round: [8]}, cmd: x, outs: ['cut-${item.ratio}-${item.round}']}, "
        "a: {cmd: x, outs: [plain]}}"
    )

    with pytest.raises(InputError, match=r"an output of the stage (each@(small|large)|grid@0\.3-8|a) in"):
        check_no_stage_output(Path(path), "--out")
    check_no_stage_output(Path("artifacts/medium"), "--out")


@pytest.mark.parametrize("entry", ["{outs: ['${nowhere}']}", "{matrix: 3, outs: [a]}", "{foreach: [a], do: 4}"])
def test_templates_that_cannot_be_resolved_are_named(tmp_path, monkeypatch, entry):
    """As a file that cannot be read: nobody knows its outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{a: {entry}}}")

    with pytest.raises(
        InputError, match=r"--out cannot be compared with .*DVC cannot resolve the templates in .*dvc\.yaml"
    ):
        check_no_stage_output(Path("model"), "--out")
