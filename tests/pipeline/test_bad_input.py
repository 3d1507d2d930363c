"""What users get wrong: one clear line, an exit code that is not 0, nothing half-written."""

import shutil

import pytest
from PIL import Image

from stages.models.layout import WEIGHTS

FETCH = ["--model-out", "out/model", "--data-out", "out/data"]
PRUNE = ["--model", "artifacts/pretrained", "--importance", "artifacts/importance", "--out", "out/pruned"]


@pytest.fixture
def workspace(finished, tmp_path):
    """A copy of the finished workspace that a test may spoil."""
    ignore = shutil.ignore_patterns("cache", "mlruns", ".git")
    shutil.copytree(finished.path, tmp_path / "project", ignore=ignore)
    return type(finished)(tmp_path / "project")


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
    workspace.set("prune", target={"ratio": 0.99})
    return "prune", PRUNE, "prune.target.ratio 0.99 leaves 0 of"


def unknown_criterion(workspace):
    """Not one of the four."""
    workspace.set("importance", criterion="hessian")
    return "prune", PRUNE, "importance.criterion is 'hessian': input should be 'random'"


def missing_model_folder(_):
    """A path with a slip."""
    return "prune", ["--model", "artifacts/nowhere", *PRUNE[2:]], "model folder artifacts/nowhere does not exist"


def truncated_weights(workspace):
    """A copy that broke off."""
    path = workspace.path / "artifacts/pretrained/unet" / WEIGHTS
    path.chmod(0o644)
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
    return "fetch", FETCH, "a.png is 28×28, the model draws 16×16"


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
def test_a_mistake_is_told_in_one_line(workspace, spoil):
    """By the stage itself, as DVC starts it."""
    stage, arguments, words = spoil(workspace)
    result = workspace.run("python", "-m", f"stages.{stage}", *arguments)

    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert words in lines[0]
    assert not [path for path in workspace.path.glob("out/**/*") if path.is_file()]


def test_a_full_disk_is_told_in_one_line(workspace, tmp_path):
    """The output folder lies on a file system of 256 KiB, too small for the pruned model."""
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


REPORT = ["--artifacts", "artifacts", "--reports", "reports"]
PLACES = {"--summary": "out/summary", "--released": "out/released", "--page": "out/index.html"}


def spoil_text(path, text):
    """Write something else into a file of the workspace."""
    path.chmod(0o644)
    path.write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("reports/evaluate/evaluation.json", "{}", "evaluation.json is no evaluation of this version"),
        ("reports/evaluate/pairs.csv", "model,ssim\n", "pairs.csv holds no rows"),
        ("reports/finetune/curve.csv", "step,heldout_loss\n0,none\n", "curve.csv is not what its stage wrote"),
        ("reports/evaluate/dense.png", "", "dense.png is no picture"),
        ("artifacts/finetuned/pruning_plan.json", "{}", "is not what its stage wrote ('criterion')"),
        ("artifacts/pretrained/README.md", "---\nlicense: [mit\n---\n", "README.md has a head that is no YAML"),
        ("artifacts/finetuned/unet/diffusion_pytorch_model.safetensors", "", "is not a whole safetensors file"),
    ],
)
def test_a_damaged_folder_is_not_told_of(workspace, file, text, words):
    """One line that names the file, and nothing written."""
    spoil_text(workspace.path / file, text)
    result = workspace.run(
        "python", "-m", "stages.report", *REPORT, *(word for pair in PLACES.items() for word in pair)
    )

    assert result.returncode == 1, result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
    assert not [path for path in workspace.path.glob("out/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("option", "place", "words"),
    [
        ("--released", "artifacts/pruned", "output artifacts/pruned overlaps with artifacts/pruned"),
        ("--summary", "reports/finetune", "output reports/finetune overlaps with reports/finetune"),
        ("--page", "reports/evaluate/evaluation.json", "lies in a folder that a stage writes whole"),
        ("--page", "params.yaml", "params.yaml is no page that this stage has written"),
    ],
)
def test_the_report_destroys_nothing(workspace, option, place, words):
    """Not its inputs, and not what is none of its own."""
    before = workspace.weights("artifacts") | workspace.weights("reports")
    places = {**PLACES, option: place}
    result = workspace.run(
        "python", "-m", "stages.report", *REPORT, *(word for pair in places.items() for word in pair)
    )

    assert result.returncode == 1
    assert words in result.stderr
    assert workspace.weights("artifacts") | workspace.weights("reports") == before
    assert (workspace.path / "params.yaml").read_text().startswith(("seed", "#", "evaluate", "fetch"))
    assert not (workspace.path / "out").exists()


def test_new_weights_are_not_told_of_with_old_numbers(workspace):
    """A model that was not evaluated has no card."""
    weights = workspace.path / "artifacts/pruned/unet" / WEIGHTS
    target = workspace.path / "artifacts/finetuned/unet" / WEIGHTS
    target.chmod(0o644)
    shutil.copyfile(weights, target)
    result = workspace.run(
        "python", "-m", "stages.report", *REPORT, *(word for pair in PLACES.items() for word in pair)
    )

    assert result.returncode == 1
    assert "tells of other weights than artifacts/finetuned" in result.stderr
