"""espalier doctor: every check says ok, warn or fail with what to do, prints no secret and waits for nobody."""

import importlib.metadata
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from flows.__main__ import main
from flows.doctor import checks, machine, probes, project, servers
from flows.doctor.checks import run_check
from flows.doctor.finding import Finding
from stages.runtime.errors import InputError
from stages.runtime.wording import format_bytes
from tests.repository import make_repository
from tests.servers import s3_client, s3_environment
from tests.swift import free_ports

SECRET = "hunter2-and-more"  # pragma: allowlist secret


def found(check):
    """Run a check: its findings as texts that begin with the status."""
    return [f"{status}: {text}" for status, text in run_check(check)]


@pytest.fixture
def here(tmp_path, root, monkeypatch):
    """A folder with params.yaml and dvc.yaml, as the current one, in no repository and without servers."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(root / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    for name in ("ESPALIER_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_has_exit_code_1(monkeypatch, status, code):
    """Each line has the status, the subject and the text."""
    both = {"one": lambda: iter([Finding("ok", "fine")]), "two": lambda: iter([Finding(status, "seen; do this")])}
    monkeypatch.setattr(checks, "CHECKS", both)
    result = CliRunner().invoke(main, ["doctor"])

    assert result.exit_code == code
    assert result.output.splitlines() == ["ok    one         fine", f"{status:<4}  two         seen; do this"]


def test_an_exception_is_one_line_without_secrets():
    """The other checks still run."""

    def breaks():
        yield Finding("ok", "first\nline")
        raise RuntimeError(f"http://me:{SECRET}@host refused\nsecond line")

    def mistake():
        raise InputError(f"a mistake\nhttp://host?token={SECRET}")
        yield

    assert found(breaks) == [r"ok: first\nline", "fail: http://host refused"]
    assert found(mistake) == [r"fail: a mistake\nhttp://host?token=***"]


def test_a_wrong_proxy_is_a_finding_and_not_the_end(monkeypatch):
    """Every other command refuses it before it begins."""
    monkeypatch.setenv("HTTPS_PROXY", "no address")
    monkeypatch.setattr(checks, "CHECKS", {"network": machine.check_environment})
    result = CliRunner().invoke(main, ["doctor"])

    assert result.exit_code == 1
    assert result.output.startswith("fail  network     HTTPS_PROXY ")


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 14, 0), "fail")]
)
def test_the_versions_of_python_are_those_of_the_project(monkeypatch, version, status):
    """The remedy is the variable of the Makefile."""
    monkeypatch.setattr(machine.sys, "version_info", version)

    assert found(machine.check_python)[0].startswith(f"{status}: {'.'.join(map(str, version))}")


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ("click=={click} \\\n    --hash=sha256:00\n", "ok: 1 as in requirements.lock"),
        ("click==0.1 \\\n", "warn: other versions than locked: click {click} (locked 0.1); results may differ"),
        ("nowhere-at-all==1.0\nclick=={click}\n", "ok: 1 as in requirements.lock; 1 of the lock are for developers"),
        ("nowhere-at-all==1.0 ; sys_platform == 'amiga'\nclick=={click}\n", "ok: 1 as in requirements.lock"),
        ("needed-package==1.0\n", "fail: not installed: needed-package; run: make setup"),
        (None, "warn: no requirements.lock and pyproject.toml here to compare with"),
    ],
)
def test_packages_are_compared_with_the_lock(here, lock, expected):
    """What the project itself needs must be there; a package for developers may be missing."""
    (here / "pyproject.toml").write_text('[project]\ndependencies = ["needed-package>=1"]\n')
    click = importlib.metadata.version("click")
    if lock:
        (here / "requirements.lock").write_text(lock.format(click=click))

    assert found(machine.check_packages)[0].startswith(expected.format(click=click))


@pytest.mark.parametrize(("free", "status"), [(5 * 10**8, "fail"), (5 * 10**9, "warn"), (5 * 10**10, "ok")])
def test_little_disk_is_said(monkeypatch, free, status):
    """Both where the outputs go and where temporary files go."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    lines = found(machine.check_disk)

    assert [line.partition(":")[0] for line in lines] == [status] * 2
    assert f"{format_bytes(free)} free" in lines[0]


def test_more_threads_than_cores_are_said(monkeypatch):
    """They would hinder each other."""
    import torch

    monkeypatch.setattr(machine, "count_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda _name: None)
    (line,) = found(machine.check_device)

    assert line.startswith("warn: 8 threads on 1 core")
    assert line.endswith("set OMP_NUM_THREADS=1")


@pytest.mark.parametrize("missing", ["params.yaml", "dvc.yaml", ".dvc"])
def test_another_folder_is_a_failure(here, missing):
    """It says where to run it."""
    path = here / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert found(project.check_params) == [f"fail: no {missing} here; run this at the top of the project"]


def test_a_wrong_value_of_params_is_a_failure(here):
    """The line is that of any command."""
    assert found(project.check_params) == ["ok: every value of params.yaml is allowed"]
    (here / "params.yaml").write_text((here / "params.yaml").read_text().replace("round_to:", "roundto:"))

    (line,) = found(project.check_params)
    assert line.startswith("fail: params.yaml: prune.roundto is not a known key; did you mean prune.round_to?")


def test_code_of_another_checkout_is_said(here, root):
    """An environment that was set up in one clone runs that clone's code in every other."""
    (here / "flows").symlink_to(root / "flows")
    assert len(found(project.check_params)) == 1
    (here / "flows").unlink()
    (here / "flows").mkdir()

    assert found(project.check_params)[1].startswith(f"warn: espalier runs the code of {root}, not that of this folder")


@pytest.mark.parametrize(
    ("extractor", "expected"),
    [
        ("{name: digits}", "ok: digits loads, with sha256 bd4d2c3e"),
        ("{name: inception-v3-compat}", "warn: the weights of inception-v3-compat are not on this machine (https://"),
        ("{name: inception}", "fail: reference.extractor.name is 'inception'; allowed: digits"),
        ("{name: vgg16, weights: nowhere.pth}", "fail: no extractor weights at nowhere.pth"),
        ("{name: inception-v3-compat, weights: wrong.pth}", "fail: ./wrong.pth has sha256 "),
    ],
)
def test_the_weights_of_the_extractor_are_looked_for(here, monkeypatch, extractor, expected):
    """Nothing is downloaded."""
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    (here / "wrong.pth").write_bytes(b"wrong")
    yaml = YAML(typ="safe")
    tree = yaml.load((here / "params.yaml").read_text())
    tree["reference"]["extractor"] = yaml.load(extractor)
    yaml.dump(tree, here / "params.yaml")

    (line,) = found(project.check_extractor)
    assert line.startswith(expected)
    assert not (here / "hub").exists()


def test_git_is_looked_at(here):
    """A repository without a commit, with one, and with changes."""
    assert found(project.check_git)[0].startswith("warn: no commit here")
    make_repository(here)
    assert found(project.check_git)[0].endswith("nothing uncommitted")
    (here / "params.yaml").write_text("seed: 1")

    assert found(project.check_git)[0].startswith("warn: 1 uncommitted changes since ")


@pytest.mark.usefixtures("here")
def test_servers_that_are_not_set_are_not_asked(monkeypatch):
    """A newcomer has none, and that is in order."""
    monkeypatch.setattr(servers.subprocess, "run", pytest.fail)

    lines = [*found(servers.check_store), *found(servers.check_mlflow)]
    assert [line.partition(" is not set")[0] for line in lines] == ["ok: ESPALIER_STORE", "ok: MLFLOW_TRACKING_URI"]


@pytest.mark.usefixtures("here")
def test_a_probe_that_hangs_is_ended(monkeypatch):
    """A server that accepts and says nothing would hold the doctor for ever."""

    def hang(_command, *, timeout, **_options):
        raise subprocess.TimeoutExpired("probe", timeout)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(servers.subprocess, "run", hang)

    assert found(servers.check_mlflow) == ["warn: no answer in 30 s; check the address and the network"]


def ended(code, stdout, stderr):
    """A probe that has ended."""
    return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ended(0, "noise\ns3://bucket answers\n", ""), "ok: s3://bucket answers"),
        (ended(75, "", f"Error: https://me:{SECRET}@host is away\n"), "fail: https://host is away"),
        (ended(-9, "", ""), "fail: the check printed nothing"),
    ],
)
def test_the_last_line_of_a_probe_is_the_finding(monkeypatch, result, expected):
    """Without the password that an address may hold."""
    monkeypatch.setenv("ESPALIER_STORE", "s3://bucket/prefix")
    monkeypatch.setattr(servers.subprocess, "run", lambda *_, **__: result)

    assert found(servers.check_store) == [expected]


def test_a_remote_of_dvc_is_looked_into(here):
    """None, a folder, and one whose settings are wrong."""
    (here / "store").mkdir()
    lines = []
    for config in ("", f"remote = store\n['remote \"store\"']\n    url = {here}/store\n", "remote = gone\n"):
        (here / ".dvc/config").write_text(f"[core]\n    no_scm = true\n    {config}")
        result = CliRunner().invoke(probes.main, ["remote"])
        lines.append((result.exit_code, (result.output.splitlines() or [""])[-1]))

    assert lines[0] == (0, "no remote: results stay on this machine")
    assert lines[1] == (0, f"the remote {here}/store answers")
    assert lines[2][0] == 1
    assert "gone" in lines[2][1]


def test_a_tracking_server_that_is_away_is_one_line(here, monkeypatch):
    """A file of SQLite that is not there yet is none, and is not made."""
    (port,) = free_ports(1)
    for name, value in servers.QUICK.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    results = []
    for address in (f"http://me:{SECRET}@127.0.0.1:{port}", f"sqlite:///{here}/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        results.append(CliRunner().invoke(probes.main, ["mlflow"]))

    assert [result.exit_code for result in results] == [75, 0]
    assert SECRET not in results[0].output
    assert results[1].output == f"sqlite:///{here}/mlflow.db will be made by the first record\n"
    assert not (here / "mlflow.db").exists()
    assert time.monotonic() - begin < 60


def test_the_database_is_named_where_the_record_goes(here, monkeypatch):
    """The current folder, the repository that runs are cloned from, or ESPALIER_HOME."""
    for name in ("ESPALIER_REPOSITORY", "ESPALIER_HOME"):
        monkeypatch.delenv(name, raising=False)
    lines = [found(servers.check_mlflow)]
    for name in ("ESPALIER_REPOSITORY", "ESPALIER_HOME"):
        (here / name).mkdir()
        monkeypatch.setenv(name, str(here / name))
        lines.append(found(servers.check_mlflow))

    places = (here, here / "ESPALIER_REPOSITORY", here / "ESPALIER_HOME")
    assert lines == [[f"ok: MLFLOW_TRACKING_URI is not set: the record goes to {it}/mlflow.db"] for it in places]


@pytest.mark.e2e
def test_real_servers_answer(here, monkeypatch, swift, prefect_server, bare_mlflow_server):
    """MLflow, Prefect, the store and the remote of DVC, all in S3 or on loopback; no line holds a password."""
    (here / "empty").touch()  # dvc-s3 fails at the /dev/null that suits boto3
    environment = {
        **prefect_server.client_environment(),
        **bare_mlflow_server.client_environment(),
        **s3_environment(swift),
        **dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(here / "empty")),
        "ESPALIER_STORE": "s3://espalier/doctor",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3_client(swift).create_bucket(Bucket="espalier")
    (here / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n    remote = s\n['remote \"s\"']\n    url = s3://espalier/dvc\n"
    )
    result = CliRunner().invoke(main, ["doctor"])
    lines = result.output.splitlines()

    for name in ("DVC", "store", "MLflow", "Prefect"):
        assert any(line.startswith(f"ok    {name} ") and "answers" in line for line in lines), result.output
    assert prefect_server.password not in result.output
