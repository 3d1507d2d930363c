"""Git repositories of tests and their commits."""

import subprocess

AUTHOR = ("-c", "user.name=t", "-c", "user.email=t@example.org")


def git(folder, *arguments):
    """Run git; returns its output."""
    result = subprocess.run(["git", *AUTHOR, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def commit(folder, message="x"):
    """Commit every file that git does not ignore: the hash."""
    git(folder, "add", "--all")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


def make_repository(folder):
    """Make a folder a repository with one commit of its files: the hash."""
    git(folder, "init", "-q")
    return commit(folder)
