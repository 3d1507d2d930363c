"""A finished compression -> an MLflow model folder without pickle, and the check that it is still that folder."""

import hashlib
import inspect
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.models.autoencoder import read_autoencoder
from stages.models.layout import CLASS_EMBEDDING
from stages.models.params import SamplerParams
from stages.models.pipeline import CPU, read_scheduler
from stages.models.samplers import make_sampler
from stages.protocol.evaluation import read_evaluation
from stages.register.canary import draw
from stages.register.lineage import FILES, Lineage
from stages.register.registry import EVIDENCE
from stages.runtime.errors import InputError, first_line
from stages.storage.files import RUN_RECORD, copy_file, read_bytes, read_json, write_atomically, write_json
from stages.storage.s3 import Manifest, describe
from stages.tracking.compression import Compression

FILES_LIST = "files.json"
ADDED_BY_MLFLOW = "registered_model_meta"
"""MLflow writes it into what it downloads."""
REQUIREMENTS = ("diffusers", "mlflow", "numpy", "pillow", "safetensors", "torch")
CANARY_SEEDS = (0, 1, 2, 3)
CODE = "draw.py"
ALLOWED = {".csv", ".json", ".lock", ".md", ".png", ".py", ".safetensors", ".svg", ".txt", ".yaml"}
"""What a version may consist of, beside MLmodel; no format that can hold a pickle."""
SAMPLER = "sampler.json"


def hash_folder(folder: Path) -> str:
    """Name a folder by its files."""
    return hashlib.sha256(list_files(folder).model_dump_json().encode()).hexdigest()


def list_files(folder: Path) -> Manifest:
    """Hash every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(files=[describe(path, folder) for path in paths])


def write_package(compression: Compression, lineage: Lineage, folder: Path) -> str:
    """Write the version: released model, evidence, and a record of every file.

    Args:
        compression: Whose model.
        lineage: Where it comes from.
        folder: Where to; it must not exist.

    Returns:
        The sha256 of the list of files.

    Raises:
        InputError: Something of the compression is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model, evidence = Path(temporary) / "model", Path(temporary) / "evidence"
        shutil.copytree(compression.released, model)
        _write_evidence(compression, lineage, evidence)
        _save(model, evidence, folder)
    for seed, png in draw(folder, CANARY_SEEDS).items():
        write_atomically(folder / EVIDENCE / "canary" / f"{seed}.png", png)
    write_json(folder / FILES_LIST, list_files(folder).model_dump(mode="json"))
    return hash_list(folder)


def hash_list(folder: Path) -> str:
    """Hash the list of files, which stands for them all."""
    return hashlib.sha256(read_bytes(folder / FILES_LIST)).hexdigest()


def check_files(folder: Path, content: str | None) -> None:
    """Compare every file of a version with the hash under which it was registered.

    Args:
        folder: The version, downloaded.
        content: The hash of the list of files, from the registry; None where the registry has none.

    Raises:
        InputError: A file was changed, added or removed, or the list itself was.
    """
    if content is None or not (folder / FILES_LIST).is_file():
        raise InputError("the version has no list of files with hashes; it was not registered by Espalier")
    if hash_list(folder) != content:
        raise InputError(f"{FILES_LIST} is not the one that was registered: the version was tampered with")
    try:
        manifest = Manifest.model_validate(read_json(folder / FILES_LIST))
    except ValidationError as error:
        raise InputError(f"{FILES_LIST} is damaged ({first_line(error)})") from None
    expected = {entry.path: entry for entry in manifest.files}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    added = sorted(present - set(expected) - {FILES_LIST, ADDED_BY_MLFLOW})
    changed = [name for name in expected if name not in present or describe(folder / name, folder) != expected[name]]
    if changed or added:
        found = ", ".join([*(f"{name} changed or gone" for name in changed), *(f"{name} added" for name in added)][:5])
        raise InputError(f"the version was tampered with: {found}")


def check_formats(folder: Path) -> None:
    """Refuse what could be unpickled: a version is text, pictures and safetensors, and MLflow opens it as code.

    Raises:
        InputError: A file has another format, or MLmodel asks for another way to open it.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("MLmodel", ADDED_BY_MLFLOW)]
    odd = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix not in ALLOWED)
    if odd:
        raise InputError(f"{', '.join(odd[:5])}: a version holds no such format, since it might be a pickle")
    try:
        tree = YAML(typ="safe").load((folder / "MLmodel").read_text())
        flavors, opened = set(tree["flavors"]), tree["flavors"]["python_function"]
        ways = opened["loader_module"], opened["model_code_path"], opened.get("python_model")
    except (OSError, YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError("MLmodel is damaged; register the compression again") from None
    if flavors != {"python_function"} or ways != ("mlflow.pyfunc.loaders.code_model", CODE, None):
        raise InputError("MLmodel is to be opened in another way than as the code beside it; register it again")


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
    """Name class and settings of the sampler as diffusers builds it.

    Quadratic spacing, which is ours, becomes the trailing one of diffusers' own DDIM.
    """
    if params.spacing == "quadratic":
        params = params.model_copy(update={"spacing": "trailing"})
    sampler = make_sampler(read_scheduler(model), params)
    known = inspect.signature(type(sampler)).parameters
    config = {key: value for key, value in sampler.config.items() if key in known}
    return {
        "class": type(sampler).__name__,
        "config": json.loads(json.dumps(config)),
        "steps": params.steps,
        "eta": params.eta,
        "takes": sorted({"generator", "eta"} & set(inspect.signature(sampler.step).parameters)),
    }


def _describe_context(model: Path) -> dict[str, Any]:
    """Say what latents are scaled by, and how many classes there are and which row of their table is none."""
    autoencoder, home = read_autoencoder(model, CPU), model / CLASS_EMBEDDING
    about = read_json(home / "config.json") if home.is_dir() else {}
    return {
        "latent_scale": autoencoder.scale if autoencoder else None,
        "classes": about.get("num_classes"),
        "without_class": about.get("unconditional"),
    }


def _save(model: Path, evidence: Path, folder: Path) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    label = [ColSpec("long", "label", required=False)] if (model / CLASS_EMBEDDING).is_dir() else []
    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "seed"), *label]),
        outputs=Schema([ColSpec("long", "seed"), ColSpec("string", "png")]),
    )
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name(CODE)),
        artifacts={"model": str(model), "evidence": str(evidence)},
        signature=signature,
        input_example={"seed": [0, 1]},
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
    )
    _forget_where_and_when(folder / "MLmodel")


def _forget_where_and_when(path: Path) -> None:
    """Take time, random names and this machine's paths out, so that the same compression makes the same version."""
    tree = YAML(typ="safe").load(path.read_text())
    flavor = tree["flavors"]["python_function"]
    for name, artifact in flavor["artifacts"].items():
        artifact["uri"] = name
    flavor["model_code_path"] = CODE
    for key in ("model_uuid", "utc_time_created"):
        tree.pop(key, None)
    with path.open("w") as file:
        YAML(typ="safe").dump(tree, file)
