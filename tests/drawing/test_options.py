"""The options of a job: what does not fit is one line, and nothing is written."""

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.drawing.labels import Labels, read_labels
from stages.drawing.worker import load_drawer
from stages.runtime.errors import InputError
from stages.tools.__main__ import main


@pytest.fixture
def draw_shards(root, tmp_path, monkeypatch):
    """Call the command with --format parquet in a folder with params.yaml: exit code and output."""
    monkeypatch.chdir(tmp_path)
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    tree["reference"] |= {"sampler": {"steps": 2}, "batch_size": 4}
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")

    def run(*options):
        result = CliRunner().invoke(main, ["draw", "--format", "parquet", "--out", "out", *map(str, options)])
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "5:5"], "--seeds '5:5': give A:B with A < B"),
        (["--seeds", "1-9"], "--seeds '1-9': give A:B with A < B"),
        (["--seeds", "0:9", "--seed", 1], "--seeds replaces --seed and --num-images"),
        (["--shard-size", 10], "--shard-size 10 is not a multiple of the batch of 4; give 8 or 12"),
        (["--shard-size", 2], "--shard-size 2 is not a multiple of the batch of 4; give 4 or 8"),
        (["--shards", "1:2"], "--shards 1:2: the job has the shards 0:1"),
        (["--label", 1, "--labels", "labels.txt"], "--label and --labels exclude each other"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt: No such file"),
        (["--model", "nowhere"], "nowhere is no folder; give the folder of a pipeline"),
        (["--out", "gs://bucket"], "--out 'gs://bucket': give a folder or s3://BUCKET/PREFIX"),
        (["--out", "s3://B"], "invalid --out 's3://B'"),
        (["--params", "nowhere.yaml"], "nowhere.yaml: "),
        (["--seeds", "٠:٣"], "give A:B with A < B"),
        (["--seeds", "0:4000000000000000000"], "shards of 64 images are too many, at most 1000000; raise --shard-size"),
        (["--shards", ""], "--shards '': give A:B with A < B"),
        (["--check"], "out holds no job; correct --out, or leave --check out to draw"),
        (["--check", "--shards", "0:1"], "--check compares every finished shard of the job; leave --shards out"),
        (["--out", ""], "--out '': give a folder or s3://BUCKET/PREFIX"),
        (["--out", "params.yaml/x"], "cannot write params.yaml/x"),
        (["--format", "png", "--jobs", 2], "--jobs is for shards; add --format parquet"),
        (["--format", "png", "--out", "s3://bucket"], "--format png writes a folder"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(draw_shards, model_folder, tmp_path, monkeypatch, options, message):
    """Before anything is drawn, and without a run in MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code, output = draw_shards(*(["--model", model_folder] if "--model" not in options else []), *options)

    assert code == 1
    (line,) = output.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n", "has 2 lines, and 3 images are to be drawn; give as many"),
        ("0\nseven\n1\n", "line 2: 'seven' is no class; write a number from 0"),
        ("0\n-1\n1\n", "line 2: '-1' is no class"),
        ("0\n\n1\n", "line 2: '' is no class"),
        (b"\xff\n1\n2\n", "is not text; write one class in each line"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_one_line(tmp_path, text, message):
    """The message names the file, and the line."""
    (tmp_path / "labels.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "labels.txt", 0, 3)


def test_classes_that_the_model_lacks_are_refused(make, labelled, source):
    """A label that is too large, by its line; any label for an unconditional model."""
    each = Labels(0, each=[0, 1, 2, 3], origin="--labels labels.txt")
    with pytest.raises(InputError, match=r"--labels labels\.txt, line 4: class 3: the model has 3 classes; give"):
        load_drawer(make(range(4), each, labelled), labelled.folder, each)
    one = Labels(one=3, origin="--label 3")
    with pytest.raises(InputError, match="--label 3: the model has 3 classes"):
        load_drawer(make(range(4), one, labelled), labelled.folder, one)
    with pytest.raises(InputError, match="--label 3: the model is unconditional; leave --label out"):
        load_drawer(make(range(4), one), source.folder, one)
