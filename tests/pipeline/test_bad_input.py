"""Mistakes of a user end in one line and a non-zero exit code, and leave no file."""

import shutil
from importlib import import_module

import pytest
from click.testing import CliRunner
from PIL import Image

from stages.models.layout import WEIGHTS
from stages.storage.files import file_sha256

FETCH = ["--model-out", "out/model", "--data-out", "out/data"]
MODEL = ["--model", "artifacts/pretrained"]
IMPORTANCE = [*MODEL, "--data", "artifacts/data", "--out", "out/importance", "--report", "out/report"]
PRUNE = [*MODEL, "--importance", "artifacts/importance", "--out", "out/pruned"]


@pytest.fixture
def workspace(finished, tmp_path, monkeypatch):
    """The current folder: params.yaml and links to the outputs of the finished workspace; `own` replaces a link."""
    project = tmp_path / "project"
    for folder in ("artifacts", "reports"):
        (project / folder).mkdir(parents=True)
        for output in (finished.path / folder).iterdir():
            (project / folder / output.name).symlink_to(output)
    shutil.copyfile(finished.path / "params.yaml", project / "params.yaml")
    (project / "stages").symlink_to(finished.path / "stages")
    monkeypatch.chdir(project)
    return type(finished)(project)


def own(workspace, file):
    """Replace the link to the output that holds a file by a copy: the path of the file, which may be changed."""
    path = workspace.path / file
    output = workspace.path.joinpath(*path.relative_to(workspace.path).parts[:2])
    source = output.resolve()
    output.unlink()
    shutil.copytree(source, output, copy_function=shutil.copyfile)
    return path


def run_stage(stage, arguments):
    """Run a stage in this process and the current folder: its exit code and the lines of its error output."""
    result = CliRunner().invoke(import_module(f"stages.{stage}.__main__").main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [line for line in result.stderr.splitlines() if line.strip()]


def files_below(folder):
    """List the files below a folder."""
    return [path for path in folder.glob("**/*") if path.is_file()]


def unknown_key(workspace):
    """A key that no section has."""
    workspace.set("prune", ratoi=0.3)
    return "prune", PRUNE, "prune.ratoi is not a known key"


def ratio_above_one(workspace):
    """More than everything."""
    workspace.set("prune", target={"ratio": 1.5})
    return "prune", PRUNE, "prune.target.ratio is 1.5: input should be less than 1"


def ratio_that_empties_a_group(workspace):
    """Less than everything, but still too much."""
    workspace.set("prune", target={"ratio": 0.99}, compensate=None)
    return "prune", PRUNE, "prune.target.ratio 0.99 leaves 0 of"


def unknown_criterion(workspace):
    """Not one of the four."""
    workspace.set("importance", criterion="hessian")
    return (
        "importance",
        [*IMPORTANCE, "--report", "out/report"],
        "importance.criterion is 'hessian': input should be 'random'",
    )


def missing_model_folder(_):
    """A path with a slip."""
    return "prune", ["--model", "artifacts/nowhere", *PRUNE[2:]], "model folder artifacts/nowhere does not exist"


def truncated_weights(workspace):
    """A copy that broke off."""
    path = own(workspace, f"artifacts/pretrained/unet/{WEIGHTS}")
    path.write_bytes(path.read_bytes()[:100_000])
    return "prune", PRUNE, "is not a whole safetensors file"


def wrong_sha256(workspace):
    """Not the file that was asked for."""
    source = {"source": "folder", "path": "artifacts/pretrained", "sha256": "0" * 64}
    workspace.set("fetch", model=source)
    return "fetch", FETCH, "expected 0000"


def empty_image_folder(workspace):
    """A folder with nothing in it."""
    (workspace.path / "pictures").mkdir()
    workspace.set("fetch", data={"source": "folder", "path": "pictures"})
    return "fetch", FETCH, "no images found"


def images_of_the_wrong_size(workspace):
    """28×28 for a model that draws 16×16."""
    (workspace.path / "pictures").mkdir()
    Image.new("L", (28, 28)).save(workspace.path / "pictures" / "a.png")
    workspace.set("fetch", data={"source": "folder", "path": "pictures"})
    return "fetch", FETCH, "a.png is 28×28, the model expects 16×16"


@pytest.mark.parametrize(
    "spoil",
    [
        unknown_key,
        ratio_above_one,
        ratio_that_empties_a_group,
        unknown_criterion,
        missing_model_folder,
        truncated_weights,
        wrong_sha256,
        empty_image_folder,
        images_of_the_wrong_size,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_mistake_is_one_line(workspace, spoil):
    """It names the value or the file, and nothing is written."""
    stage, arguments, message = spoil(workspace)
    code, lines = run_stage(stage, arguments)

    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert message in lines[0]
    assert files_below(workspace.path / "out") == []


@pytest.mark.parametrize(
    "spoil",
    [unknown_key, pytest.param(wrong_sha256, marks=pytest.mark.e2e), unknown_criterion],
    ids=lambda spoil: spoil.__name__,
)
def test_a_process_of_a_stage_ends_with_the_same_line(workspace, spoil):
    """Exit code 1 and no traceback, as DVC sees it."""
    stage, arguments, message = spoil(workspace)
    result = workspace.run("python", "-m", f"stages.{stage}", *arguments)

    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr


@pytest.mark.e2e  # test_files has the rule, for every way of writing
def test_a_full_disk_is_one_line(workspace, tmp_path):
    """The output folder lies on a file system of 256 KiB, too small for the pruned model."""
    workspace.set("prune", compensate=None)
    small = tmp_path / "small"
    small.mkdir()
    mount, prune = f"mount -t tmpfs -o size=256k tmpfs {small}", " ".join(["python -m stages.prune", *PRUNE[:4]])
    command = f"{mount} && {prune} --out {small}/pruned"
    listing = f"; code=$?; find {small} -type f; exit $code"
    result = workspace.run("unshare", "--map-root-user", "--mount", "sh", "-c", command + listing)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"this machine lets nobody mount: {result.stderr.strip()}")

    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert "No space left on device; free some space or choose another folder" in lines[0]
    assert str(small) not in result.stdout


REPORT = {"--artifacts": "artifacts", "--reports": "reports"}
OUTPUTS = {"--summary": "out/summary", "--released": "out/released", "--page": "out/index.html"}


def run_report(**changes):
    """Run the stage report with the given options changed."""
    return run_stage("report", [word for pair in {**REPORT, **OUTPUTS, **changes}.items() for word in pair])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("reports/evaluate/evaluation.json", "{}", "evaluation.json is damaged"),
        ("reports/evaluate/pairs.csv", "model,ssim\n", "pairs.csv holds no rows"),
        ("reports/finetune/curve.csv", "step,heldout_loss\n0,none\n", "curve.csv is invalid"),
        ("reports/evaluate/dense.png", "", "dense.png is no valid image"),
        ("artifacts/finetuned/pruning_plan.json", "{}", "is invalid ('criterion')"),
        ("artifacts/pretrained/README.md", "---\nlicense: [mit\n---\n", "README.md has invalid YAML metadata"),
        ("artifacts/finetuned/unet/diffusion_pytorch_model.safetensors", "", "was measured on other weights than"),
    ],
)
def test_a_damaged_output_is_not_reported(workspace, file, text, message):
    """One line names the file, and nothing is written."""
    own(workspace, file).write_text(text)
    code, lines = run_report()

    assert code == 1
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert files_below(workspace.path / "out") == []


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--released", "artifacts/pruned", "output artifacts/pruned overlaps with artifacts/pruned"),
        ("--summary", "reports/finetune", "output reports/finetune overlaps with reports/finetune"),
        ("--page", "reports/evaluate/evaluation.json", "lies in an output folder of a stage"),
        ("--page", "params.yaml", "params.yaml was not written by this stage"),
    ],
)
def test_the_report_overwrites_nothing(workspace, option, place, message):
    """Neither its inputs nor a file that it has not written."""
    outputs = [
        output.resolve() for folder in ("artifacts", "reports") for output in (workspace.path / folder).iterdir()
    ]
    files = [workspace.path / "params.yaml", *(path for output in outputs for path in files_below(output))]
    before = {path: file_sha256(path) for path in files}
    code, lines = run_report(**{option: place})

    assert code == 1
    assert message in lines[-1]
    assert len(files) > 50
    assert {path: file_sha256(path) for path in files} == before
    assert not (workspace.path / "out").exists()


def test_new_weights_are_not_reported_with_old_numbers(workspace):
    """A model that was not evaluated has no card."""
    weights = workspace.path / "artifacts/pruned/unet" / WEIGHTS
    shutil.copyfile(weights, own(workspace, f"artifacts/finetuned/unet/{WEIGHTS}"))
    code, lines = run_report()

    assert code == 1
    assert "was measured on other weights than artifacts/finetuned" in lines[-1]
