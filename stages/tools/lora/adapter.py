"""An adapter file and a pruning plan -> a folder with the adapter for the pruned model."""

from pathlib import Path
from typing import Any

from stages.models.checks import check_supported
from stages.models.families import CLASSES, Denoiser
from stages.models.pipeline import denoiser_folder
from stages.models.plan import Plan, read_plan
from stages.prune.earlier import META, dense_model
from stages.prune.kept import check_plan
from stages.runtime.errors import InputError, first_line
from stages.runtime.wording import count
from stages.storage.files import check_free, copy_file, file_sha256, read_json, writing
from stages.storage.provenance import write_run_record
from stages.storage.tensors import read_metadata, read_tensors, write_tensors
from stages.tools.lora.slicing import SlicedAdapter, slice_adapter

CONFIG = "adapter_config.json"
NAMES = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
"""Names of the weights in an adapter folder: peft's and diffusers'."""
SLICED_BY = "espalier.plan_sha256"
"""Key of the metadata of a sliced adapter."""
PLAIN = True, False, None, "gaussian", "orthogonal", "eva"
"""peft's init_lora_weights that leave the weights of the base as they are."""


def slice_adapter_file(adapter: Path, plan_path: Path, model: Path | None, out: Path) -> SlicedAdapter:
    """Slice an adapter made for the dense model of a plan, and write it for the pruned one.

    Args:
        adapter: A safetensors file, or the folder of one in the layout of peft or diffusers.
        plan_path: The pruning plan.
        model: A model folder of this plan, dense or pruned, whose config gives the dense shapes; None for the folder
            that the plan lies in.
        out: Folder to write: the file under its name, peft's config if there is one, and run.json.

    Raises:
        InputError: The adapter is not a LoRA of the plan's dense model, the plan is not the model's, or `out` holds
            files that this command did not write.
    """
    weights = find_weights(adapter)
    check_free(out, inputs=[adapter, plan_path], stage="lora")
    config = weights.with_name(CONFIG)
    if config.is_file():
        check_config(config)
    metadata = read_metadata(weights)
    if SLICED_BY in metadata:
        raise InputError(f"{weights} was sliced by a plan before; give the adapter of the dense model")
    plan = read_plan(plan_path)
    dense = read_dense(plan, plan_path, model)
    sliced = slice_adapter(read_tensors(weights), dense, plan, str(weights))
    record = {"adapter_sha256": file_sha256(weights), "plan_sha256": plan.sha256, "dropped": sliced.dropped}
    with writing(out) as folder:
        write_tensors(folder / weights.name, sliced.tensors, metadata={**metadata, SLICED_BY: plan.sha256})
        if config.is_file():
            copy_file(config, folder / CONFIG)
        write_run_record(folder, "lora", lora=record)
    return sliced


def describe(sliced: SlicedAdapter) -> str:
    """Say in lines what became of the layers of an adapter."""
    lines = [f"{count(len(sliced.narrowed), 'layer')} narrowed, {len(sliced.whole)} as they were"]
    if sliced.dropped:
        lines.append(f"dropped with the branches that the plan removes: {', '.join(sliced.dropped)}")
    if sliced.num_others:
        lines.append(f"{count(sliced.num_others, 'tensor')} of text encoders copied as they were")
    return "\n".join(lines)


def find_weights(adapter: Path) -> Path:
    """Return the safetensors file of an adapter.

    Raises:
        InputError: There is none, or a folder has several.
    """
    if not adapter.is_dir():
        if not adapter.exists():
            raise InputError(f"{adapter} does not exist; give a safetensors file, or the folder of one")
        if adapter.suffix != ".safetensors":
            raise InputError(f"{adapter} is no safetensors file; give one, or the folder of one")
        return adapter
    found = next((adapter / name for name in NAMES if (adapter / name).is_file()), None)
    others = sorted(adapter.glob("*.safetensors"))
    if found is None and len(others) != 1:
        raise InputError(f"{adapter} has {len(others)} safetensors files and none named {NAMES[0]}; give the file")
    return found or others[0]


def read_dense(plan: Plan, plan_path: Path, model: Path | None) -> Denoiser:
    """Build the dense model of a plan without weights, from the config of a model folder, dense or pruned.

    Raises:
        InputError: There is no such folder, or the plan is not that of its dense model.
    """
    folder = plan_path.parent if model is None else model
    if model is None and not (denoiser_folder(folder) / "config.json").is_file():
        raise InputError(f"{plan_path} lies beside no model; give a dense or pruned model of this plan by --model")
    path = denoiser_folder(folder) / "config.json"
    config = read_json(path)
    check_supported(config, path)
    try:
        with META:
            built: Denoiser = CLASSES[config["_class_name"]].from_config(dict(config))
        dense = dense_model(built, META)
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{path} is not a valid config ({first_line(error)})") from None
    try:
        check_plan(plan, dense)
    except InputError as error:
        raise InputError(f"{plan_path} does not fit {folder}: {error.message}") from None
    return dense


def check_config(path: Path) -> None:
    """Check peft's config of an adapter.

    Raises:
        InputError: It is not a LoRA whose weights are W + s·B·A, with W those of the dense model.
    """
    config: dict[str, Any] = read_json(path)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise InputError(f"{path} has peft_type {kind!r}; supported: LORA")
    if config.get("use_dora"):
        raise InputError(f"{path} has use_dora; only LoRA can be sliced, train an adapter without it")
    if modules := config.get("modules_to_save"):
        found = f"{path} has modules_to_save {modules!r}, which hold whole weights of the base"
        raise InputError(f"{found}; only LoRA can be sliced, train an adapter without them")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN:
        found = f"{path} has init_lora_weights {start!r}, which changes the weights of the base"
        raise InputError(f"{found}; convert it to a plain LoRA with peft first")
