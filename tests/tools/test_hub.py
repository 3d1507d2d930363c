"""A released model goes to the Hub in one commit, and comes back file by file with its hashes."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from stages.models.layout import PLAN
from stages.register.package import hash_list, list_files
from stages.storage.files import write_json
from stages.tools.__main__ import main
from tests.hub import TOKEN, Repository, hub

__all__ = ["hub"]
REPO = "me/small"
FILES = {
    "README.md": b"---\nlibrary_name: diffusers\n---\n\n# small\n",
    PLAN: b"{}\n",
    "model_index.json": b"{}\n",
    "run.json": b'{"stage": "finetune", "params": {}}\n',
    "unet/config.json": b'{"auto_map": {"AutoModel": "pruned_unet.PrunedUNet2DModel"}}\n',
    "unet/pruned_unet.py": b"# the class\n",
    "unet/diffusion_pytorch_model.safetensors": b"weights" * 100,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def released(tmp_path):
    """A folder with the files of a released model."""
    for name, content in FILES.items():
        (tmp_path / "released" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "released" / name).write_bytes(content)
    return tmp_path / "released"


def run(*arguments):
    """Type a command; returns its exit code and lines."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output.splitlines()


def test_a_pushed_model_comes_back_bit_for_bit(hub, released, tmp_path):
    """The line that push prints pulls it, with one commit in a private repository, and no token in any output."""
    code, lines = run("push", released, REPO)
    command = [word.replace("FOLDER", str(tmp_path / "back")) for word in lines[-1].split()]
    pulled = run(*command[1:])
    repository = hub.repositories[REPO]
    commit, files = repository.history[-1]

    assert (code, pulled[0]) == (0, 0), (lines, pulled)
    assert command[:3] == ["espalier", "pull", REPO]
    assert repository.private
    assert len(repository.history) == 2
    assert {path: content for path, content in files.items() if path != "files.json"} == FILES
    assert pulled[1][-1].startswith(f"8 files of {REPO} at {commit} are as listed")
    back = {path.relative_to(tmp_path / "back").as_posix(): path for path in (tmp_path / "back").rglob("*")}
    assert {name: path.read_bytes() for name, path in back.items() if path.is_file()} == files
    assert TOKEN not in "".join([*lines, *pulled[1]])


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(hub, released, monkeypatch):
    """It needs no token."""
    monkeypatch.delenv("HF_TOKEN")
    code, lines = run("push", released, REPO, "--dry-run")

    assert code == 0
    assert [line.split() for line in lines if WEIGHTS in line] == [[WEIGHTS, "700", "B"]]
    assert lines[-1] == f"dry run: nothing was sent to {REPO}, which would be private"
    assert not hub.requests


def test_a_second_push_removes_what_the_first_left(hub, released):
    """Files of the first that the second does not hold; others stay. An equal model makes no commit."""
    (released / "worst.png").write_bytes(b"picture")
    run("push", released, REPO)
    repository = hub.repositories[REPO]
    repository.history.append(("1" * 40, {**repository.history[-1][1], "LICENSE": b"mine"}))
    (released / "worst.png").unlink()
    code, lines = run("push", released, REPO)

    assert code == 0, lines
    assert set(repository.history[-1][1]) == {*FILES, "files.json", "LICENSE"}


def test_public_is_chosen_and_never_happens(hub, released):
    """A repository that exists keeps its visibility, and the other one is refused."""
    hub.repositories["me/open"] = Repository(private=False)
    refused = run("push", released, "me/open")
    made = run("push", released, "me/new", "--public")
    private = run("push", released, REPO), run("push", released, REPO, "--public")

    assert (
        refused[1][-1]
        == "Error: me/open exists and is public; add --public to show the model to everybody, or choose another name"
    )
    assert len(hub.repositories["me/open"].history) == 1
    assert made[0] == 0
    assert not hub.repositories["me/new"].private
    assert private[1][1][-1] == f"Error: {REPO} exists and is private; leave --public out, or choose another name"


@pytest.fixture
def version(released, tmp_path, monkeypatch):
    """A registry with one version, whose model is the released one; returns the folder of its files."""
    files, uri = tmp_path / "version", "models:/small/1"
    shutil.copytree(released, files / "artifacts/model")
    flavor = {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": "draw.py"}
    write_json(files / "MLmodel", {"flavors": {"python_function": flavor}})
    write_json(files / "files.json", list_files(files).model_dump(mode="json"))
    tags = {"espalier.content": hash_list(files)}

    class Registry:
        def find(self, found):
            assert found == uri
            return SimpleNamespace(name="small", version="1", tags=tags)

        def download(self, _version, folder):
            return shutil.copytree(files, folder / "downloaded")

    monkeypatch.setattr("stages.register.versions.Registry", Registry)
    return files


def test_a_version_is_pushed_after_its_files_were_checked(hub, version):
    """The model alone goes to the Hub; a version that was tampered with does not."""
    code, lines = run("push", "models:/small/1", REPO)
    (version / "artifacts/model" / WEIGHTS).write_bytes(b"trojans")
    refused = run("push", "models:/small/1", "me/other")

    assert code == 0, lines
    assert set(hub.repositories[REPO].history[-1][1]) == {*FILES, "files.json"}
    assert f"the version was tampered with: artifacts/model/{WEIGHTS}" in refused[1][-1]
    assert "me/other" not in hub.repositories


def break_token(_hub, _released, monkeypatch):
    """A token that the Hub does not know."""
    monkeypatch.setenv("HF_TOKEN", "wrong-token")


def remove_token(_hub, _released, monkeypatch):
    """No token at all."""
    monkeypatch.delenv("HF_TOKEN")


def close_port(_hub, _released, monkeypatch):
    """Nothing answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def go_offline(_hub, _released, monkeypatch):
    """The client may not use the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def change_weights(hub, released, _monkeypatch):
    """The weights change after they were listed."""
    from stages.tools.hub import push

    _monkeypatch.setattr(push, "IN_MEMORY", 100)
    hub.on_preupload = lambda: (released / WEIGHTS).write_bytes(b"changed" * 100)


def move_head(hub, _released, _monkeypatch):
    """Somebody else commits meanwhile."""
    hub.repositories[REPO] = Repository(private=True)
    hub.on_preupload = lambda: hub.repositories[REPO].history.append(("2" * 40, {}))


PUSHES = [
    (break_token, REPO, 1, "the Hub refuses the token; set HF_TOKEN to a valid one, or run hf auth login"),
    (remove_token, REPO, 1, "there is no token of the Hub; set HF_TOKEN, or run hf auth login"),
    (close_port, REPO, 75, "the Hub does not answer"),
    (go_offline, REPO, 1, "HF_HUB_OFFLINE is set; unset it"),
    (change_weights, REPO, 1, "changed while it was sent; nothing was committed"),
    (move_head, REPO, 1, "somebody else changed it meanwhile; look at it and push again"),
    (lambda *_: None, "others/theirs", 1, "the token has no right to; use one with write access to others"),
    (lambda *_: None, "small", 1, "'small' is no repository of the Hub; write OWNER/NAME"),
]


@pytest.mark.parametrize(("change", "repo", "code", "message"), PUSHES)
def test_a_push_that_fails_says_why_in_one_line_and_commits_nothing(
    hub, released, monkeypatch, change, repo, code, message
):
    """Not a single file is in a repository then, and no output shows the token."""
    change(hub, released, monkeypatch)
    found, lines = run("push", released, repo)
    errors = [line for line in lines if line.startswith("Error: ")]

    assert found == code, lines
    assert len(errors) == 1
    assert message in errors[0]
    assert all(not files for it in hub.repositories.values() for _, files in it.history)
    assert not any(secret in "".join(lines) for secret in (TOKEN, "wrong-token"))


def test_what_the_hub_stored_otherwise_is_refused(hub, released, monkeypatch):
    """The commit is there, and the line names the file."""
    monkeypatch.setattr(hub, "describe", lambda *_: [])
    code, lines = run("push", released, REPO)

    assert code == 1
    assert lines[-1].startswith(
        f"Error: README.md of {REPO} at {hub.repositories[REPO].history[-1][0]} is not what was sent"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", None, "README.md does not exist, so that this is no released model"),
        ("unet/pruned_unet.py", None, "pruned_unet.py does not exist"),
        ("weights.bin", b"x", "weights.bin is no file of a model"),
        (".env", b"x", ".env is no file of a model"),
        (".notes/x.md", b"x", ".notes/x.md is no file of a model"),
        (
            "a\nb.png",
            b"x",
            "'a\\nb.png' is no plain path of printable names without \\; rename it",
        ),
        ("unet/config.json", b'{"auto_map": ["x"]}', "config.json has auto_map ['x'], not an object"),
    ],
)
def test_a_folder_that_is_no_released_model_is_refused(hub, released, name, content, message):
    """Before anything is sent; another format may hold a pickle or a secret, and pull takes no other name."""
    (released / name).unlink(missing_ok=True)
    if content:
        (released / name).parent.mkdir(exist_ok=True)
        (released / name).write_bytes(content)
    code, lines = run("push", released, REPO)

    assert code == 1
    assert message in lines[-1]
    assert not hub.requests


@pytest.mark.parametrize("repo", ["small", "me small", "me/a--b", "me/a..b", "me/a.", "me/a.git", "a/b/c"])
def test_a_dry_run_refuses_the_names_that_a_push_refuses(released, repo):
    """Before the files are read."""
    assert run("push", released, repo, "--dry-run") == (
        1,
        [f"Error: {repo!r} is no repository of the Hub; write OWNER/NAME, such as me/my-small-ddpm"],
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--sha256", "abc", "--sha256 is 'abc'; allowed: the 64 digits"), ("--revision", "", "--revision is empty")],
)
def test_a_pull_refuses_what_is_no_hash_or_revision_before_it_asks_the_hub(hub, tmp_path, option, value, message):
    """An empty variable of a shell does not pull main in place of a commit."""
    code, lines = run("pull", REPO, "--out", tmp_path / "back", option, value)

    assert code == 1
    assert message in lines[-1]
    assert not hub.requests


def test_a_pull_replaces_no_model_that_was_not_pulled(hub, tmp_path):
    """It has the record of a stage as well."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.json").write_text('{"stage": "finetune"}')
    code, lines = run("pull", REPO, "--out", tmp_path / "mine")

    assert code == 1
    assert "holds what was not pulled; give another folder" in lines[-1]
    assert (tmp_path / "mine/run.json").exists()
    assert not hub.requests


def pushed_list(hub):
    """Return the files of the newest commit, to change."""
    return hub.repositories[REPO].history[-1][1]


def add_path_outside(hub):
    """Let the list name a file outside of the folder."""
    entry = {"path": "../evil.py", "sha256": "a" * 64, "size_bytes": 1}
    pushed_list(hub)["files.json"] = json.dumps({"version": 1, "files": [entry]}).encode()


def replace_both(hub):
    """Replace the weights and the list that names them, as somebody with a right to write can."""
    files = pushed_list(hub)
    listed = json.loads(files["files.json"])
    entry = next(it for it in listed["files"] if it["path"] == WEIGHTS)
    files[WEIGHTS] = b"trojans" * 100
    entry["sha256"] = hashlib.sha256(files[WEIGHTS]).hexdigest()
    files["files.json"] = json.dumps(listed).encode()


PULLS = [
    (
        lambda hub: hub.damaged.add(WEIGHTS),
        [],
        f"{WEIGHTS} of {REPO}",
        "is not what its files.json lists; pull it again",
    ),
    (lambda hub: pushed_list(hub).pop("files.json"), [], "has no files.json", "download it with hf download"),
    (lambda hub: pushed_list(hub).pop(WEIGHTS), [], "cannot be read", "diffusion_pytorch_model"),
    (lambda hub: pushed_list(hub).update({"files.json": b"{"}), [], "files.json of", "is damaged"),
    (add_path_outside, [], "is damaged", "leads out of the folder"),
    (replace_both, ["--sha256", "LIST"], "files.json of", "expected"),
    (lambda hub: hub.repositories.clear(), [], "there is none, or the token may not see it", "HF_TOKEN"),
    (lambda _: None, ["--revision", "v2"], "it has no such revision", "commits, branches or tags"),
]


@pytest.mark.parametrize(("change", "options", "message", "also"), PULLS)
def test_a_pull_that_fails_says_why_in_one_line_and_writes_nothing(
    hub, released, tmp_path, change, options, message, also
):
    """Files that are damaged on the way, missing or replaced; only the hash that push printed finds the last."""
    sha256 = run("push", released, REPO)[1][-1].split()[-3]
    change(hub)
    code, lines = run("pull", REPO, "--out", tmp_path / "back", *(it.replace("LIST", sha256) for it in options))

    assert code == 1, lines
    assert len([line for line in lines if line.startswith("Error: ")]) == 1
    assert message in lines[-1]
    assert also in lines[-1]
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))
