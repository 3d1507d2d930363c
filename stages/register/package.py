"""A finished compression -> the folder of a version, an MLflow model without pickle; and the checks of its files."""

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from pydantic import ValidationError
from ruamel.yaml import YAML

from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import read_autoencoder
from stages.models.layout import CLASS_EMBEDDING
from stages.models.own_code import is_own
from stages.models.params import SamplerParams
from stages.models.pipeline import CPU, denoiser_folder, read_scheduler, read_unet
from stages.models.samplers import make_sampler
from stages.models.sampling import takes_whole_timesteps
from stages.models.trust import trusting_params
from stages.protocol.evaluation import read_evaluation
from stages.register.lineage import FILES, Lineage
from stages.register.variants import copy_variants, is_graph
from stages.runtime.errors import InputError, first_line
from stages.runtime.schema import read_tree
from stages.storage.files import RUN_RECORD, copy_file, read_bytes, read_json, write_json
from stages.storage.manifest import Manifest, describe
from stages.tracking.compression import Compression

FILES_LIST = "files.json"
ADDED_BY_MLFLOW = "registered_model_meta"
"""File that MLflow adds to a downloaded version."""
REQUIREMENTS = ("diffusers", "mlflow", "numpy", "pillow", "safetensors", "torch")
RUNTIME = "onnxruntime"
"""What a version with graphs needs besides, to draw with them."""
CODE = "draw.py"
ALLOWED = {".csv", ".json", ".lock", ".md", ".png", ".py", ".safetensors", ".svg", ".txt", ".yaml"}
"""Suffixes of the files of a version beside MLmodel and graphs; none of these formats can contain a pickle."""
SAMPLER = "sampler.json"


def is_model_file(path: PurePath) -> bool:
    """Return whether a path within a released model has an allowed suffix and no hidden part."""
    return path.suffix in ALLOWED and not any(part.startswith(".") for part in path.parts)


def list_files(folder: Path) -> Manifest:
    """List all files of a folder with their sizes and hashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(files=[describe(path, folder) for path in paths])


def write_package(compression: Compression, lineage: Lineage, folder: Path) -> str:
    """Write the folder of a version: released model, its variants, evidence, and files.json, the list of all its files.

    Args:
        compression: The finished compression.
        lineage: Its lineage.
        folder: Folder to write; it must not exist.

    Returns:
        The sha256 of files.json.

    Raises:
        InputError: A file of the compression is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("model", "evidence", "variants")}
        shutil.copytree(compression.released, folders["model"])
        _write_evidence(compression, lineage, folders["evidence"])
        if not copy_variants(compression, folders["variants"], folders["evidence"]):
            del folders["variants"]
        _save_mlflow_model(folders, folder)
    write_json(folder / FILES_LIST, list_files(folder).model_dump(mode="json"))
    return hash_list(folder)


def hash_list(folder: Path) -> str:
    """Hash files.json, which holds the hash of every other file."""
    return hashlib.sha256(read_bytes(folder / FILES_LIST)).hexdigest()


def check_files(folder: Path, content: str | None) -> None:
    """Compare every file of a version with the hash under which it was registered.

    Args:
        folder: The downloaded version.
        content: The hash of files.json in the registry; None if the version has no such tag.

    Raises:
        InputError: A file or files.json was changed, added or removed.
    """
    if content is None or not (folder / FILES_LIST).is_file():
        raise InputError("the version has no files.json with hashes; it was not registered by Espalier")
    if hash_list(folder) != content:
        raise InputError(f"the version was tampered with: {FILES_LIST} does not have its registered hash")
    try:
        manifest = Manifest.model_validate(read_json(folder / FILES_LIST))
    except ValidationError as error:
        raise InputError(f"{FILES_LIST} is damaged ({first_line(error)})") from None
    expected = {entry.path: entry for entry in manifest.files}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    added = sorted(present - set(expected) - {FILES_LIST, ADDED_BY_MLFLOW})
    changed = [name for name in expected if name not in present or describe(folder / name, folder) != expected[name]]
    if changed or added:
        found = ", ".join(
            [*(f"{name} changed or removed" for name in changed), *(f"{name} added" for name in added)][:5]
        )
        raise InputError(f"the version was tampered with: {found}")


def check_formats(folder: Path) -> list[Path]:
    """Refuse files that could be unpickled: a version is text, images and safetensors, and MLflow loads it as code.

    Variants may be ONNX graphs, which are protobuf with numbers and the names of operators.

    Returns:
        The graphs.

    Raises:
        InputError: A file has another format, or MLmodel names another loader.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("MLmodel", ADDED_BY_MLFLOW)]
    graphs = [path for path in paths if is_graph(path.relative_to(folder))]
    unknown = [path for path in paths if path.suffix not in ALLOWED and path not in graphs]
    other = sorted(path.relative_to(folder).as_posix() for path in unknown)
    if other:
        raise InputError(
            f"{', '.join(other[:5])}: the format may contain a pickle; allowed: {', '.join(sorted(ALLOWED))}"
        )
    try:
        tree = read_tree(folder / "MLmodel", YAML(typ="safe"))
        flavors, flavor = set(tree["flavors"]), tree["flavors"]["python_function"]
        loader = flavor["loader_module"], flavor["model_code_path"], flavor.get("python_model")
    except (InputError, KeyError, TypeError, AttributeError):
        raise InputError("MLmodel is damaged; register the compression again") from None
    if flavors != {"python_function"} or loader != ("mlflow.pyfunc.loaders.code_model", CODE, None):
        raise InputError(f"MLmodel names another loader than the code in {CODE}; register the compression again")
    return graphs


def _write_evidence(compression: Compression, lineage: Lineage, folder: Path) -> None:
    evaluation = compression.folders["evaluate"]
    for name in ("evaluation.json", RUN_RECORD):
        copy_file(evaluation / name, folder / "evaluation" / name)
    copy_file(compression.folders["costs"] / "costs.json", folder / "costs" / "costs.json")
    for name in FILES:
        copy_file(Path(name), folder / name)
    write_json(folder / "lineage.json", lineage.model_dump(mode="json"))
    protocol = read_evaluation(evaluation).protocol
    settings = {**_describe_sampler(protocol.sampler, compression.released), "guidance": protocol.guidance}
    write_json(folder / SAMPLER, {**settings, **_describe_context(compression.released)})


def _describe_sampler(params: SamplerParams, model: Path) -> dict[str, Any]:
    """Describe the sampler by its diffusers class and config, so that a version draws without Espalier."""
    scheduler = read_scheduler(model)
    params = replace_quadratic(params, scheduler)
    sampler = make_sampler(scheduler, params)
    accepted = inspect.signature(type(sampler)).parameters
    config = {key: value for key, value in sampler.config.items() if key in accepted}
    return {
        "class": type(sampler).__name__,
        "config": json.loads(json.dumps(config)),
        "steps": params.steps,
        "eta": params.eta,
        "takes": sorted({"generator", "eta"} & set(inspect.signature(sampler.step).parameters)),
    }


def replace_quadratic(params: SamplerParams, scheduler: DDPMScheduler) -> SamplerParams:
    """Replace quadratic spacing, which diffusers' DDIM does not have, by as many trailing steps or the next divisor."""
    if params.spacing != "quadratic":
        return params
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    steps = next(count for count in range(params.steps, num_timesteps + 1) if num_timesteps % count == 0)
    return params.model_copy(update={"spacing": "trailing", "steps": steps})


def _describe_context(model: Path) -> dict[str, Any]:
    """Describe the scale of latents, the number of classes, how they enter, and the row or label for no class."""
    place = denoiser_folder(model)
    has_code = is_own(read_json(place / "config.json"), place)
    with trusting_params(Path("params.yaml")) if has_code else nullcontext():  # the file is among the evidence
        unet = read_unet(model)
    autoencoder, table = read_autoencoder(model, CPU), read_class_embedding(unet, model)
    classes: dict[str, Any] = {"classes": None, "without_class": None, "condition": None}
    if table is not None and table.ndim == 1:
        classes = {"classes": len(table) - 1, "without_class": int(table[-1]), "condition": "class_labels"}
    elif table is not None:
        empty = read_json(model / CLASS_EMBEDDING / "config.json").get("unconditional")
        classes = {"classes": len(table) - 1, "without_class": empty, "condition": "encoder_hidden_states"}
    scale = autoencoder.scale if autoencoder else None
    return {"latent_scale": scale, "whole_timesteps": takes_whole_timesteps(unet), **classes}


def _save_mlflow_model(folders: Mapping[str, Path], folder: Path) -> None:
    """Save the folders of a version as an MLflow model; a request may name a variant."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    has_classes = read_json(folders["evidence"] / SAMPLER)["classes"] is not None
    label = [ColSpec("long", "label", required=False)] if has_classes else []
    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "seed"), *label]),
        outputs=Schema([ColSpec("long", "seed"), ColSpec("string", "png")]),
        params=ParamSchema([ParamSpec("variant", "string", None)]),
    )
    has_graph = "variants" in folders and any(folders["variants"].rglob("*.onnx"))
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name(CODE)),
        artifacts={name: str(path) for name, path in folders.items()},
        signature=signature,
        input_example={"seed": [0, 1]},
        pip_requirements=[_require(name) for name in (*REQUIREMENTS, *([RUNTIME] if has_graph else []))],
    )
    _remove_varying_fields(folder / "MLmodel")


def _require(name: str) -> str:
    """Pin a package to the version that is installed; a graph can come from a machine with another runtime."""
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:
        return name


def _remove_varying_fields(path: Path) -> None:
    """Remove time, random ids and paths of this machine from MLmodel, so that one compression gives one version."""
    tree = YAML(typ="safe").load(path.read_text())
    flavor = tree["flavors"]["python_function"]
    for name, artifact in flavor["artifacts"].items():
        artifact["uri"] = name
    flavor["model_code_path"] = CODE
    for key in ("model_uuid", "utc_time_created"):
        tree.pop(key, None)
    with path.open("w") as file:
        YAML(typ="safe").dump(tree, file)
