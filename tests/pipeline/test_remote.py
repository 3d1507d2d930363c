"""Results shared through a bucket: a clone computes nothing that is in it."""

import io
import os
import pickle
import subprocess
import uuid

import pytest
import torch

from tests.repository import commit
from tests.servers import s3_client, s3_environment


@pytest.fixture(scope="module")
def bucket(swift, tmp_path_factory):
    """An empty bucket; DVC reads its server and credentials from the environment."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "empty").touch()  # dvc-s3 fails at the /dev/null that suits boto3
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(folder / "empty"))
    variables = {**s3_environment(swift), **files}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        name = f"remote-{uuid.uuid4().hex}"
        s3_client(swift).create_bucket(Bucket=name)
        yield name


@pytest.fixture(scope="module")
def pushed(bucket, copy_finished):
    """A copy of the finished workspace, its outputs in the bucket and its files committed."""
    workspace = copy_finished("pushed")
    for command in (
        ["dvc", "remote", "add", "-d", "store", f"s3://{bucket}/dvc"],
        ["dvc", "push", "--run-cache"],
    ):
        result = workspace.run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    commit(workspace.path)
    return workspace


@pytest.fixture
def clone(pushed, tmp_path):
    """Clone the commit, as another machine does, without cache and outputs."""

    def make(name):
        path = tmp_path / name / "project"
        subprocess.run(["git", "clone", "-q", pushed.path, path], check=True)
        assert not (path / ".dvc" / "cache").exists()
        assert not (path / "artifacts").exists()
        return type(pushed)(path)

    return make


@pytest.fixture
def outputs(content):
    """Read every output of a workspace: folder -> path -> bytes; provenance lies beside outputs and is not shared."""

    def read(workspace):
        found = {folder: content(workspace.path / folder) for folder in ("artifacts", "reports")}
        return {
            folder: {path: body for path, body in files.items() if not path.endswith(".provenance.json")}
            for folder, files in found.items()
        }

    return read


@pytest.fixture
def bucket_content(swift, bucket):
    """Read every object of the bucket: key -> bytes."""

    def read():
        client = s3_client(swift)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    return read


@pytest.mark.e2e
def test_a_clone_pulls_every_result_and_computes_nothing(pushed, clone, outputs):
    """The outputs are bit-identical, and `dvc repro` runs and records nothing."""
    other = clone("second")
    result = other.run("dvc", "pull")
    assert result.returncode == 0, result.stdout + result.stderr

    assert outputs(other) == outputs(pushed)
    assert other.repro() == []
    assert outputs(other) == outputs(pushed)
    assert not (other.path / "mlflow.db").exists()
    assert list(other.path.rglob("*.provenance.json")) == []


@pytest.mark.e2e
def test_without_dvc_lock_the_run_cache_holds_every_result(pushed, clone, outputs):
    """`dvc repro --pull` finds the results of the same code, params and inputs, and writes the same dvc.lock."""
    other = clone("third")
    (other.path / "dvc.lock").unlink()

    assert other.repro("--pull") == []
    assert outputs(other) == outputs(pushed)
    assert (other.path / "dvc.lock").read_text() == (pushed.path / "dvc.lock").read_text()
    assert not (other.path / "mlflow.db").exists()


@pytest.mark.e2e
def test_no_pickle_and_no_secret_is_shared(pushed, clone, content, bucket_content, is_pickle):
    """Neither the bucket nor the cache pulled from it holds a pickle; .dvc/config holds the bucket and no key."""
    other = clone("fourth")
    assert other.run("dvc", "pull", "--run-cache").returncode == 0
    shared, cached = bucket_content(), content(other.path / ".dvc" / "cache")

    assert len(shared) == len(cached) > 30
    assert any(key.startswith("dvc/runs/") for key in shared)
    assert [name for name, body in [*shared.items(), *cached.items()] if is_pickle(body)] == []
    secrets = [os.environ[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    for workspace in (pushed, other):
        settings = {name: body for name, body in content(workspace.path / ".dvc").items() if "cache" not in name}
        assert "s3://" in settings["config"].decode()
        assert [name for name, body in settings.items() if any(secret in body for secret in secrets)] == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_detected(is_pickle, protocol):
    """Pickles of every protocol and torch's zips are, text is not."""
    weights = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, weights)

    assert is_pickle(pickle.dumps({"a": [1, 2.5, "b"]}, protocol))
    assert is_pickle(weights.getvalue())
    assert not is_pickle(b"step,loss\n0,.5\n")
    assert not is_pickle(b"")
