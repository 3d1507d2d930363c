"""A finished compression -> a version of a model in the registry, with all that proves it."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stages.protocol.evaluation import EvaluationRecord, Metric, read_evaluation
from stages.register.ledger import SUFFIX
from stages.register.lineage import Lineage, take_lineage
from stages.register.package import hash_folder, write_package
from stages.register.registry import CHALLENGER, CHAMPION, CONTENT, GATE, OURS, Registry
from stages.runtime.errors import InputError, first_line
from stages.storage.s3 import open_store
from stages.tracking import recording
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def register(compression: Compression, unsent: Path, name: str | None) -> "tuple[ModelVersion, bool]":
    """Make sure that the compression is a version, and the challenger if it is new: the version, whether it is new.

    The version is created last, in one call, when all of its files are there: a server that dies on the way leaves none
    of it, and the next call goes on.

    Args:
        compression: What to register.
        unsent: Where its record waits for the server.
        name: Of the model in the registry; None for one made from the base model's.

    Raises:
        InputError: The compression is not finished or not reproducible, or a server is away.
    """
    lineage = take_lineage(compression)
    record = read_evaluation(compression.folders["evaluate"])
    registry, name, content_id = Registry(), name or _default_name(lineage), compression.id()
    if name.endswith(SUFFIX):
        raise InputError(f"{name} is the name of a ledger; give a name that does not end in {SUFFIX}")
    if _find(registry, name, content_id):
        return _settle(registry, name, content_id), False
    with errors("does not take the record"):
        run_id, _ = recording.record(compression, unsent)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "version"
        try:
            content = write_package(compression, _store(compression, lineage, name), folder)
        except OSError as error:
            raise InputError(
                f"the version cannot be packed in {temporary} ({first_line(error)}); free some space"
            ) from None
        place = f"versions/{content[:16]}"
        with errors("does not take the files"):
            registry.client.log_artifacts(run_id, str(folder), place)
            source = f"{registry.client.get_run(run_id).info.artifact_uri}/{place}"
    registry.ensure(f"{name}{SUFFIX}")  # by whoever makes the model, so that nobody else can own its ledger
    tags = {recording.COMPRESSION_TAG: content_id, CONTENT: content, **_describe(record, lineage)}
    registry.create(name, source, run_id, tags, _version_description(record))
    return _settle(registry, name, content_id), True


def _find(registry: Registry, name: str, compression: str) -> "list[ModelVersion]":
    """Find the versions of a compression, the oldest first: one, or more where two machines made one at once."""
    found = [it for it in registry.versions(name) if it.tags.get(recording.COMPRESSION_TAG) == compression]
    return found[::-1]


def _settle(registry: Registry, name: str, compression: str) -> "ModelVersion":
    """Keep one version of the compression, and let the alias challenger point to it unless it was decided on."""
    first, *others = _find(registry, name, compression)
    for other in others:
        registry.remove(other)
    champion, challenger = (registry.by_alias(name, alias) for alias in (CHAMPION, CHALLENGER))
    newer = challenger is not None and int(challenger.version) > int(first.version)
    is_champion = champion is not None and champion.version == first.version
    if GATE not in first.tags and not newer and not is_champion:
        registry.point(name, CHALLENGER, first.version)
    return first


def _store(compression: Compression, lineage: Lineage, name: str) -> Lineage:
    """Keep a copy of the model in the store, where there is one, and note its address."""
    store = open_store()
    if store is None:
        return lineage
    manifest = f"models/{name}/{hash_folder(compression.released)[:16]}"
    store.push(compression.released, manifest)
    return lineage.model_copy(update={"store": f"{store.uri}, {manifest}"})


def _default_name(lineage: Lineage) -> str:
    source = lineage.runs["fetch"]["params"]["fetch"]["model"]
    base = next((str(source[key]) for key in ("repo", "name", "system", "path", "uri") if source.get(key)), None)
    if base is None:
        raise InputError("the base model has no name; give one to the version with --name")
    if source["source"] == "registry":
        base = base.rpartition("/")[0]  # models:/NAME/VERSION
    return f"espalier-{base.rstrip('/').rsplit('/')[-1].removeprefix('espalier-')}"


def _describe(record: EvaluationRecord, lineage: Lineage) -> dict[str, str]:
    """Tags for those who look through versions."""
    model = record.models[OURS]
    return {
        "espalier.protocol": record.protocol_id,
        "espalier.commit": lineage.git_commit,
        "espalier.fid": _write(model.fid),
        "espalier.ssim": _write(model.ssim),
        "espalier.macs": f"{1 / record.macs_ratio(OURS):.1%} of the dense model's",
    }


def _write(metric: Metric) -> str:
    return f"{metric.mean:.4g}" + (f" ± {metric.half_width:.2g}" if metric.half_width is not None else "")


def _version_description(record: EvaluationRecord) -> str:
    model = record.models[OURS]
    return (
        f"{1 / record.macs_ratio(OURS):.1%} of the dense model's MACs; FID {_write(model.fid)}, dense "
        f"{_write(record.models['dense'].fid)}; SSIM against dense {_write(model.ssim)}; protocol "
        f"{record.protocol_id}, {record.protocol.sets} sets of {record.protocol.num_images} images."
    )
