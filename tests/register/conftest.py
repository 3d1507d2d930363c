"""Fixtures: versions of a tiny model in a registry of the test's own."""

import base64
import shutil
import zlib
from threading import Lock
from types import SimpleNamespace

import pytest

from stages.models.pipeline import write_pipeline
from stages.protocol.evaluation import Metric
from stages.protocol.intervals import estimate
from stages.register import canary, sandboxed_draw
from stages.register.ledger import Ledger
from stages.register.lineage import FILES, Lineage
from stages.register.package import FILES_LIST, hash_list, list_files, write_package
from stages.register.policy import Policy
from stages.register.registry import CHALLENGER, CONTENT, EVIDENCE, MODEL, Registry
from stages.storage.files import file_sha256, read_json, write_json
from tests.records import make_costs, make_evaluation, make_model

NAME = "tiny"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOADING = Lock()
FIDS, SSIMS = [1.0, 1.1, 0.9], [0.95, 0.96, 0.94]


def make_record(protocol, weights, fids=FIDS, ssims=SSIMS, macs=60, dense="a", fids_dense=None):
    """Make an evaluation of a finetuned model as given, and of a dense one with FID 0.9, 1.0, 0.8.

    Without `fids_dense`, FIDs to the dense model's images, it is one from before these were measured.
    """

    def model(values, similar, count, to_dense):
        given = {"fid": values, "ssim": similar} | ({"fid_dense": to_dense} if fids_dense else {})
        metrics = {name: Metric(sets=sets, **vars(estimate(sets))) for name, sets in given.items()}
        return make_model(metrics, macs=count, weights_sha256=weights)

    models = {
        "dense": model([0.9, 1.0, 0.8], [1.0] * 3, 100, [0.0] * 3),
        "finetuned": model(fids, ssims, macs, fids_dense),
    }
    return make_evaluation(protocol, models, dense)


def claim_size(png, side):
    """Write another width and height into the header of a PNG."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


@pytest.fixture
def registry(tmp_path, monkeypatch, mlflow_database, request):  # noqa: ARG001  # in a variable of the environment
    """An empty registry of the test's own, in SQLite, or in PostgreSQL if the test is parametrised so."""
    monkeypatch.chdir(tmp_path)
    if getattr(request, "param", None) == "postgresql":
        postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.new_database())
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    return Registry()


@pytest.fixture
def policy():
    """The promotion policy of the tests."""
    return Policy.model_validate(
        {
            "champion": {"fid": 0.2, "ssim": 0.02, "speed_up": 0.1},
            "dense": {"fid": 0.5, "ssim": 0.15},
            "budget": {"macs": 0.7},
            "latency": {"batch": 1, "precision": "float32", "mode": "eager", "speed_up": 1.0},
            "canary": {"levels": 1.0},
        }
    )


@pytest.fixture
def package(registry, tmp_path, unet, scheduler, protocol, make_once):  # noqa: ARG001  # MLflow needs a registry to save a model
    """The folder of a version, as it is registered."""
    return make_once("package", lambda folder: write(folder, tmp_path, unet, scheduler, protocol))


def write(folder, tmp_path, unet, scheduler, protocol, pipeline=None):
    """Write the folder of a version, of a UNet or the pipeline in a folder, and the variants in the folder beside."""
    released, evaluated, variants = pipeline or tmp_path / "released", tmp_path / "evaluated", tmp_path / "variants"
    for name in FILES:
        (tmp_path / name).write_text(f"# the {name} of the version\n")
    if not pipeline:
        write_pipeline(released, unet, scheduler)
    write_json(released / "pruning_plan.json", {"kept": []})
    weights = file_sha256(released / WEIGHTS)
    record = make_record(protocol.model_copy(update={"sets": 3}), weights)
    write_json(evaluated / "evaluation.json", record.model_dump(mode="json"))
    write_json(evaluated / "run.json", {"stage": "evaluate"})
    write_json(tmp_path / "costs" / "costs.json", make_costs(record).model_dump(mode="json"))
    lineage = Lineage(
        git_commit="c" * 40,
        git_remote=None,
        files={name: file_sha256(tmp_path / name) for name in FILES},
        data_sha256="d" * 64,
        outputs={
            **{f"artifacts/finetuned/{name}": file_sha256(released / name) for name in (WEIGHTS, "pruning_plan.json")},
            **{
                f"artifacts/variants/{path.relative_to(variants)}": file_sha256(path) for path in variants.glob("*/*/*")
            },
        },
        runs={},
        dvc_remotes=[],
    )
    folders = {"evaluate": evaluated, "costs": tmp_path / "costs", "variants": variants}
    compression = SimpleNamespace(released=released, reports=tmp_path / "reports", folders=folders)
    write_package(compression, lineage, folder)


def draw_in_process(folder, seeds, variant=None):
    """Draw the canary in this process and not in a sandbox; the function is the same.

    One thread at a time, since MLflow keeps the code that it loads in a global of the process.
    """
    with LOADING:
        rows = [line.split() for line in sandboxed_draw.draw(str(folder), seeds, variant)]
    return {int(seed): base64.b64decode(png) for seed, png in rows}


@pytest.fixture
def real_canary():
    """Draw the canary in its sandbox although `quick_canary` is in use."""


@pytest.fixture
def quick_canary(request, monkeypatch):
    """Draw the canary in this process unless the test requests `real_canary`."""
    if "real_canary" not in request.fixturenames:
        monkeypatch.setattr(canary, "draw_isolated", draw_in_process)


def outcomes(registry):
    """List (kind, from, to, outcome) of every entry, the oldest first."""
    return [(it.kind, it.start, it.to, it.outcome) for it in reversed(Ledger(registry, NAME).entries())]


def refusals(decision):
    """Map the failed checks to their reasons."""
    return {check.name: check.reason for check in decision.checks if not check.passed}


@pytest.fixture
def package_again(registry, tmp_path, unet, scheduler, protocol):  # noqa: ARG001
    """The folder of the same version, written a second time."""
    write(tmp_path / "again", tmp_path, unet, scheduler, protocol)
    return tmp_path / "again"


@pytest.fixture
def publish(registry, package, protocol, tmp_path):
    """Register a version as challenger: with another evaluation or other costs, or changed by `change(folder)`."""
    count = []

    def publish_one(change=None, changes=None, costs=None, **record):
        count.append(None)
        folder = tmp_path / f"published-{len(count)}"
        shutil.copytree(package, folder)
        (folder / FILES_LIST).unlink()
        under = protocol.model_copy(update={"sets": 3} | (changes or {}))
        evaluation = make_record(under, file_sha256(folder / MODEL / WEIGHTS), **record)
        write_json(folder / EVIDENCE / "evaluation" / "evaluation.json", evaluation.model_dump(mode="json"))
        measured = make_costs(evaluation, **(costs or {}))
        write_json(folder / EVIDENCE / "costs" / "costs.json", measured.model_dump(mode="json"))
        if change:
            change(folder)
        write_json(folder / FILES_LIST, list_files(folder).model_dump(mode="json"))
        version = registry.create(NAME, str(folder), None, {CONTENT: hash_list(folder)}, "")
        registry.set_alias(NAME, CHALLENGER, version.version)
        return version

    return publish_one


@pytest.fixture
def aliases(registry):
    """Read the aliases: alias -> number of the version."""

    def read():
        found = {alias: registry.by_alias(NAME, alias) for alias in ("champion", "challenger", "previous")}
        return {alias: int(version.version) for alias, version in found.items() if version}

    return read


@pytest.fixture
def edit():
    """Change keys of a JSON file, given as keywords."""

    def change(path, **values):
        write_json(path, {**read_json(path), **values})

    return change
