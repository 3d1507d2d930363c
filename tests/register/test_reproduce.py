"""The comparison of a version with its reproduction, and the clone that it is made in."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.__main__ import main
from stages.register.lineage import FILES, Lineage, hash_outputs
from stages.register.registry import EVIDENCE, MODEL
from stages.register.reproduce import (
    MetricComparison,
    Reproduction,
    _check_empty,
    _clone,
    _compare,
    _find_repository,
    _make_environment,
)
from stages.register.reproducible import check_reproducible
from stages.runtime.errors import InputError, without_password
from stages.storage.files import folder_sha256, read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors
from stages.tracking.compression import Compression
from tests.orchestra import is_alive, until
from tests.repository import commit, git
from tests.servers import ROOT

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROVENANCE = {"device": {"name": "cpu", "threads": 2}}
OTHER_PROVENANCE = {"device": {"name": "gpu", "threads": 2, "cuda": True}, "began_at": "today", "seconds": 7}
MACHINE = {"python": "3.11", "packages": {"torch": "2"}, "provenance": PROVENANCE}


@pytest.fixture
def again(package, tmp_path):
    """A workspace with identical results, and the function that compares it with the version."""
    place = tmp_path / "again"
    for name in ("finetuned", "released/finetuned"):
        shutil.copytree(package / MODEL, place / "artifacts" / name)
    compression = Compression(place / "artifacts", place / "reports")
    folders = compression.folders
    shutil.copytree(package / EVIDENCE / "evaluation", folders["evaluate"])
    for stage, folder in folders.items():
        write_json(folder / "run.json", {"stage": stage, "params": {}, **MACHINE})
        write_json(compression.code / f"{stage}.json", {"sha256": stage})
    lineage = Lineage(
        git_commit="c" * 40,
        git_remote=None,
        files=dict.fromkeys(FILES, "e" * 64),
        data_sha256="d" * 64,
        outputs=hash_outputs(place),
        runs=dict.fromkeys(folders, MACHINE),
        dvc_remotes=[],
    )
    return place, lambda version=package: _compare("models:/tiny/1", version, lineage, place)


def nudge(place, amount):
    """Add a constant to one tensor of the reproduced model."""
    for name in ("finetuned", "released/finetuned"):
        tensors = read_tensors(place / "artifacts" / name / WEIGHTS)
        tensors["conv_in.bias"] = tensors["conv_in.bias"] + amount
        write_tensors(place / "artifacts" / name / WEIGHTS, tensors)


def remeasure(place, fid):
    """Set the mean FID of the reproduced model."""
    path = place / "reports" / "evaluate" / "evaluation.json"
    record = read_json(path)
    record["models"]["finetuned"]["fid"]["mean"] = fid
    write_json(path, record)


def test_equal_hashes_and_metrics_are_identical(again):
    """No file, no metric and nothing of the machine differs."""
    found = again[1]()

    assert (found.verdict, found.files, found.machine) == ("identical", [], [])
    assert found.num_files == 7


def test_other_weights_with_metrics_within_their_intervals_are_equal(again):
    """The difference names the number of tensors, the worst one and its deviation."""
    place, compare = again
    nudge(place, 0.5)
    remeasure(place, 1.05)
    found = compare()

    assert found.verdict == "equal within tolerance"
    assert [file.path for file in found.files] == [
        f"artifacts/{it}/{WEIGHTS}" for it in ("finetuned", "released/finetuned")
    ]
    assert found.files[1].what == "1 of 144 tensors differ, most conv_in.bias by 0.5"


def test_a_metric_beyond_its_interval_is_different(again):
    """The metric is named."""
    place, compare = again
    remeasure(place, 2.0)
    found = compare()

    assert found.verdict == "different"
    assert [value.name for value in found.metrics if not value.is_equal] == ["fid"]


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [(None, 0.2, "identical"), (0.1, 0.2, "equal within tolerance"), (0.1, 0.5, "different"), (0.1, None, "different")],
)
def test_fid_to_dense_is_compared_if_the_version_has_it(again, package, tmp_path, then, now, verdict):
    """A version from before it has nothing to compare; work that lacks what the version has is not taken as equal."""
    place, compare = again
    version = shutil.copytree(package, tmp_path / "version")
    for folder, mean in ((version / EVIDENCE / "evaluation", then), (place / "reports/evaluate", now)):
        record = read_json(folder / "evaluation.json")
        for model in record["models"].values() if mean else ():
            model["fid_dense"] = {"sets": [mean] * 3, "mean": mean, "half_width": 0.2}
        write_json(folder / "evaluation.json", record)
    found = compare(version)

    assert ("fid_dense" in [it.name for it in found.metrics]) == bool(then and now)
    assert found.obstacle == ("" if now else "the evaluation lacks fid_dense now; metrics cannot be compared")
    assert found.verdict == verdict


def test_without_an_interval_only_the_same_number_is_equal():
    """One set has no interval, so nothing is tolerated."""
    verdicts = [Reproduction("x", 1, [], [MetricComparison("fid", 1.0, now, 0)]).verdict for now in (1.0, 1.0 + 1e-9)]

    assert verdicts == ["identical", "different"]


def test_a_missing_file_is_different(again):
    """The file is named."""
    place, compare = again
    (place / "artifacts" / "finetuned" / "pruning_plan.json").unlink()
    found = compare()

    assert [(file.path, file.what) for file in found.files] == [("artifacts/finetuned/pruning_plan.json", "missing")]
    assert found.verdict == "different"


def test_another_machine_is_listed_and_does_not_decide(again):
    """Versions of packages and the device; a device is unknown if the output came out of DVC's cache then."""
    place, compare = again
    pruned = place / "artifacts" / "pruned"
    write_json(pruned / "run.json", {"stage": "prune", "params": {}, **MACHINE, "packages": {"torch": "3"}})
    record = {"output_sha256": folder_sha256(pruned), **OTHER_PROVENANCE}
    write_json(place / "artifacts" / "pruned.provenance.json", record)
    found = compare()

    assert found.machine == ["device cuda unknown, now True", "device name cpu, now gpu", "torch 2, now 3"]
    assert found.verdict == "identical"


def test_another_protocol_is_different(again, protocol):
    """Metrics of two protocols cannot be compared."""
    place, compare = again
    path = place / "reports" / "evaluate" / "evaluation.json"
    other = protocol.model_copy(update={"sets": 3, "real_sha256": "e" * 64})
    write_json(path, {**read_json(path), "protocol": other.model_dump(mode="json"), "protocol_id": other.id})

    found = compare()
    assert found.verdict == "different"
    assert found.obstacle.startswith(f"the protocol is {other.id} now, and was ")


def test_another_plan_or_shape_is_different_with_equal_metrics(again):
    """Only the values of numbers may differ within tolerance."""
    place, compare = again
    for name in ("finetuned", "released/finetuned"):
        write_json(place / "artifacts" / name / "pruning_plan.json", {"kept": [1]})
    assert compare().verdict == "different"

    tensors = read_tensors(place / "artifacts" / "released" / "finetuned" / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:1]
    write_tensors(place / "artifacts" / "released" / "finetuned" / WEIGHTS, tensors)
    assert "other names or shapes of tensors" in [file.what for file in compare().files]


def test_a_missing_commit_is_one_line(tmp_path, monkeypatch):
    """The line holds git's message; an address that looks like an option or a command runs nothing."""
    monkeypatch.setenv("ESPALIER_REMOTES", "--upload-pack=touch")
    lineage = Lineage(
        git_commit="c" * 40,
        git_remote="--upload-pack=touch",
        files=dict.fromkeys(FILES, "e" * 64),
        data_sha256="d" * 64,
        outputs={},
        runs={},
        dvc_remotes=[],
    )
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    for source in (str(tmp_path / "other"), None, "ext::touch pwned", str(tmp_path / "nothing")):
        with pytest.raises(
            InputError,
            match=r"^commit cccccccccccc cannot be checked out from [^\n]*; name another repository with --repository$",
        ):
            _clone(lineage, source, tmp_path / f"place-{source is None}-{len(source or '')}")
    assert not list(tmp_path.rglob("pwned"))


@pytest.fixture
def foreign(publish, tmp_path, edit, monkeypatch):
    """A version whose lineage names the repository of somebody else, and that address; its dvc.yaml tells variables."""
    monkeypatch.delenv("ESPALIER_REPOSITORY", raising=False)
    place = tmp_path / "foreign"
    place.mkdir()
    git(place, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=place, check=True)
    (place / "dvc.yaml").write_text(f"stages: {{code: {{cmd: env > {tmp_path}/variables}}}}\n")
    head = commit(place)
    address = f"file://{place}"
    lineage = {"git_commit": head, "git_remote": address}
    publish(lambda folder: edit(folder / EVIDENCE / "lineage.json", **lineage))
    return address


def test_a_remote_that_is_not_allowed_runs_nothing(foreign, tmp_path, monkeypatch):
    """Whoever registers a version writes its lineage; the line names the address and how to allow it."""
    monkeypatch.setenv("ESPALIER_REMOTES", f"{foreign}.git https://host/other.git")
    result = CliRunner().invoke(main, ["reproduce", "models:/tiny/1"])

    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert (
        f"the version names {foreign}, whose code is not allowed to run here; add that address to ESPALIER_REMOTES"
        in (result.output)
    )
    assert not (tmp_path / "variables").exists()


def test_the_files_of_a_profile_are_found_from_another_home(tmp_path, monkeypatch):
    """Without a profile they are not named, and one that is missing never is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").touch()
    assert "AWS_SHARED_CREDENTIALS_FILE" not in _make_environment(tmp_path, tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    found = _make_environment(tmp_path, tmp_path / "sandbox")

    assert found["AWS_SHARED_CREDENTIALS_FILE"] == str(tmp_path / ".aws/credentials")
    assert "AWS_CONFIG_FILE" not in found


SECRETS = ("GITHUB_TOKEN", "HF_TOKEN", "PREFECT_API_KEY", "MLFLOW_TRACKING_PASSWORD", "DB_PASSWORD", "PYTHONPATH")


def test_the_commands_of_an_allowed_remote_see_the_listed_variables(foreign, tmp_path, monkeypatch, registry):
    """They get the keys of the bucket and what the user names; work that leaves no outputs is different, no error."""
    for name in (*SECRETS, "AWS_SECRET_ACCESS_KEY", "MODELS"):
        monkeypatch.setenv(name, "hush-hush-hush")
    monkeypatch.setenv("ESPALIER_REMOTES", f"https://host/other.git {foreign}")
    monkeypatch.setenv("ESPALIER_EXTRA_VARIABLES", "MODELS NOT_SET")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")  # chooses kernels, and so the last digits of a FID
    result = CliRunner().invoke(main, ["reproduce", "models:/tiny/1"])
    variables = dict(line.split("=", 1) for line in (tmp_path / "variables").read_text().splitlines() if "=" in line)

    assert {name for name, value in variables.items() if "hush" in value} == {"AWS_SECRET_ACCESS_KEY", "MODELS"}
    assert variables["OPENBLAS_CORETYPE"] == "Haswell"
    assert variables["HOME"] != os.environ["HOME"]
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("models:/tiny/1 is different: ")
    assert f"✗ artifacts/finetuned/{WEIGHTS}: missing" in result.output
    assert registry.find("models:/tiny/1").tags["espalier.reproduced"] == "different"


@pytest.fixture
def trusting(foreign, publish, tmp_path, edit, monkeypatch):
    """Return a function that reproduces a version whose params trust the code of a model."""
    monkeypatch.setenv("ESPALIER_REMOTES", foreign)
    model = {"source": "hub", "repo": "somebody/model", "revision": "a" * 40, "trust": True}

    def run(*options, named=None):
        if named:
            (tmp_path / "foreign" / named).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "foreign" / named).write_text(json.dumps({"fetch": {"model": model}}))
            commit(tmp_path / "foreign")
        head = git(tmp_path / "foreign", "rev-parse", "HEAD")

        def change(folder):
            (folder / EVIDENCE / "params.yaml").write_text(json.dumps({"fetch": {"model": model}}))
            edit(folder / EVIDENCE / "lineage.json", git_commit=head, git_remote=foreign)

        version = publish(change)
        result = CliRunner().invoke(main, ["reproduce", f"models:/tiny/{version.version}", *options])
        return result, (tmp_path / "variables").exists()

    return run


def test_whoever_registers_a_version_cannot_have_code_of_a_model_run(trusting, registry, tmp_path):
    """The commit is honest and allowed, the params come from the version: nothing runs, and no verdict is written."""
    result, has_run = trusting("--keep", str(tmp_path / "kept"))

    assert not (tmp_path / "kept").exists()
    assert (result.exit_code, has_run) == (1, False)
    assert (
        "sets fetch.model.trust: true for a model that its commit does not name; read the denoiser.py" in result.stderr
    )
    assert "espalier.reproduced" not in registry.find("models:/tiny/2").tags


@pytest.mark.parametrize(
    ("options", "named"), [(["--trust"], None), ([], "params.yaml"), ([], "recipes/presets/theirs.yaml")]
)
def test_code_of_a_model_that_the_commit_or_the_user_trusts_runs(trusting, options, named):
    """In the commit's params.yaml, in a preset of the commit, or by an option."""
    assert trusting(*options, named=named)[1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fetch": {"model": {"source": "registry", "uri": "models:/a/1"}}}, "is in MLflow's registry"),
        ({"fetch": {"data": {"path": "~/images"}}}, "fetch.data.path of the version is ~/images, and a reproduction"),
        ({"fetch": {"data": {"path": "$HOME/a"}}}, "a reproduction does not get HOME; write the path itself"),
        (
            {"fetch": {"data": {"path": "${OTHER}/$MODELS"}}},
            "does not get OTHER; set it and add it to ESPALIER_EXTRA_VARIABLES",
        ),
    ],
)
def test_what_a_reproduction_does_not_reach_is_refused_before_it_runs(tmp_path, params, message):
    """It would fail after its start, and the version would be called different."""
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    with pytest.raises(InputError, match=re.escape(message)):
        check_reproducible(tmp_path / "params.yaml", tmp_path, ["MODELS"], trust=True)


@pytest.mark.parametrize("params", [{}, {"fetch": []}, [], {"fetch": {"model": {"path": "$MODELS/a", "trust": False}}}])
def test_other_params_are_reproduced_or_refused_by_their_stage(tmp_path, params):
    """A version's file may hold anything."""
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    check_reproducible(tmp_path / "params.yaml", tmp_path, ["MODELS"], trust=False)


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (MlflowException("Permission denied"), "the MLflow registry failed to tag tiny/1: Permission denied"),
        (ConnectionError("gone"), "the MLflow registry failed to tag tiny/1: gone"),
    ],
)
def test_a_verdict_is_not_lost_if_the_version_cannot_be_tagged(foreign, tmp_path, monkeypatch, registry, refusal, line):
    """The user may only read, or the server is away when the work has ended: one warning, and the verdict is given."""

    def refuse(*_, **__):
        raise refusal

    monkeypatch.setenv("ESPALIER_REMOTES", foreign)
    monkeypatch.setattr(MlflowClient, "set_model_version_tag", refuse)
    result = CliRunner().invoke(main, ["reproduce", "models:/tiny/1"])

    assert (tmp_path / "variables").exists()
    assert f"Warning: models:/tiny/1 is different, which its tags do not say: {line}" in result.stderr.splitlines()
    assert result.output.splitlines()[-1].startswith("models:/tiny/1 is different: ")
    assert "espalier.reproduced" not in registry.find("models:/tiny/1").tags


@pytest.mark.parametrize("name", ["evaluation.json", "run.json", WEIGHTS])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_missing_or_damaged_work_is_different(again, name, how):
    """It is a verdict that is written onto the version, and no error."""
    place, compare = again
    for path in list(place.rglob(Path(name).name)):
        path.unlink()
        if how == "damaged":
            path.write_text("{")

    assert compare().verdict == "different"


def test_the_address_of_this_checkout_is_allowed(tmp_path, monkeypatch):
    """So a version of a colleague's commit needs no setting; the password is that of the checkout."""
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    own = f"https://me:{'hush'}@host/project.git"
    git(tmp_path, "remote", "add", "origin", own)
    lineage = Lineage.model_construct(git_commit="c" * 40, git_remote="https://host/project.git")
    assert _find_repository(lineage) == own

    with pytest.raises(InputError, match=r"names https://host/project\?\[31m, whose code"):
        _find_repository(lineage.model_copy(update={"git_remote": f"https://me:{'hush'}@host/project\n\x1b[31m"}))


def test_nothing_outlives_a_killed_reproduction(tmp_path):
    """After kill -9, DVC and its stage, which a commit of any age wrote, end with the process that reproduces."""
    (tmp_path / "dvc.yaml").write_text("stages:\n  slow: {cmd: 'echo > up; sleep 300; echo', outs: [out]}\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    code = "from pathlib import Path; from stages.register.reproduce import _run_pipeline; _run_pipeline(Path())"
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}  # it leaves a folder
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as caller:
        assert until((tmp_path / "up").exists)
        started = psutil.Process(caller.pid).children(recursive=True)
        caller.kill()

    assert len(started) >= 3
    assert until(lambda: not any(map(is_alive, started)), 30)


def test_a_reproduction_needs_an_empty_folder(tmp_path):
    """It never overwrites files of the user."""
    (tmp_path / "mine").write_text("")

    with pytest.raises(InputError, match="is not empty"):
        _check_empty(tmp_path)


def test_passwords_are_removed_from_addresses():
    """The rest of an address stays as it is."""
    for password in ("secret", "a@b", "p%40"):
        assert without_password(f"https://me:{password}@host/path") == "https://host/path"
    assert without_password("git@host:path") == "git@host:path"
    two = [f"{kind}://me:{'x' * 9}@host" for kind in ("postgresql", "http")]
    assert without_password(" and ".join(two)) == "postgresql://host and http://host"
