"""The folders of a finished compression -> everything that page and cards tell of it."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import safe_open

from stages.artifacts import RUN_RECORD, file_sha256, read_bytes, read_json

STAGES = ("fetch", "reference", "importance", "prune", "finetune", "evaluate")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
PLAN = "pruning_plan.json"
UNKNOWN = "unknown"
DENSE = "dense"
MODELS = (DENSE, "pruned", "finetuned")
PARTS = ("time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""Of a UNet, in the order in which they run."""


@dataclass(frozen=True)
class Width:
    """How many channels a layer gives, before and after."""

    layer: str
    dense: int
    kept: int


@dataclass(frozen=True)
class Story:
    """What happened to one model."""

    evaluation: dict[str, Any]
    """evaluation.json."""
    curve: list[dict[str, float]]
    """Rows of the recovery curve; empty cells are left out."""
    heldout_loss: dict[str, float]
    ssim: dict[str, list[float]]
    """Model -> of every pair."""
    widths: list[Width]
    """In the order of the model."""
    plan: dict[str, Any]
    plan_sha256: str
    weights_sha256: dict[str, str]
    """Of each model's file."""
    runs: dict[str, dict[str, Any]]
    """Stage -> its run.json."""
    licence: str
    """Of the base model, as its card gives it."""

    @property
    def base(self) -> str:
        """Name the base model: its repository, the last part of its folder, or what it is bundled as."""
        source = self.runs["fetch"]["params"]["fetch"]["model"]
        return str(source.get("repo") or source.get("name") or Path(source["path"]).name)

    @property
    def recovered(self) -> float | None:
        """Share of the FID lost by pruning that finetuning took back; None where pruning lost nothing."""
        dense, pruned, finetuned = (
            self.evaluation["models"][name]["metrics"]["fid"]["mean"] for name in ("dense", "pruned", "finetuned")
        )
        return (pruned - finetuned) / (pruned - dense) if pruned > dense else None


def read_story(artifacts: Path, reports: Path) -> Story:
    """Read what the stages left.

    Args:
        artifacts: The folder of model folders.
        reports: The folder of report folders.

    Raises:
        InputError: Something is missing or damaged.
    """
    models = {name: artifacts / name for name in ("pretrained", "pruned", "finetuned")}
    homes = [models["pretrained"], artifacts / "reference", artifacts / "importance", models["pruned"]]
    homes += [models["finetuned"], reports / "evaluate"]
    runs = {stage: read_json(home / RUN_RECORD) for stage, home in zip(STAGES, homes, strict=True)}
    before, after = (_widths(models[name] / WEIGHTS) for name in ("pretrained", "finetuned"))
    rows = _read_csv(reports / "evaluate" / "pairs.csv")
    return Story(
        evaluation=_read_evaluation(reports / "evaluate" / "evaluation.json"),
        curve=[
            {key: float(value) for key, value in row.items() if value}
            for row in _read_csv(reports / "finetune" / "curve.csv")
        ],
        heldout_loss=read_json(reports / "finetune" / "metrics.json")["heldout_loss"],
        ssim={
            name: [float(row["ssim"]) for row in rows if row["model"] == name]
            for name in dict.fromkeys(row["model"] for row in rows)
        },
        widths=[Width(layer, width, after[layer]) for layer, width in before.items()],
        plan=read_json(models["finetuned"] / PLAN),
        plan_sha256=file_sha256(models["finetuned"] / PLAN),
        weights_sha256={name: file_sha256(folder / WEIGHTS) for name, folder in models.items()},
        runs=runs,
        licence=_licence(models["pretrained"] / "README.md"),
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Read the record with the models in the order of the pipeline; JSON keeps them in that of the alphabet."""
    found = read_json(path)
    return {**found, "models": {name: found["models"][name] for name in MODELS}}


def _widths(path: Path) -> dict[str, int]:
    """Read how many channels each layer gives off the shapes of its weights, without loading them."""
    with safe_open(path, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no dict
    layers = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if len(shape) > 1}
    places = {layer: PARTS.index(part) if (part := layer.split(".")[0]) in PARTS else len(PARTS) for layer in layers}
    return {layer: layers[layer] for layer in sorted(layers, key=lambda layer: places[layer])}


def _read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(read_bytes(path).decode().splitlines()))


def _licence(card: Path) -> str:
    try:
        return str(ModelCard.load(card).data.license or UNKNOWN)
    except (OSError, ValueError):  # no card, or one whose head is no YAML
        return UNKNOWN
