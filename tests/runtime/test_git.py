"""Git commands with an address that holds a password."""

import os
import subprocess

import pytest

from stages.runtime.git import credential_variables, git_error, without_git_variables, without_user

PASSWORD = "p@ss/word"  # of nobody
ADDRESS = "https://me:p%40ss%2Fword@host:8443/espalier.git"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (ADDRESS, "https://host:8443/espalier.git"),
        ("http://token@host/a@b.git", "http://host/a@b.git"),
        ("https://host/a.git", "https://host/a.git"),
        ("ssh://git@host/a.git", "ssh://git@host/a.git"),
        ("git@host:a.git", "git@host:a.git"),
        ("/home/me/a.git", "/home/me/a.git"),
        ("", ""),
    ],
)
def test_only_http_addresses_lose_their_user(address, expected):
    """That of ssh is no secret, and needed."""
    assert without_user(address) == expected


def test_git_gets_the_password_for_its_host_alone():
    """Git asks its helper, as it would ask a person."""
    environment = {**without_git_variables(), **credential_variables(ADDRESS), "GIT_TERMINAL_PROMPT": "0"}
    found = [
        subprocess.run(
            ["git", "credential", "fill"],
            input=f"protocol=https\nhost={host}\n",
            env={**environment, "GIT_ASKPASS": "true"},
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for host in ("host:8443", "other")
    ]

    assert f"username=me\npassword={PASSWORD}\n" in found[0]
    assert PASSWORD not in found[1]


def test_no_argument_shows_the_password(tmp_path, monkeypatch):
    """Every user of a machine sees the arguments of all processes."""
    (tmp_path / "git").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    git_error(None, "clone", "--", without_user(ADDRESS), "place", address=ADDRESS)

    assert (tmp_path / "arguments").read_text() == "clone -- https://host:8443/espalier.git place\n"
