"""Results shared through a bucket: who has them computes nothing again."""

import io
import os
import pickle
import shutil
import subprocess

import pytest
import torch

GIT = ["git", "-c", "user.name=a tester", "-c", "user.email=tester@example.org"]


@pytest.fixture
def store(connect, monkeypatch, tmp_path):
    """A bucket; DVC finds it by the variables alone."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))  # dvc-s3 fails at the /dev/null that suits boto3
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return connect()


@pytest.fixture
def pushed(store, finished, tmp_path):
    """A copy of the finished workspace, all of it in the bucket and its files committed."""
    shutil.copytree(finished.path, tmp_path / "first" / "project", ignore=shutil.ignore_patterns(".git", "tmp"))
    workspace = type(finished)(tmp_path / "first" / "project")
    for command in (
        ["git", "init", "-q"],
        ["dvc", "remote", "add", "-d", "store", f"s3://{store.bucket}/dvc"],
        ["dvc", "push", "--run-cache"],
        ["git", "add", "--all"],
        [*GIT, "commit", "-q", "-m", "Finish"],
    ):
        result = workspace.run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    return workspace


@pytest.fixture
def clone(pushed):
    """Clone what was committed: another machine, with nothing in its cache."""

    def make(name):
        home = pushed.path.parents[1] / name
        subprocess.run(["git", "clone", "-q", pushed.path, home / "project"], check=True)
        assert not (home / "project" / ".dvc" / "cache").exists()
        assert not (home / "project" / "artifacts").exists()
        return type(pushed)(home / "project")

    return make


@pytest.fixture
def outputs(content):
    """Read everything that the stages of a workspace have written."""

    def read(workspace):
        return {folder: content(workspace.path / folder) for folder in ("artifacts", "reports")}

    return read


@pytest.fixture
def bucket_content(store):
    """Read every object of the bucket: key -> bytes."""

    def read():
        pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read() for key in keys}

    return read


def test_a_clone_pulls_every_result_and_computes_nothing(pushed, clone, outputs):
    """Bit for bit, and `dvc repro` finds nothing to do or to record."""
    other = clone("second")
    result = other.run("dvc", "pull")
    assert result.returncode == 0, result.stdout + result.stderr

    assert outputs(other) == outputs(pushed)
    assert other.repro() == []
    assert outputs(other) == outputs(pushed)
    assert not (other.path / "mlflow.db").exists()


def test_without_dvc_lock_the_run_cache_knows_every_result(pushed, clone, outputs):
    """`dvc repro --pull` asks the bucket what the same code, params and inputs gave, and writes the same dvc.lock."""
    other = clone("third")
    (other.path / "dvc.lock").unlink()

    assert other.repro("--pull") == []
    assert outputs(other) == outputs(pushed)
    assert (other.path / "dvc.lock").read_text() == (pushed.path / "dvc.lock").read_text()
    assert not (other.path / "mlflow.db").exists()


def test_no_pickle_and_no_secret_is_shared(pushed, clone, content, bucket_content, is_pickle):
    """Neither in the bucket nor in the cache that is filled from it; .dvc/config names the bucket and nobody's key."""
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
def test_pickles_would_be_seen(is_pickle, protocol):
    """Of every protocol, and torch's zips; text and tensors are none."""
    weights = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, weights)

    assert is_pickle(pickle.dumps({"a": [1, 2.5, "b"]}, protocol))
    assert is_pickle(weights.getvalue())
    assert not is_pickle(b"step,loss\n0,.5\n")
    assert not is_pickle(b"")
