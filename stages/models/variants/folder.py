"""A model and a kind of variant <-> a folder with its weights or graph, a card, and the hashes of all files."""

from pathlib import Path
from typing import Any

import torch

from stages.models.checks import check_layers, check_supported
from stages.models.families import CLASSES, Denoiser, family_of, find_family
from stages.models.layout import WEIGHTS
from stages.models.pipeline import (
    CPU,
    build_unet,
    denoiser_folder,
    last_line,
    read_scheduler,
    read_unet,
    write_pipeline,
)
from stages.models.variants.cache import cache, check_cache
from stages.models.variants.card import write_card
from stages.models.variants.graph import OPSET, check_graph, export_graph, graph_model
from stages.models.variants.kinds import FLOAT8, INTEGERS, ROUNDED, Form, Kind
from stages.models.variants.rounding import dequantize_tensors, quantize_tensors
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import file_sha256, read_json, read_record, write_json
from stages.storage.tensors import read_tensors, write_tensors

RECORD = "variant.json"
GRAPH_FILE = "model.onnx"
CARD = "README.md"
ROUNDED_FILES = {**dict.fromkeys(INTEGERS, "integers.safetensors"), FLOAT8: "float8.safetensors"}
"""Form -> file of its rounded weights."""


class VariantRecord(Frozen):
    """variant.json: what a variant is, and what it was made from."""

    model: str
    """The model that it was made from: dense, pruned or finetuned."""
    form: Form
    interval: int
    """Sampling steps from one full pass to the next."""
    weights_sha256: Sha256
    """Hash of the weights' file of that model."""
    opset: int | None = None
    """Version of the operators of an ONNX graph; None for other forms."""
    files: dict[str, Sha256]
    """Path in the folder -> its hash, of all other files."""

    @property
    def kind(self) -> Kind:
        """The kind of variant."""
        return Kind(self.form, self.interval)

    @property
    def name(self) -> str:
        """Model and parts of the variant, joined by plus signs."""
        return f"{self.model}+{self.kind.name}"


def check_variant(model: Denoiser, kind: Kind) -> None:
    """Check that a model can have a variant of a kind, as far as that is known without making it.

    Raises:
        InputError: It cannot.
    """
    if family_of(model).proven:
        found = f"{family_of(model).identity(model)} has no variants, which are made of classes of diffusers"
        raise InputError(f"{found}; leave the block variants out")
    if kind.is_graph:
        check_graph(model, kind)
    if kind.interval > 1:
        check_cache(model)


def write_variant(name: str, source: Path, kind: Kind, folder: Path) -> None:
    """Write a variant of a model.

    Args:
        name: What the model is called.
        source: Its folder.
        kind: The kind of variant.
        folder: An existing folder.

    Raises:
        InputError: The model cannot be read, or cannot have such a variant.
    """
    unet = read_unet(source)
    check_variant(unet, kind)
    write_pipeline(folder, unet, read_scheduler(source), source)
    weights = denoiser_folder(folder) / WEIGHTS
    if kind.form != "float32":
        weights.unlink()
        (folder / "model_index.json").unlink()  # diffusers has no class for it
    if kind.form in ROUNDED:
        tensors = quantize_tensors(unet.state_dict(), kind.form)
        write_tensors(weights.with_name(ROUNDED_FILES[kind.form]), tensors, metadata={"format": "pt"})
    elif kind.is_graph:
        export_graph(unet, kind, weights.with_name(GRAPH_FILE))
    write_card(name, kind, folder / CARD)
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    record = VariantRecord(
        model=name,
        form=kind.form,
        interval=kind.interval,
        weights_sha256=file_sha256(denoiser_folder(source) / WEIGHTS),
        opset=OPSET if kind.is_graph else None,
        files=files,
    )
    write_json(folder / RECORD, record.model_dump(mode="json"))


def variant_folders(folder: Path) -> list[Path]:
    """List the variants in the output of the stage variants, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{RECORD}"))


def read_variant_record(folder: Path) -> VariantRecord:
    """Read variant.json.

    Raises:
        InputError: It is missing or damaged.
    """
    return read_record(folder / RECORD, VariantRecord, "run the variants stage again")


def variant_file(folder: Path) -> Path:
    """Return the path of a variant's weights or graph."""
    kind = read_variant_record(folder).kind
    name = GRAPH_FILE if kind.is_graph else ROUNDED_FILES.get(kind.form, WEIGHTS)
    return denoiser_folder(folder) / name


def read_variant(folder: Path, device: torch.device = CPU) -> Denoiser:
    """Load a variant as a model that draws like any other; a graph runs on the CPU.

    Raises:
        InputError: A file is missing, damaged or not the one that was written.
    """
    record, file = read_variant_record(folder), variant_file(folder)
    _check_files(record, folder, file)
    config = read_json(file.with_name("config.json"))
    check_supported(config, file.with_name("config.json"))
    if record.kind.is_graph:
        return graph_model(_without_tensors(config, file), file)
    unet = _read_rounded(file, config, record.form) if record.form in ROUNDED else read_unet(folder)
    unet.to(device)  # type: ignore[arg-type]  # diffusers wraps away the types
    return cache(unet, record.interval) if record.interval > 1 else unet


def _check_files(record: VariantRecord, folder: Path, file: Path) -> None:
    """Compare all files but the card with the hashes of the record, which must name the weights or graph."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    named = {file.relative_to(folder).as_posix(): "", **record.files}
    for name, expected in named.items():
        if name != CARD and (name not in found or file_sha256(found[name]) != expected):
            wrong = folder / name
            raise InputError(f"{wrong} is not the file that {folder / RECORD} names; run the variants stage again")


def _read_rounded(file: Path, config: dict[str, Any], form: Form) -> Denoiser:
    rounded, family = read_tensors(file), find_family(config)
    check_layers(config, family.layer_counts if family else (), len(rounded), str(file))
    shapes = {name: tensor.shape for name, tensor in _without_tensors(config, file).state_dict().items()}
    try:
        tensors = dequantize_tensors(rounded, shapes, form)
    except ValueError as error:
        raise InputError(f"{file}: {last_line(error)}; run the variants stage again") from None
    return build_unet(config, tensors, str(file))


def _without_tensors(config: dict[str, Any], file: Path) -> Denoiser:
    """Build the model of a config on the meta device.

    Raises:
        InputError: The config cannot be built.
    """
    try:
        with torch.device("meta"):
            return CLASSES[config["_class_name"]].from_config(dict(config))  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        found = f"{file}: the config beside it cannot be built ({last_line(error)})"
        raise InputError(f"{found}; run the variants stage again") from None


def read_model(folder: Path, device: torch.device = CPU) -> Denoiser:
    """Load a model, or a variant of one.

    Raises:
        InputError: The folder is damaged.
    """
    return read_variant(folder, device) if (folder / RECORD).is_file() else read_unet(folder, device)
