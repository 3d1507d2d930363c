"""A commit and overrides -> a workspace: from real git repositories, with the project's own dvc.yaml."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from dvc.config import Config
from hypothesis import given, strategies
from ruamel.yaml import YAML

from flows.workspaces.dvc_config import LINKS
from flows.workspaces.repository import HOME_VARIABLE, REPOSITORY_VARIABLE, Repository, hash_overrides
from flows.workspaces.staleness import Cache
from flows.workspaces.workspace import current_checkout, open_workspace
from stages.runtime.errors import InputError, UnavailableError
from tests.records import STAGES
from tests.repository import commit, git, make_repository
from tests.servers import ROOT

TRACKING = "MLFLOW_TRACKING_URI"
HIDDEN = "hunter2"
LOCAL = """[core]
    remote = store
[cache]
    dir = ../shared/cache
    type = symlink
['remote "store"']
    url = s3://bucket/dvc
    access_key_id = me
    session_token = "a, b#c"
"""
OPEN = """
import sys
from flows.workspaces.workspace import open_workspace

with open_workspace("HEAD", {"finetune.steps": 7}, lambda line: print(line, flush=True)):
    print("inside", flush=True)
    sys.stdin.read()
"""
ANOTHER_USER = """
import os
import click
import ruamel.yaml.mergevalue  # which ruamel imports late
from flows.workspaces.workspace import open_workspace

if os.geteuid() == 0:  # another user may not read this Python, so the user changes after the imports
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

@click.command()
def main():
    with open_workspace("HEAD", {}, print):
        pass

main()
"""
EXCLUSIVE = """
import sys
from pathlib import Path
from flows.workspaces.workspace import Workspace

workspace = Workspace(Path(), Path(), "another", locks=Path(sys.argv[1]))
for key in ("other work", sys.argv[2]):
    with workspace.exclusive(key, print):
        print(key)
"""


def dvc(folder, *arguments):
    """Run DVC; returns its output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    command = ["dvc", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_project(root, path):
    """Make a small project with one commit."""
    (path / ".dvc").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvc/config"):
        shutil.copyfile(root / name, path / name)
    (path / ".dvc" / ".gitignore").write_text("/config.local\n/cache\n/tmp\n")
    make_repository(path)
    return path


def read(path):
    """Read YAML."""
    return YAML(typ="safe").load(path.read_text())


def all_files(folder):
    """Every file of a checkout, with its content; what runs keep of their own is not of it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".espalier" not in path.parts}


@pytest.fixture
def project(root, tmp_path, monkeypatch):
    """The project as the current folder; the environment names no other."""
    path = make_project(root, tmp_path / "project")
    for name in (HOME_VARIABLE, REPOSITORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TRACKING, "sqlite:///mlflow.db")  # monkeypatch restores it after the test
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def elsewhere(project, tmp_path, monkeypatch):
    """The same project as an address; the current folder is no project."""
    folder = tmp_path / "worker"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(REPOSITORY_VARIABLE, f"file://{project}")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return SimpleNamespace(origin=project, repository=tmp_path / "home")


@pytest.fixture
def enter():
    """Open a workspace and leave it: its path, params and log."""

    def once(commit_="HEAD", **overrides):
        log = []
        with open_workspace(commit_, {key.replace("__", "."): it for key, it in overrides.items()}, log.append) as it:
            return SimpleNamespace(workspace=it, path=it.path, log=log, params=read(it.path / "params.yaml"))

    return once


def config(workspace):
    """Read the settings of DVC that are a workspace's own."""
    return Config(str(workspace.path / ".dvc")).read("local")


def test_the_commit_is_cloned_and_not_the_folder(project, enter):
    """What is not committed stays out, with a warning that names it; the checkout is not touched."""
    first = git(project, "rev-parse", "HEAD")
    (project / "dvc.yaml").write_text("stages: {}\n")
    (project / "new").write_text("new")
    git(project, "add", "new")
    before, index = all_files(project), git(project, "status", "--porcelain")

    found = enter(finetune__steps=7)

    assert found.workspace.commit == first == git(found.path, "rev-parse", "HEAD")
    assert not (found.path / "new").exists()
    assert "fetch" in [stage.name for stage in found.workspace.stages]
    assert found.log == [f"Warning: this run uses commit {first[:12]}, since which dvc.yaml, new changed"]
    assert (git(project, "status", "--porcelain"), all_files(project)) == (index, before)


def test_an_older_commit_is_had_by_hash_branch_and_tag(project, enter):
    """All three are the same workspace; a commit by name needs no warning of what changed."""
    first = git(project, "rev-parse", "HEAD")
    git(project, "branch", "old")
    git(project, "tag", "-a", "v1", "-m", "v1")
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 0", "seed: 5"))
    commit(project)

    found = [enter(name) for name in (first, first[:9], "old", "v1")]

    assert {it.path for it in found} == {found[0].path}
    assert [it.params["seed"] for it in found] == [0] * 4
    assert [it.log for it in found] == [[]] * 4
    assert enter().params["seed"] == 5


def test_overrides_land_in_the_workspace_alone(project, enter):
    """The workspace's params.yaml has them; its other files and the checkout stay unchanged."""
    before = (project / "params.yaml").read_bytes()

    found = enter(finetune__steps=7, prune__target__macs="56%")

    assert (found.params["finetune"]["steps"], found.params["prune"]["target"]) == (7, {"macs": "56%"})
    assert (project / "params.yaml").read_bytes() == before
    assert git(found.path, "status", "--porcelain") == "M params.yaml"
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.usefixtures("project")
def test_a_workspace_that_was_used_is_as_it_was_asked_for(enter):
    """Opened again, its params are those of commit and overrides, and what a run left in it is still there."""
    first = enter(finetune__steps=7)
    (first.path / "params.yaml").write_text("seed: 9\n")
    (first.path / "checkpoint").write_text("step 100")
    again = enter(finetune__steps=7)

    assert again.path == first.path
    assert again.params == first.params
    assert (again.path / "checkpoint").read_text() == "step 100"


@given(strategies.permutations([("finetune.steps", 7), ("seed", 1), ("prune.target.macs", "56%")]))
def test_the_order_of_overrides_names_nothing(pairs):
    """Any order is the same name."""
    assert hash_overrides(dict(pairs)) == hash_overrides({"finetune.steps": 7, "seed": 1, "prune.target.macs": "56%"})


def test_commit_and_overrides_name_a_workspace(project, enter):
    """The same ones share it, in whatever order; one other value, key or commit has its own."""
    one = enter(finetune__steps=7, seed=1)
    other = enter(seed=1, finetune__steps=7)
    unlike = [enter(), enter(seed=1), enter(finetune__steps=8, seed=1), enter(finetune__steps=7, seed=2)]
    (project / "another").write_text("x")
    commit(project)
    unlike.append(enter(finetune__steps=7, seed=1))

    assert one.path == other.path
    assert len({it.path for it in (one, *unlike)}) == 6


def test_a_torn_clone_is_replaced(project, enter):
    """Remains of a killed run are removed, beside the workspace as well as in its place."""
    path = enter(finetune__steps=7).path
    shutil.rmtree(path / ".git")
    (path / "half").write_text("half")
    aside = path.with_name(f".{path.name}.abcd")
    aside.mkdir()
    (aside / "half").write_text("half")
    other = path.with_name(".somebody-else.abcd")
    other.mkdir()

    again = enter(finetune__steps=7)

    assert again.path == path
    assert git(path, "rev-parse", "HEAD") == git(project, "rev-parse", "HEAD")
    assert not (path / "half").exists()
    assert not aside.exists()
    assert other.exists()


def test_a_workspace_at_another_commit_is_replaced(project, enter):
    """It is no use that a repository stands there; which commit it has is what counts."""
    path = enter().path
    head = git(project, "rev-parse", "HEAD")
    (path / "another").write_text("x")
    git(path, "add", "another")
    git(path, "commit", "-qm", "another")

    assert git(enter().path, "rev-parse", "HEAD") == head


def test_a_clone_that_fails_leaves_nothing(project, enter):
    """One line, and no folder by halves: an object of the commit is damaged."""
    tree = git(project, "rev-parse", "HEAD:.dvc")
    (project / ".git" / "objects" / tree[:2] / tree[2:]).unlink()

    with pytest.raises(InputError, match=r"no workspace for [0-9a-f]{12} of ") as caught:
        enter()

    assert len(caught.value.message.splitlines()) == 1
    assert list((project / ".espalier" / "workspaces").iterdir()) == []


@pytest.mark.usefixtures("project")
def test_a_second_process_waits_for_the_first():
    """It logs that it waits, and continues when the first ends or is killed."""

    def start():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", OPEN], **pipes)

    processes = [start()]
    try:
        assert processes[0].stdout.readline() == "inside\n"
        for end in ("kill", "finish"):
            processes.append(start())
            assert re.match("waiting for another run that does the same work", processes[-1].stdout.readline())
            assert processes[-1].poll() is None
            if end == "kill":
                processes[-2].kill()
            else:
                processes[-2].stdin.close()
            assert processes[-1].stdout.readline() == "inside\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()


def test_other_overrides_do_not_wait(project, enter):
    """Two workspaces are open at once."""
    with open_workspace("HEAD", {"seed": 1}, print) as one:
        other = enter(seed=2)

    assert one.path != other.path
    assert one.locks == other.workspace.locks == project / ".espalier" / "locks"


def test_origin_is_where_the_version_can_be_had_from(project, enter):
    """The repository's own remote, not the folder of this machine; where it has none, none."""
    assert git(enter(seed=1).path, "remote") == ""

    git(project, "remote", "add", "origin", "git@example.org:me/espalier.git")

    assert git(enter(seed=2).path, "remote", "get-url", "origin") == "git@example.org:me/espalier.git"


def test_a_git_hook_starts_no_run_in_its_own_repository(project, tmp_path, enter, monkeypatch):
    """The variables that git sets for its hooks name another repository."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nowhere" / "index"))

    assert (enter().path / "dvc.yaml").read_bytes() == (project / "dvc.yaml").read_bytes()


def test_all_share_the_cache_of_the_checkout(project, enter):
    """Outputs are links where the file system has them; a command in the workspace uses no other cache."""
    found = config(enter().workspace)["cache"]

    assert found == {"dir": str(project / ".dvc" / "cache"), "type": LINKS}


def test_a_home_has_a_cache_of_its_own(project, tmp_path, enter, monkeypatch):
    """ESPALIER_HOME holds everything: cache, locks, workspaces, unsent records; the checkout gets nothing."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    before = all_files(project)

    found = enter()

    assert config(found.workspace)["cache"]["dir"] == str(tmp_path / "home" / "cache")
    assert found.path.parent == tmp_path / "home" / "workspaces"
    assert (found.workspace.unsent, found.workspace.locks) == (
        tmp_path / "home" / "unsent",
        tmp_path / "home" / "locks",
    )
    assert all_files(project) == before
    assert not (project / ".espalier").exists()


def test_settings_of_the_users_own_are_kept(project, enter):
    """A cache elsewhere, how it links, and secrets of a remote stand in config.local, which no commit has."""
    (project / ".dvc" / "config.local").write_text(LOCAL)
    before = (project / ".dvc" / "config.local").read_bytes()

    found = enter()

    own = config(found.workspace)
    assert own["cache"] == {"dir": str(project / "shared" / "cache"), "type": "symlink"}
    assert own["remote"]["store"] == {"url": "s3://bucket/dvc", "access_key_id": "me", "session_token": "a, b#c"}
    assert found.workspace.has_remote
    assert stat.S_IMODE((found.path / ".dvc" / "config.local").stat().st_mode) == 0o600
    assert (project / ".dvc" / "config.local").read_bytes() == before


def test_a_relative_remote_is_the_same_folder_from_a_workspace(project, tmp_path, enter):
    """DVC resolves a path relative to its config file; an address stays unchanged."""
    dvc(project, "remote", "add", "--default", "near", "../store")
    dvc(project, "remote", "add", "far", "s3://bucket/dvc")
    assert "url = ../../store" in (project / ".dvc" / "config").read_text()
    commit(project)

    found = enter()

    printed = dvc(found.path, "remote", "list").split()  # which wraps long lines
    assert printed[:2] == ["near", str(tmp_path / "store")]
    assert printed[-2:] == ["far", "s3://bucket/dvc"]
    assert found.workspace.has_remote


def test_paths_mean_the_same_in_a_workspace(project, tmp_path, enter, monkeypatch):
    """Those below the user's own folder, with characters that a config quotes, and in the configs of the user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home of mü"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "dvc").mkdir(parents=True)
    (tmp_path / "xdg" / "dvc" / "config").write_text(
        "[core]\n    remote = far\n['remote \"far\"']\n    url = s3://b/c\n"
    )
    dvc(project, "remote", "add", "near", "~/store")
    with (project / ".dvc/config").open("a") as file:
        file.write(f'[cache]\n    dir = "{tmp_path}/a, b#ü"\n')
    commit(project)

    found = enter()

    assert Config(str(found.path / ".dvc"))["remote"]["near"]["url"] == str(tmp_path / "home of mü" / "store")
    assert dvc(found.path, "cache", "dir").strip() == str(tmp_path / "a, b#ü")
    assert Cache.of_project(found.path).folder == tmp_path / "a, b#ü"
    assert found.workspace.has_remote


def test_without_a_remote_there_is_none_to_push_to(project, enter):
    """One that is listed but not the default is none, either."""
    assert not enter(seed=1).workspace.has_remote

    with (project / ".dvc" / "config").open("a") as file:
        file.write("['remote \"store\"']\n    url = s3://bucket/dvc\n")
    commit(project)

    assert not enter(seed=2).workspace.has_remote


def test_dvc_reads_the_settings_of_a_workspace(project, enter):
    """It finds the cache of the checkout from the workspace."""
    assert dvc(enter().path, "cache", "dir").strip() == str(project / ".dvc" / "cache")


@pytest.mark.parametrize("content", [b"[cache\n", b"[cache]\n[cache]\n", b"cache = x\n", b"remote = x\n", b"\xff\xfe"])
def test_a_damaged_config_is_one_line(project, enter, content):
    """The message names the remedy."""
    (project / ".dvc" / "config.local").write_bytes(content)

    with pytest.raises(InputError, match=r"DVC's config cannot be read .*; correct \.dvc/config") as caught:
        enter()
    assert len(caught.value.message.splitlines()) == 1


def test_an_address_is_mirrored(elsewhere, enter):
    """It is cloned once and updated when it has a new commit; the workspace's origin is the address."""
    first = enter()
    (elsewhere.origin / "new").write_text("new")
    head = commit(elsewhere.origin)
    second = enter()

    assert first.path.parent == elsewhere.repository / "workspaces"
    assert second.workspace.commit == head != first.workspace.commit
    assert (second.path / "new").read_text() == "new"
    assert len([path for path in (elsewhere.repository / "mirrors").iterdir() if path.is_dir()]) == 1
    assert git(second.path, "remote", "get-url", "origin") == f"file://{elsewhere.origin}"
    assert config(second.workspace)["cache"]["dir"] == str(elsewhere.repository / "cache")
    assert second.log == []


def test_a_branch_that_was_rewritten_is_the_new_one(elsewhere, enter):
    """A mirror keeps nothing that its origin gave up."""
    git(elsewhere.origin, "branch", "work")
    enter("work")
    (elsewhere.origin / "new").write_text("new")
    git(elsewhere.origin, "add", "new")
    git(elsewhere.origin, "commit", "--amend", "-qm", "rewritten")
    git(elsewhere.origin, "branch", "--force", "work")

    assert enter("work").workspace.commit == git(elsewhere.origin, "rev-parse", "work")

    git(elsewhere.origin, "branch", "-D", "work")
    with pytest.raises(InputError, match="has no commit 'work'"):
        enter("work")


def test_head_of_an_address_is_what_it_is_now(elsewhere, enter):
    """A mirror follows when the repository gets another default branch, loses the first, or has no branch as HEAD."""
    old = git(elsewhere.origin, "symbolic-ref", "--short", "HEAD")
    first = enter().workspace.commit
    for number, command in enumerate((["-B", "other"], ["-B", "third"], ["--detach"])):
        git(elsewhere.origin, "checkout", "-q", *command)
        (elsewhere.origin / "new").write_text(str(number))
        head = commit(elsewhere.origin)

        assert enter().workspace.commit == head != first
        if command[-1] == "third":
            git(elsewhere.origin, "branch", "-q", "-D", old, "other")
    git(elsewhere.origin, "checkout", "-q", "third")
    assert enter().workspace.commit == git(elsewhere.origin, "rev-parse", "third") != head


def test_a_bare_repository_is_cloned_from(project, tmp_path, enter, monkeypatch):
    """A folder with no checkout; the user's own settings of DVC are not its own, and nothing is put into it."""
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "-q", "--bare", str(project), str(bare))
    monkeypatch.setenv(REPOSITORY_VARIABLE, str(bare))
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    before = all_files(bare)

    found = enter(seed=1)

    assert found.workspace.commit == git(project, "rev-parse", "HEAD")
    assert found.params["seed"] == 1
    assert config(found.workspace)["cache"]["dir"] == str(tmp_path / "home" / "cache")
    assert all_files(bare) == before


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "has no commit 'nowhere'"),
        ("0" * 40, "has no commit '0000"),
        ("", "has no commit ''"),
        ("--output=stolen", "has no commit '--output=stolen'"),
        ("HEAD:params.yaml", "has no commit 'HEAD:params.yaml'"),
        ("HEAD\nHEAD", "has no commit"),
    ],
)
def test_an_unknown_commit_is_one_line(project, enter, name, message):
    """The message names the repository and the remedy; no workspace is made."""
    with pytest.raises(InputError, match=message) as caught:
        enter(name)

    assert "give a branch, tag or hash" in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert not isinstance(caught.value, UnavailableError)
    assert not (project / ".espalier" / "workspaces").exists()
    assert git(project, "status", "--porcelain") == ""


def test_a_commit_of_another_project_is_one_line(project, enter):
    """It has no params.yaml."""
    git(project, "rm", "-q", "params.yaml")
    commit(project)

    with pytest.raises(InputError, match=r"commit [0-9a-f]{12} has no params\.yaml; give a commit of this project"):
        enter()


def test_a_commit_without_dvc_is_one_line(project, enter):
    """Its outputs could not be cached; no workspace is left."""
    git(project, "rm", "-qr", ".dvc")
    commit(project)

    with pytest.raises(InputError, match="dvc init") as caught:
        enter()
    assert len(caught.value.message.splitlines()) == 1


def test_a_wrong_override_is_refused_before_anything_is_cloned(project, enter):
    """It is checked against the commit's params."""
    with pytest.raises(InputError, match=r"finetune\.steps is 'many'"):
        enter(finetune__steps="many")

    assert not (project / ".espalier" / "workspaces").exists()


def test_a_folder_that_is_no_repository_is_one_line(tmp_path, project, enter, monkeypatch):  # noqa: ARG001
    """It has no commit."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path / "empty")

    with pytest.raises(InputError, match="has no commit 'HEAD'"):
        enter()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to another user")
def test_a_repository_of_another_user_is_reported(project, tmp_path, enter, monkeypatch):
    """The message is git's, which refuses it for safety; 'no such commit' alone would mislead."""
    os.chown(project, 65534, 65534)
    os.chown(project / ".git", 65534, 65534)
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(InputError, match="dubious ownership") as caught:
        enter()
    assert len(caught.value.message.splitlines()) == 1


def test_a_root_folder_that_cannot_be_made_is_one_line(project, tmp_path, enter, monkeypatch):  # noqa: ARG001
    """A file stands in its way; root may write everywhere, so rights would not do."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "file" / "home"))

    with pytest.raises(
        InputError, match=rf"cannot be made \(Not a directory\); set {HOME_VARIABLE} to a folder that can"
    ):
        enter()


@pytest.mark.parametrize("closed", ["home", "home/locks", "home/workspaces"])
def test_a_root_folder_without_permission_is_one_line(project, tmp_path, closed):  # noqa: ARG001
    """Whether it is to be made or there already; root may write everywhere, so another user tries it."""
    temporary = Path(tempfile.gettempdir())
    for path in (tmp_path, *(it for it in tmp_path.parents if temporary in it.parents)):
        path.chmod(0o755)
    (tmp_path / closed).mkdir(parents=True)
    for path in (tmp_path / "home", *(tmp_path / "home").iterdir()):
        path.chmod(0o777)
    (tmp_path / closed).chmod(0o555)
    (tmp_path / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        HOME_VARIABLE: str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }

    command = [sys.executable, "-c", ANOTHER_USER]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "ermission denied" in result.stderr
    assert HOME_VARIABLE in result.stderr


def test_an_address_needs_a_root_folder(elsewhere, enter, monkeypatch):  # noqa: ARG001
    """There is no folder of its own to put anything into."""
    monkeypatch.delenv(HOME_VARIABLE)

    with pytest.raises(
        InputError, match=rf"no folder here; correct it, or set {HOME_VARIABLE} to a folder for workspaces"
    ):
        enter()


def test_no_argument_of_git_shows_the_password_of_an_address(elsewhere, tmp_path, enter, monkeypatch):
    """Every user of a machine sees the arguments of all processes; they get it from the environment."""
    program, (folder, log) = shutil.which("git"), (tmp_path / "bin", tmp_path / "calls")
    folder.mkdir()
    address = f"http://me:{HIDDEN}@127.0.0.1:9/espalier.git"
    redirected = f"-c url.file://{elsewhere.origin}.insteadOf=http://127.0.0.1:9/espalier.git"
    (folder / "git").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nenv | grep ESPALIER_GIT_PASSWORD >> {log}\nexec {program} {redirected} "$@"\n'
    )
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv(REPOSITORY_VARIABLE, address)
    found = [enter(seed=seed) for seed in (1, 2)]  # a new mirror, and one that is brought up to date
    calls = log.read_text().splitlines()

    assert {line.partition("=")[0] for line in calls if HIDDEN in line} == {"ESPALIER_GIT_PASSWORD"}
    assert sum(line.startswith("clone --quiet --mirror") for line in calls) == 1
    assert any(line.startswith("remote update") or " remote update" in line for line in calls)
    for place in (*(it.path for it in found), *(elsewhere.repository / "mirrors").glob("*/")):
        texts = [path.read_text(errors="replace") for path in place.rglob("config") if path.is_file()]
        assert texts
        assert not any(HIDDEN in text for text in texts)


def test_a_repository_that_does_not_answer_may_later(elsewhere, tmp_path, enter, monkeypatch):
    """UnavailableError, by which a flow tries again; no mirror by halves is left, and the next time it works."""
    monkeypatch.setenv(REPOSITORY_VARIABLE, f"file://{tmp_path}/later")

    with pytest.raises(UnavailableError, match=r"/later cannot be cloned: ") as caught:
        enter()
    assert len(caught.value.message.splitlines()) == 1
    assert [path for path in (elsewhere.repository / "mirrors").iterdir() if path.is_dir()] == []

    elsewhere.origin.rename(tmp_path / "later")
    assert enter().workspace.commit


def test_a_mirror_of_a_repository_that_is_gone_is_not_used(elsewhere, tmp_path, enter):
    """What it has may be old, so it is not used instead."""
    enter()
    elsewhere.origin.rename(tmp_path / "gone")

    with pytest.raises(UnavailableError, match="cannot be cloned: "):
        enter()


def test_a_commit_that_the_mirror_has_needs_no_repository(elsewhere, tmp_path, enter):
    """A series whose commit is resolved goes on while the repository does not answer."""
    head = enter().workspace.commit
    elsewhere.origin.rename(tmp_path / "gone")

    assert enter(head).workspace.commit == head
    with pytest.raises(UnavailableError, match="cannot be cloned: "):
        enter("0" * 40)


@pytest.mark.parametrize("has_home", [True, False])
def test_a_password_in_the_address_is_not_printed(elsewhere, enter, monkeypatch, has_home):  # noqa: ARG001
    """Neither our message nor git's contains it; no server listens at that port."""
    monkeypatch.setenv(REPOSITORY_VARIABLE, f"http://me:{HIDDEN}@127.0.0.1:9/espalier.git")
    monkeypatch.setenv("GIT_TERMINAL_PROMPT", "0")
    if not has_home:
        monkeypatch.delenv(HOME_VARIABLE)

    with pytest.raises(InputError) as caught:
        enter()

    assert "127.0.0.1:9/espalier.git" in caught.value.message
    assert HIDDEN not in caught.value.message
    assert isinstance(caught.value, UnavailableError) == has_home


@pytest.fixture
def keys(project):
    """Name what each stage would make with some text of params.yaml replaced, in the checkout itself."""

    def name(old="", new=""):
        file = project / "params.yaml"
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new, 1))
        found = current_checkout().keys()
        file.write_text(before)
        return found

    return name


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        (
            "criterion: diff-pruning",
            "criterion: random",
            "importance prune rounds finetune evaluate variants costs report",
        ),
        ("steps: 450", "steps: 7", "rounds finetune evaluate variants costs report"),
        ("num_images: 500", "num_images: 300", "reference evaluate variants costs report"),
        ("repeats: 50", "repeats: 7", "costs report"),
        (
            "heldout: 0.2",
            "heldout: 0.3",
            "fetch reference importance prune rounds finetune evaluate variants costs report",
        ),
        ("seed: 0", "seed: 1", "reference importance prune rounds finetune evaluate variants costs report"),
        ("seed: 0", "seed: 0", ""),
        ("spacing: leading, steps: 50", "steps: 50, spacing: leading", ""),
    ],
)
def test_a_key_changes_with_its_params_and_what_it_needs(keys, old, new, changed):
    """It changes with nothing else: stages with equal outputs have equal keys."""
    one, other = keys(), keys(old, new)

    assert list(one) == list(other) == STAGES
    assert {stage for stage in one if one[stage] != other[stage]} == set(changed.split())


@pytest.mark.usefixtures("project")
def test_cells_share_what_they_have_in_common(enter):
    """Two workspaces of one commit have equal names for equal work, which is done by one and awaited by the other."""
    names = []
    for overrides in ({"importance__criterion": "random"}, {"importance__criterion": "magnitude"}):
        with open_workspace("HEAD", {key.replace("__", "."): it for key, it in overrides.items()}, print) as workspace:
            names.append(workspace.keys())
    one, other = names

    assert [stage for stage in one if one[stage] == other[stage]] == ["code", "fetch", "reference"]
    assert enter().workspace.environment == {}


def test_another_commit_is_other_work(project, enter):
    """The code may differ, so no stage waits for a stage of another commit."""
    one = enter(seed=1)
    first = keys_of(one)
    (project / "new").write_text("new")
    commit(project)

    assert set(first.values()).isdisjoint(keys_of(enter(seed=1)).values())


def keys_of(found):
    """Name what the stages of a workspace would make."""
    return found.workspace.keys()


@pytest.mark.usefixtures("project")
def test_the_same_work_is_done_once_at_a_time():
    """The first workspace does it; a second logs that it waits, and does not wait for other work."""
    with open_workspace("HEAD", {"seed": 1}, print) as workspace:
        key = workspace.keys()["fetch"]
        with workspace.exclusive(key, print):
            command = [sys.executable, "-uc", EXCLUSIVE, str(workspace.locks), key]
            second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert second.stdout.readline() == "other work\n"
            assert second.stdout.readline().startswith("waiting for another run")
            assert second.poll() is None
    assert second.communicate(timeout=60) == (f"{key}\n", None)


def test_only_a_workspace_can_be_removed(project, enter):
    """The user's own checkout never goes."""
    found = enter().workspace
    assert found.path.is_dir()
    found.remove()
    assert not found.path.exists()

    current_checkout().remove()
    assert (project / "params.yaml").is_file()


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (None, "sqlite:///{base}/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///{base}/mlflow.db"),
        ("sqlite:///below/it.db", "sqlite:///{base}/below/it.db"),
        ("sqlite:////var/mlflow.db", "sqlite:////var/mlflow.db"),
        ("sqlite:///below/it.db?timeout=30", "sqlite:///{base}/below/it.db?timeout=30"),
        ("sqlite:////var/it.db?timeout=30", "sqlite:////var/it.db?timeout=30"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite:///file:/why%3F/mlflow.db?uri=true", "sqlite:///file:/why%3F/mlflow.db?uri=true"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://me@host/mlflow", "postgresql://me@host/mlflow"),
    ],
)
@pytest.mark.parametrize("has_home", [True, False])
def test_all_keep_one_record(project, tmp_path, monkeypatch, given_, expected, has_home):
    """A relative file would be another one in each workspace, so it becomes an absolute path; an address stays."""
    if has_home:
        monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    if given_ is None:
        monkeypatch.delenv(TRACKING)
    else:
        monkeypatch.setenv(TRACKING, given_)

    Repository.find()

    assert os.environ[TRACKING] == expected.format(base=tmp_path / "home" if has_home else project)
