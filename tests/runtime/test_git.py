"""Git commands with an address that holds a password."""

import subprocess
from urllib.parse import quote

import pytest

from stages.runtime.git import credential_variables, without_git_variables, without_user

WORD = "p@ss/word"
ADDRESS = f"https://me:{quote(WORD, safe='')}@host:8443/espalier.git"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (ADDRESS, "https://host:8443/espalier.git"),
        ("http://token@host/a@b.git", "http://host/a@b.git"),
        ("https://host/a.git", "https://host/a.git"),
        ("https://host:8443/a@b.git", "https://host:8443/a@b.git"),
        ("https://me:pa/ss@host/a.git", "https://host/a.git"),
        ("ssh://git@host/a.git", "ssh://git@host/a.git"),
        ("git@host:a.git", "git@host:a.git"),
        ("/home/me/a.git", "/home/me/a.git"),
        ("", ""),
    ],
)
def test_only_http_addresses_lose_their_user(address, expected):
    """That of ssh is no secret, and needed."""
    assert without_user(address) == expected


@pytest.mark.parametrize(
    ("address", "host", "expected"),
    [
        (ADDRESS, "host:8443", ["me", WORD]),
        (ADDRESS, "other", ["her", "hers"]),
        ("https://other/espalier.git", "other", ["her", "hers"]),
        ("https://him@other/espalier.git", "other", ["him", "his"]),
        (f"https://me:{'a[b'}@host/espalier.git", "other", ["her", "hers"]),
    ],
)
def test_git_gets_the_password_for_its_host_alone(tmp_path, address, host, expected):
    """Before what its own helpers know; without a password they look for that of the user."""
    (tmp_path / ".gitconfig").write_text("[credential]\n    helper = store\n")
    known = [("her", "hers", "other"), ("him", "his", "other"), ("her", "hers", "host:8443")]
    lines = [f"https://{user}:{word}@{place}\n" for user, word, place in known]
    (tmp_path / ".git-credentials").write_text("".join(lines))
    environment = {**without_git_variables(), **credential_variables(address), "HOME": str(tmp_path)}
    result = subprocess.run(
        ["git", "credential", "fill"],
        input=f"protocol=https\nhost={host}\n",
        env={**environment, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = dict(line.split("=", 1) for line in result.stdout.splitlines())

    assert [found.get("username"), found.get("password")] == expected, result.stderr
