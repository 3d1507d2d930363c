"""A version -> its pipeline run again in an empty workspace, and a verdict: identical, equal or different."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from stages.models.layout import PLAN, WEIGHTS, denoiser_name
from stages.protocol.evaluation import EvaluationRecord, read_evaluation
from stages.register.ledger_entry import describe_user
from stages.register.lineage import ARRAYS, Lineage, hash_outputs, read_lineage, read_runs
from stages.register.registry import EVIDENCE, MODEL, OURS, Registry
from stages.register.reproducible import check_reproducible
from stages.register.sandbox.environment import REPLACED, make_environment
from stages.register.sandbox.run import one_line
from stages.register.versions import downloaded
from stages.runtime import supervisor
from stages.runtime.errors import InputError, first_line, warn, without_password
from stages.runtime.git import git_error, git_output, without_user
from stages.storage.files import copy_file, file_sha256
from stages.storage.tensors import read_tensors
from stages.tracking.compression import Compression

COMPARED = ("model_index.json", PLAN, "scheduler/scheduler_config.json", "{model}/config.json", f"{{model}}/{WEIGHTS}")
"""Files of the released model, {model} in its own folder, that are compared; its card holds times, which vary."""
UNKNOWN = "unknown"
REMOTES_VARIABLE = "ESPALIER_REMOTES"
"""Environment variable: addresses, separated by spaces, from which the commit of a version may be cloned and run."""
EXTRA_VARIABLE = "ESPALIER_EXTRA_VARIABLES"
"""Environment variable: names, separated by spaces, of further variables that a reproduction may read."""
PASSED = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"),
    *("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_DEFAULT_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME"),  # a model or images in a bucket, and DVC's remote
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),  # a model or images on the Hub
    *("HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"),
)
"""Variables that the commands of a reproduction read besides those of every sandbox."""


@dataclass(frozen=True)
class FileDifference:
    """A file that was not reproduced."""

    path: str
    what: str
    """How it differs."""
    is_numeric: bool
    """Whether the two files may differ in the values of their numbers only."""


@dataclass(frozen=True)
class MetricComparison:
    """A metric of the version and of its reproduction."""

    name: str
    then: float
    now: float
    allowed: float
    """Largest absolute difference: half the width of the version's 95 % interval."""

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within the interval."""
        return abs(self.now - self.then) <= self.allowed


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a version with its reproduction."""

    uri: str
    num_files: int = 0
    """Number of compared files."""
    files: list[FileDifference] = field(default_factory=list)
    metrics: list[MetricComparison] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)
    """Differences between the two machines: versions of packages, device."""
    obstacle: str = ""
    """Why files or metrics could not be compared; empty if they were."""

    @property
    def verdict(self) -> Literal["identical", "equal within tolerance", "different"]:
        """Identical files and metrics, differences in numbers with every metric within its interval, or neither."""
        if self.obstacle or not all(file.is_numeric for file in self.files):
            return "different"
        if not self.files and all(metric.now == metric.then for metric in self.metrics):
            return "identical"
        return "equal within tolerance" if all(metric.is_equal for metric in self.metrics) else "different"


def reproduce(uri: str, repository: str | None, workspace: Path | None, *, trust: bool = False) -> Reproduction:
    """Run a version's commit with its params, without any cache, compare the results, and tag the version with them.

    A tag that cannot be written causes a warning.

    Args:
        uri: models:/NAME/3 or models:/NAME@champion.
        repository: Folder or address to clone from; None takes this checkout if it has the commit, else the version's
            own remote if that is allowed.
        workspace: Empty folder for the work, which is kept; None takes a temporary one.
        trust: Whether the code of a model that the version's params trust may run, though its commit does not name it.

    Raises:
        InputError: The version or its commit does not exist, its remote or model is not allowed, its params name what
            a reproduction does not reach, or the workspace is not empty.
        UnavailableError: The server does not answer.
    """
    with downloaded(uri) as (name, files), tempfile.TemporaryDirectory() as temporary:
        lineage = read_lineage(files / EVIDENCE)
        folder = workspace or Path(temporary) / "workspace"
        _check_empty(folder)
        try:
            _clone(lineage, repository, folder)
            check_reproducible(files / EVIDENCE / "params.yaml", folder, _known_variables(), trust=trust)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)  # the next attempt needs an empty one
            raise
        copy_file(files / EVIDENCE / "params.yaml", folder / "params.yaml")
        result = Reproduction(name, obstacle=_run_pipeline(folder))
        if not result.obstacle:
            result = _compare(name, files, lineage, folder)
    _tag_version(result)
    return result


def _tag_version(result: Reproduction) -> None:
    """Write a result onto its version; if that fails, the result of hours of work is still returned."""
    record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": describe_user(), **asdict(result)}
    try:
        registry = Registry()
        registry.tag(registry.find(result.uri), reproduced=result.verdict, reproduction=json.dumps(record))
    except InputError as error:
        warn(f"{result.uri} is {result.verdict}, which its tags do not say: {error.message}")


def _check_empty(folder: Path) -> None:
    try:
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({first_line(error)}); give another folder") from None
    if not empty:
        raise InputError(f"{folder} is not empty; give an empty folder or one that does not exist")


def _clone(lineage: Lineage, repository: str | None, folder: Path) -> None:
    """Check the version's commit out into a folder."""
    source = repository or _find_repository(lineage)
    for cwd, command in (
        (None, ["clone", "--quiet", "--no-checkout", "--", without_user(source), str(folder)]),
        (folder, ["checkout", "--quiet", "--detach", lineage.git_commit]),
    ):
        if message := git_error(cwd, *command, address=source):
            found = f"commit {lineage.git_commit[:12]} cannot be checked out from {source}: {message}"
            raise InputError(f"{without_password(found)}; name another repository with --repository")
    (folder / "dvc.lock").unlink(missing_ok=True)  # it holds the results that DVC is to compute


def _find_repository(lineage: Lineage) -> str:
    """Return this checkout, or the version's remote if this machine allows it; whoever registers writes the lineage.

    Raises:
        InputError: The lineage names another address, or none.
    """
    found = f"this checkout has no commit {lineage.git_commit[:12]}"
    if git_output(Path(), "cat-file", "-e", f"{lineage.git_commit}^{{commit}}") is not None:
        return str(Path.cwd())
    if not lineage.git_remote:
        raise InputError(f"{found}; name a repository that has it with --repository")
    own = git_output(Path(), "config", "--get", "remote.origin.url")
    allowed = [*os.environ.get(REMOTES_VARIABLE, "").split(), *([own] if own else [])]
    for address in allowed:
        if without_password(address) == lineage.git_remote:
            return address
    named = one_line(without_password(lineage.git_remote))
    raise InputError(
        f"{found}, and the version names {named}, whose code is not allowed to run here; "
        f"add that address to {REMOTES_VARIABLE}, or name a repository with --repository"
    )


def _run_pipeline(folder: Path) -> str:
    """Run every stage without caches, and record the result in a database of its own; returns what failed, if any."""
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"]
    with tempfile.TemporaryDirectory() as home:
        environment = _make_environment(folder.resolve(), Path(home))
        code = _run_supervised(command, folder, environment)
    return f"dvc repro failed with exit code {code}" if code else ""


def _run_supervised(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a command of which nothing outlives this process, whose end closes the supervisor's standard input."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", supervisor.__file__, *command],
        stdin=subprocess.PIPE,
        cwd=folder,
        env=environment,
        start_new_session=True,
    ) as process:
        return process.wait()


def _passed_variables() -> tuple[str, ...]:
    return (*PASSED, *os.environ.get(EXTRA_VARIABLE, "").split())


def _known_variables() -> set[str]:
    """Names of the variables that the commands of a commit get as they are here."""
    return {name for name in _passed_variables() if name in os.environ} - REPLACED


def _make_environment(folder: Path, home: Path) -> dict[str, str]:
    """Return the variables for the commands of a commit, which need not be this checkout's."""
    hub, torch = os.environ.get("HF_HOME", "~/.cache/huggingface"), os.environ.get("TORCH_HOME", "~/.cache/torch")
    return {
        **_profile_files(),
        **make_environment(home, _passed_variables()),
        "HF_HUB_CACHE": os.environ.get("HF_HUB_CACHE") or str(Path(hub, "hub").expanduser()),  # without its token
        "TORCH_HOME": str(Path(torch).expanduser()),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def _profile_files() -> dict[str, str]:
    """Return the variables of the files that have a chosen profile, which the home of a sandbox has not."""
    places = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
    is_chosen = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    paths = {name: Path(place).expanduser() for name, place in places.items()} if is_chosen else {}
    return {name: str(path) for name, path in paths.items() if path.is_file()}


def _compare(uri: str, files: Path, lineage: Lineage, workspace: Path) -> Reproduction:
    """Compare every file first: what the work did not leave, or left damaged, makes it different and is no error."""
    compression = Compression(workspace / "artifacts", workspace / "reports")
    then = read_evaluation(files / EVIDENCE / "evaluation")
    result = Reproduction(uri=uri, num_files=len(lineage.outputs) + len(COMPARED))
    try:
        compared = [
            *_compare_outputs(lineage.outputs, hash_outputs(workspace)),
            *_compare_model(files / MODEL, workspace / "artifacts" / "released" / OURS),
        ]
        result = replace(result, files=compared)
        now = read_evaluation(compression.folders["evaluate"])
        machine = sorted(set(_compare_machines(lineage.runs, read_runs(compression))))
    except InputError as error:
        return replace(result, obstacle=one_line(error.message))
    result = replace(result, machine=machine)
    if then.protocol_id != now.protocol_id:
        obstacle = f"the protocol is {now.protocol_id} now, and was {then.protocol_id}; metrics cannot be compared"
        return replace(result, obstacle=obstacle)
    if OURS not in now.models or OURS not in then.models:
        return replace(result, obstacle=f"an evaluation lacks the model {OURS}; metrics cannot be compared")
    if lacking := then.models[OURS].metrics().keys() - now.models[OURS].metrics().keys():
        obstacle = f"the evaluation lacks {', '.join(sorted(lacking))} now; metrics cannot be compared"
        return replace(result, obstacle=obstacle)
    return replace(result, metrics=list(_compare_metrics(then, now)))


def _compare_outputs(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[FileDifference]:
    for path, sha256 in expected.items():
        if path not in found:
            yield FileDifference(path, "missing", is_numeric=False)
        elif found[path] != sha256:
            yield FileDifference(path, "another hash", is_numeric=Path(path).suffix in ARRAYS)


def _compare_model(then: Path, now: Path) -> Iterator[FileDifference]:
    for name in [pattern.format(model=denoiser_name(then)) for pattern in COMPARED]:
        path = f"artifacts/released/{OURS}/{name}"
        if not (now / name).is_file() or not (then / name).is_file():
            whose = "missing" if (then / name).is_file() else "not in the version"
            yield FileDifference(path, whose, is_numeric=False)
        elif file_sha256(then / name) == file_sha256(now / name):
            continue
        elif Path(name).suffix == ".safetensors":
            yield _compare_tensors(path, then / name, now / name)
        else:
            yield FileDifference(path, "another content", is_numeric=False)


def _compare_tensors(path: str, then: Path, now: Path) -> FileDifference:
    old, new = read_tensors(then), read_tensors(now)
    if {key: it.shape for key, it in old.items()} != {key: it.shape for key, it in new.items()}:
        return FileDifference(path, "other names or shapes of tensors", is_numeric=False)
    differences = {key: float((old[key].double() - new[key].double()).abs().max()) for key in old}
    worst = max(differences, key=lambda key: differences[key])
    changed = sum(difference > 0 for difference in differences.values())
    what = f"{changed} of {len(differences)} tensors differ, most {worst} by {differences[worst]:.2g}"
    return FileDifference(path, what, is_numeric=True)


def _compare_metrics(then: EvaluationRecord, now: EvaluationRecord) -> Iterator[MetricComparison]:
    old, new = (it.models[OURS].metrics() for it in (then, now))
    for name in old:
        yield MetricComparison(name, old[name].mean, new[name].mean, old[name].half_width or 0)


def _compare_machines(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """List how the machine of each stage differs; these differences do not decide the verdict."""
    for stage, run in now.items():
        old, new = _machine(then.get(stage, {})), _machine(run)
        for key in new:
            if old.get(key, UNKNOWN) != new[key]:
                yield f"{key} {old.get(key, UNKNOWN)}, now {new[key]}"


def _machine(run: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the machine of a run; the device is missing if its provenance is unknown."""
    device = (run.get("provenance") or {}).get("device", {})
    return {
        "python": run.get("python"),
        **run.get("packages", {}),
        **{f"device {key}": value for key, value in device.items()},
    }
