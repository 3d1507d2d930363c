"""dvc.yaml, dvc.lock, params and code -> which stages would run and why, compared with DVC's own code."""

import hashlib
import json

import pytest
from dvc.stage.cache import _get_cache_hash
from ruamel.yaml import YAML

from flows.workspaces import staleness
from flows.workspaces.staleness import find_statuses, upstream
from flows.workspaces.workspace import Workspace
from stages.runtime.code_hash import code_record
from stages.runtime.errors import InputError
from stages.storage.files import json_bytes

PIPELINE = """
stages:
  code: {cmd: hash, deps: [stages], outs: [artifacts/code]}
  fetch: {cmd: load, deps: [artifacts/code/fetch.json], params: [fetch], outs: [artifacts/data]}
  prune: {cmd: cut, deps: [artifacts/code/prune.json, artifacts/data], params: [seed, prune], outs: [artifacts/pruned]}
  costs: {cmd: time, deps: [artifacts/code/costs.json, artifacts/pruned/run.json], outs: [reports/costs]}
"""
PARAMS = {"seed": 0, "fetch": {"model": {"source": "bundled"}}, "prune": {"target": {"ratio": 0.3}}}
OUTS = {"fetch": "artifacts/data", "prune": "artifacts/pruned", "costs": "reports/costs"}


class Project:
    """A folder as `dvc repro` leaves it."""

    def __init__(self, folder):
        self.folder, self.cache, self.locks = folder, folder / ".dvc/cache", {}
        (folder / "dvc.yaml").write_text(PIPELINE)
        self.entries = YAML(typ="safe").load(PIPELINE)["stages"]
        for name, out in OUTS.items():
            self.locks[name] = self.lock(name, PARAMS, self.store(out, f"{name} computed this"))
        self.save()

    def store(self, out, content):
        """Put a folder with one file into the working tree and into the cache; returns its md5."""
        md5 = self.put(content.encode())
        tree = self.put(json.dumps([{"md5": md5, "relpath": "run.json"}]).encode(), ".dir")
        (self.folder / out).mkdir(parents=True, exist_ok=True)
        (self.folder / out / "run.json").write_text(content)
        return tree

    def put(self, content, suffix=""):
        """Put a file into the cache."""
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + suffix
        path = self.cache / "files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return md5

    def lock(self, name, params, out_md5):
        """Describe a finished stage as dvc.lock does."""
        entry = self.entries[name]
        deps = [{"path": dep, "hash": "md5", "md5": self.hash_of(dep), "size": 1} for dep in sorted(entry["deps"])]
        chosen = {key: params[key] for key in entry.get("params", [])}
        found = {"cmd": entry["cmd"], "deps": deps, "outs": [{"path": OUTS[name], "hash": "md5", "md5": out_md5}]}
        return {**found, **({"params": {"params.yaml": chosen}} if chosen else {})}

    def hash_of(self, dep):
        """Hash a dependency: the code of a stage, an output in dvc.lock, or a file in one."""
        if dep.startswith("artifacts/code/"):
            name = dep.split("/")[-1].removesuffix(".json")
            return hashlib.md5(json_bytes(code_record(name)), usedforsecurity=False).hexdigest()
        if dep.endswith("run.json"):
            return hashlib.md5((self.folder / dep).read_bytes(), usedforsecurity=False).hexdigest()
        return next(lock["outs"][0]["md5"] for lock in self.locks.values() if lock["outs"][0]["path"] == dep)

    def save(self):
        """Write dvc.lock and the hashes of the code."""
        with (self.folder / "dvc.lock").open("w") as file:
            YAML().dump({"schema": "2.0", "stages": self.locks}, file)
        (self.folder / "artifacts/code").mkdir(parents=True, exist_ok=True)
        for path in staleness.STAGES.glob("*/__main__.py"):
            name = path.parent.name
            (self.folder / "artifacts/code" / f"{name}.json").write_bytes(json_bytes(code_record(name)))

    def remember(self, lock):
        """Put a run into DVC's cache of runs, under the name that DVC gives it."""
        key = _get_cache_hash(json.loads(json.dumps(lock)), key=True)
        folder = self.cache / "runs" / key[:2] / key
        folder.mkdir(parents=True)
        with (folder / "value").open("w") as file:
            YAML().dump(lock, file)

    def states(self, params=PARAMS, *, in_place=True):
        """Return state and reasons of each stage."""
        return {it.name: (it.state, it.reasons) for it in find_statuses(self.folder, params, in_place=in_place)}


@pytest.fixture
def project(tmp_path):
    """A project in which everything is up to date."""
    return Project(tmp_path)


def test_a_finished_project_is_up_to_date_and_a_workspace_takes_it_from_the_cache(project):
    """Nothing changed; a workspace of the same commit has no outputs, but the cache has them."""
    assert set(project.states().values()) == {("up to date", ())}
    states = project.states(in_place=False)
    assert {name: states[name][0] for name in OUTS} == dict.fromkeys(OUTS, "in cache")


def test_outputs_with_options_and_several_commands_are_read(project):
    """DVC allows both."""
    path = project.folder / "dvc.yaml"
    path.write_text(path.read_text().replace("outs: [reports/costs]", "outs: [{reports/costs: {cache: true}}]"))
    path.write_text(path.read_text().replace("cmd: cut", "cmd: [cut, paste]"))
    project.locks["prune"]["cmd"] = ["cut", "paste"]
    project.save()

    assert set(project.states().values()) == {("up to date", ())}
    assert upstream(project.folder, ["costs"]) == {"costs", "prune", "fetch", "code"}
    assert [stage.name for stage in Workspace(project.folder, project.folder).stages] == ["code", *OUTS]


def test_a_changed_key_is_named_and_what_reads_the_output_waits_for_it(project):
    """Stages before it stay as they are."""
    states = project.states({**PARAMS, "prune": {"target": {"macs": "44%"}}})

    assert states["fetch"] == ("up to date", ())
    assert states["prune"] == ("runs", ("prune.target.ratio, prune.target.macs changed",))
    assert states["costs"] == ("runs", ("needs prune",))


def test_an_equal_run_in_the_cache_is_found_by_dvcs_own_key_and_so_is_what_follows_it(project):
    """After a way there and back again, nothing is computed."""
    params = {**PARAMS, "prune": {"target": {"ratio": 0.5}}}
    project.remember(project.lock("prune", params, project.store("artifacts/pruned", "another cut")))
    project.remember(project.lock("costs", params, project.store("reports/costs", "other times")))
    states = project.states(params)

    assert states["prune"] == ("in cache", ("prune.target.ratio changed",))
    assert states["costs"] == ("in cache", ("artifacts/pruned/run.json changed",))


def test_changed_code_and_missing_outputs_are_reasons(project):
    """An output that is neither there nor whole in the cache is computed again."""
    project.locks["fetch"]["deps"][0]["md5"] = "0" * 32
    project.save()
    assert project.states()["fetch"] == ("runs", ("the code changed",))

    project = Project(project.folder)
    for path in (project.folder / "reports/costs").iterdir():
        path.unlink()
    (project.folder / "reports/costs").rmdir()
    assert project.states()["costs"] == ("in cache", ("reports/costs is missing",))
    gone = project.put(b"costs computed this")
    (project.cache / "files/md5" / gone[:2] / gone[2:]).unlink()
    assert project.states()["costs"] == ("runs", ("reports/costs is missing",))


def test_a_project_without_a_lock_runs_everything(project):
    """The first run of a clone."""
    (project.folder / "dvc.lock").unlink()
    assert {state for name, (state, _) in project.states().items() if name != "code"} == {"runs"}


@pytest.mark.parametrize("content", [b"[cache\n", b"cache = x\n", b"\xff\xfe"])
def test_a_damaged_config_is_one_line(project, content):
    """As for a workspace, which reads the same files."""
    (project.folder / ".dvc" / "config").write_bytes(content)

    with pytest.raises(InputError, match=r"DVC's config cannot be read .*; correct \.dvc/config"):
        project.states()


def test_a_stage_brings_those_that_it_needs(project):
    """`dvc repro prune` runs fetch and code as well, and not costs."""
    assert upstream(project.folder, ["prune"]) == {"code", "fetch", "prune"}


@pytest.mark.parametrize("content", [None, "", "stages: []"])
def test_a_folder_without_stages_is_refused(tmp_path, content):
    """The command was given elsewhere than at the top of the project."""
    if content is not None:
        (tmp_path / "dvc.yaml").write_text(content)
    with pytest.raises(InputError, match=r"^this folder has no dvc\.yaml with stages; run the command at the top"):
        find_statuses(tmp_path, PARAMS, in_place=True)
