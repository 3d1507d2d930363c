"""What .ci/ lets through: no secret in a file that git tracks, no version with a known vulnerability."""

import os
import subprocess

import pytest

from tests.swift import BIN

LOCAL = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
# Put together here, or this file would not pass the scan itself.
AWS_KEY = "AKIA" + "Q7XYA2MP" * 2
PLANTED = {
    "settings.py": f'aws_access_key_id = "{AWS_KEY}"\n',
    "server.env": "MLFLOW_AUTH_ADMIN_" + "PASSWORD=" + "5f2b9c1d" * 2 + "\n",
    "key.pem": "-----BEGIN RSA " + "PRIVATE KEY-----\n",
    "notes.md": "postgresql://espalier:" + "hunter2hunter2@db.example.org/runs\n",
}


@pytest.fixture
def repository(tmp_path):
    """Make a repository with one harmless file."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "run.json").write_text('{"sha256": "' + "0123456789abcdef" * 4 + '"}\n')
    return tmp_path


def scan(root, repository):
    """Scan what git tracks there."""
    subprocess.run(["git", "add", "--all"], cwd=repository, check=True)
    command = [root / ".ci" / "secrets"]
    return subprocess.run(command, cwd=repository, env=LOCAL, capture_output=True, text=True, check=False)


def test_hashes_are_no_secrets(root, repository):
    """A repository that holds none passes."""
    assert scan(root, repository).returncode == 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_secret_is_found(root, repository, name):
    """A key or password in a tracked file fails the scan, which names the file and not the secret."""
    (repository / name).write_text(PLANTED[name])
    found = scan(root, repository)

    assert found.returncode != 0
    assert f"{name}:1" in found.stdout
    assert AWS_KEY not in found.stdout + found.stderr


def test_this_repository_holds_no_secret(root):
    """Nothing that is tracked here looks like one."""
    command = [root / ".ci" / "secrets"]
    found = subprocess.run(command, cwd=root, env=LOCAL, capture_output=True, text=True, check=False)

    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("knows_the_bad_one", "lock_is_bad", "code"), [(True, False, 0), (True, True, 1), (False, False, 3)]
)
def test_an_audit_that_asked_nobody_is_none(root, tmp_path, knows_the_bad_one, lock_is_bad, code):
    """It passes only if a service that knows an old bad version knows nothing of ours."""
    stand_in = tmp_path / "pip-audit"
    told = "echo CVE-2019-10906; exit 1" if knows_the_bad_one else "echo 'No known vulnerabilities found'"
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *requirements.lock*) exit {int(lock_is_bad)};; esac\n{told}\n')
    stand_in.chmod(0o755)
    found = subprocess.run(
        [root / ".ci" / "audit"],
        env={**LOCAL, "PATH": f"{tmp_path}{os.pathsep}{LOCAL['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == code
    assert len(found.stderr.splitlines()) == (code == 3)
