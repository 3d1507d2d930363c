"""The scans in .ci/ refuse secrets in tracked files and versions with known vulnerabilities."""

import os
import subprocess

import pytest

from tests.swift import BIN

LOCAL = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
# The secrets are in pieces, so that this file passes the scan.
AWS_KEY = "AKIA" + "Q7XYA2MP" * 2
PLANTED = {
    "settings.py": f'aws_access_key_id = "{AWS_KEY}"\n',
    "server.env": "MLFLOW_AUTH_ADMIN_" + "PASSWORD=" + "5f2b9c1d" * 2 + "\n",
    "key.pem": "-----BEGIN RSA " + "PRIVATE KEY-----\n",
    "notes.md": "postgresql://espalier:" + "hunter2hunter2@db.example.org/runs\n",
}


@pytest.fixture
def repository(tmp_path):
    """Create a repository with one file without secrets."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "run.json").write_text('{"sha256": "' + "0123456789abcdef" * 4 + '"}\n')
    return tmp_path


def scan(root, repository):
    """Scan the tracked files of a repository."""
    subprocess.run(["git", "add", "--all"], cwd=repository, check=True)
    command = [root / ".ci" / "secrets"]
    return subprocess.run(command, cwd=repository, env=LOCAL, capture_output=True, text=True, check=False)


def test_hashes_pass_the_scan(root, repository):
    """A repository without secrets passes."""
    assert scan(root, repository).returncode == 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_secret_is_found(root, repository, name):
    """A key or password in a tracked file fails the scan; the output names the file and does not show the secret."""
    (repository / name).write_text(PLANTED[name])
    found = scan(root, repository)

    assert found.returncode != 0
    assert f"{name}:1" in found.stdout
    assert AWS_KEY not in found.stdout + found.stderr


@pytest.mark.parametrize(
    ("service_works", "lock_is_bad", "code"), [(True, False, 0), (True, True, 1), (False, False, 3)]
)
def test_an_audit_without_a_working_service_fails(root, tmp_path, service_works, lock_is_bad, code):
    """The audit passes only if the service reports a known bad version and reports none of the locked versions."""
    fake_audit = tmp_path / "pip-audit"
    report = "echo CVE-2019-10906; exit 1" if service_works else "echo 'No known vulnerabilities found'"
    fake_audit.write_text(f'#!/bin/sh\ncase "$*" in *requirements.lock*) exit {int(lock_is_bad)};; esac\n{report}\n')
    fake_audit.chmod(0o755)
    found = subprocess.run(
        [root / ".ci" / "audit"],
        env={**LOCAL, "PATH": f"{tmp_path}{os.pathsep}{LOCAL['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == code
    assert len(found.stderr.splitlines()) == (code == 3)
