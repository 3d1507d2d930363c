"""What users get wrong: one clear line, an exit code that is not 0, nothing half-written."""

import shutil

import pytest
from PIL import Image

from stages.diffusion.models import WEIGHTS

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
    assert "No space left on device; free some space or choose another place" in lines[0]
    assert str(small) not in result.stdout
