"""A finished compression -> a version of a model in the registry, with its evidence."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stages.protocol.evaluation import EvaluationRecord, Metric, read_evaluation
from stages.register.ledger import SUFFIX
from stages.register.lineage import Lineage, read_workspace_lineage
from stages.register.package import write_package
from stages.register.registry import CHALLENGER, CHAMPION, CONTENT, GATE, OURS, Registry
from stages.register.variants import own_variants
from stages.runtime.errors import InputError, first_line
from stages.runtime.wording import count
from stages.storage.files import folder_sha256
from stages.storage.s3 import open_store
from stages.tracking import recording
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import errors
from stages.tracking.presentation import short_name, show_picture, verdict_line
from stages.tracking.runs import COMPRESSION_TAG

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def register(compression: Compression, unsent: Path, name: str | None) -> "tuple[ModelVersion, bool]":
    """Register a compression as a version and make it the challenger, unless it is registered already.

    The version is created last, in one request, when all of its files are uploaded: an interrupted call leaves no
    incomplete version, and the next call continues.

    Args:
        compression: The finished compression.
        unsent: Folder of records that have not reached the server yet.
        name: Name of the model in the registry; None derives it from the base model's.

    Returns:
        The version, and whether it is new.

    Raises:
        InputError: The compression is not finished or cannot be reproduced.
        UnavailableError: A server does not answer.
    """
    lineage = read_workspace_lineage(compression)
    record = read_evaluation(compression.folders["evaluate"])
    registry, name, content_id = Registry(), name or _default_name(lineage), compression.id()
    if name.endswith(SUFFIX):
        raise InputError(f"{name} is the name of a ledger; give a name that does not end in {SUFFIX}")
    if _find(registry, name, content_id):
        return _keep_first(registry, name, content_id), False
    with errors("failed to store the record"):
        run_id, _ = recording.record_compression(compression, unsent)
    content, source = _upload(registry, run_id, compression, _push_to_store(compression, lineage, name))
    registry.create_model(f"{name}{SUFFIX}")  # the owner of the model must own its ledger, too
    tags = {COMPRESSION_TAG: content_id, CONTENT: content, **_tags(record, lineage)}
    if kinds := own_variants(compression):
        tags["espalier.variants"] = ", ".join(kinds)
    registry.create(name, source, run_id, tags, _description(record, compression.reports, run_id))
    return _keep_first(registry, name, content_id), True


def _find(registry: Registry, name: str, compression: str) -> "list[ModelVersion]":
    """List the versions of a compression, the oldest first; several if two machines registered it at once."""
    versions = [it for it in registry.versions(name) if it.tags.get(COMPRESSION_TAG) == compression]
    return versions[::-1]


def _keep_first(registry: Registry, name: str, compression: str) -> "ModelVersion":
    """Delete all versions of a compression but the first, and make that the challenger.

    The alias is not changed if the version was promoted or refused before, or if the challenger is newer.
    """
    first, *others = _find(registry, name, compression)
    for other in others:
        registry.remove(other)
    champion, challenger = (registry.by_alias(name, alias) for alias in (CHAMPION, CHALLENGER))
    newer = challenger is not None and int(challenger.version) > int(first.version)
    is_champion = champion is not None and champion.version == first.version
    if GATE not in first.tags and not newer and not is_champion:
        registry.set_alias(name, CHALLENGER, first.version)
    return first


def _upload(registry: Registry, run_id: str, compression: Compression, lineage: Lineage) -> tuple[str, str]:
    """Upload the files of a version to a run; returns the hash of their list and their address."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "version"
        try:
            content = write_package(compression, lineage, folder)
        except OSError as error:
            raise InputError(
                f"cannot write the version's files in {temporary} ({first_line(error)}); free some space"
            ) from None
        path = f"versions/{content[:16]}"
        with errors("failed to store the files"):
            registry.client.log_artifacts(run_id, str(folder), path)
            return content, f"{registry.client.get_run(run_id).info.artifact_uri}/{path}"


def _push_to_store(compression: Compression, lineage: Lineage, name: str) -> Lineage:
    """Copy the model to the store, if one is set, and add its address to the lineage."""
    store = open_store()
    if store is None:
        return lineage
    manifest = f"models/{name}/{folder_sha256(compression.released)[:16]}"
    store.push(compression.released, manifest)
    return lineage.model_copy(update={"store": f"{store.uri}, {manifest}"})


def _default_name(lineage: Lineage) -> str:
    try:
        base = short_name(lineage.runs["fetch"]["params"]["fetch"]["model"])
    except (AttributeError, LookupError, TypeError):
        raise InputError("the base model has no name; give the version one with --name") from None
    return f"espalier-{base.removeprefix('espalier-')}"


def _tags(record: EvaluationRecord, lineage: Lineage) -> dict[str, str]:
    """Summarise a version in tags, for MLflow's list of versions."""
    model = record.models[OURS]
    return {
        "espalier.protocol": record.protocol_id,
        "espalier.commit": lineage.git_commit,
        "espalier.fid": _format(model.fid),
        "espalier.ssim": _format(model.ssim),
        "espalier.macs": f"{1 / record.macs_ratio(OURS):.1%} of the dense model's",
    }


def _format(metric: Metric) -> str:
    return f"{metric.mean:.4g}" + (f" ± {metric.half_width:.2g}" if metric.half_width is not None else "")


def _description(record: EvaluationRecord, reports: Path, run_id: str) -> str:
    """Describe a version in Markdown: the verdict, the numbers of the gate, and the picture of its run."""
    model = record.models[OURS]
    numbers = (
        f"{1 / record.macs_ratio(OURS):.1%} of the dense model's MACs; FID {_format(model.fid)}, dense "
        f"{_format(record.models['dense'].fid)}; SSIM against dense {_format(model.ssim)}; protocol "
        f"{record.protocol_id}, {count(record.protocol.sets, 'set')} of {count(record.protocol.num_images, 'image')}."
    )
    return "\n\n".join(filter(None, [verdict_line(reports), numbers, show_picture(run_id, reports)]))
