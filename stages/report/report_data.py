"""The folders of a finished compression -> the data of page, figures and cards."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

from stages.models.layer_order import in_run_order
from stages.models.layout import PLAN, WEIGHTS, denoiser_name, is_pixel_dit
from stages.models.params import RoundsParams
from stages.models.plan import RemovedBranch
from stages.protocol.costs import CostsRecord, read_costs, read_variant_costs
from stages.protocol.evaluation import DENSE, EvaluationRecord, read_evaluation
from stages.protocol.variants import read_variants
from stages.protocol.verdict import FINETUNED, Verdict, judge
from stages.report.series import read_curve, read_importance, read_losses, read_ssim
from stages.report.variants import VariantRow, join_variants
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError, first_line
from stages.runtime.text import printable
from stages.storage.files import file_sha256, read_bytes, read_json
from stages.storage.run_record import read_provenance, read_run_record
from stages.storage.tensors import read_shapes
from stages.tracking.compression import stage_folders

MODELS = (DENSE, "pruned", FINETUNED)
RELEASED = {"pruned": "prune", FINETUNED: "finetune"}
"""Model that is released -> the stage that writes it."""
LICENCE_KEYS = ("license", "license_name", "license_link")


class PruneRecord(BaseModel, frozen=True, extra="ignore"):
    """What the page shows of the block prune that made a plan."""

    target: dict[str, float | str | None]
    ranking: str
    order: str
    geglu: str = "pairs"
    compensate: dict[str, Any] | None


class JacobianRecord(BaseModel, frozen=True, extra="ignore"):
    """What the card shows of the Jacobian loss."""

    weight: float
    every: int = 1
    images: int | None = None
    vectors: int = 1
    relative: bool = False
    ramp_steps: int = 0


class LossRecord(BaseModel, frozen=True, extra="ignore"):
    """Weights of the losses that a recovery ran with."""

    noise: float = 0
    output: float = 0
    feature: float = 0
    jacobian: JacobianRecord | None = None
    min_snr: float | None = None


class FinetuneRecord(BaseModel, frozen=True, extra="ignore"):
    """What the page shows of the block finetune that a recovery ran with."""

    init: str
    steps: int
    batch_size: int
    learning_rate: float
    muon: dict[str, float] | None = None
    """None in reports from before there was a choice."""
    schedule: str
    loss: LossRecord
    ema_decays: list[float]
    samples: dict[str, int] | None


class SourceRecord(BaseModel, frozen=True, extra="allow"):
    """What page and cards show of a source of fetch; one of its names is set."""

    __pydantic_extra__: dict[str, bool | int | float | str | list[int] | None]
    source: str
    repo: str | None = None
    name: str | None = None
    path: str | None = None
    uri: str | None = None


@dataclass(frozen=True)
class Width:
    """Number of output channels of a layer in the dense and in the pruned model."""

    layer: str
    dense: int
    kept: int


@dataclass(frozen=True)
class ReportData:
    """All data of one compression that page, figures and cards show."""

    record: EvaluationRecord
    costs: CostsRecord
    curve: list[tuple[float, float]]
    """(step, held-out loss) of the recovery."""
    ema_decay: float
    """Decay of the EMA weights that were chosen."""
    ssim: dict[str, list[float]]
    """Model -> SSIM of each pair."""
    widths: list[Width]
    """Widths in the order in which the layers run."""
    importance: pd.DataFrame
    """Contribution of each module, in the order in which they run, at each timestep; empty where none was measured."""
    losses: list[tuple[float, float]]
    """(timestep, mean loss) of the importance; empty for criteria without gradients."""
    criterion: str
    formula: str
    prune: PruneRecord
    rounds: RoundsParams
    """The rounds of pruning before the recovery."""
    finetune: FinetuneRecord
    plans: Mapping[str, str]
    """Pruned and finetuned -> hash of its plan; several rounds make two."""
    pipeline: str
    """The class of diffusers that draws with the released models, or AutoModel where none does."""
    code: str
    """The file in a released folder that defines the pruned class."""
    runs: dict[str, dict[str, Any]]
    """Stage -> its run.json."""
    provenance: dict[str, dict[str, Any]]
    """Stage -> its provenance; a stage whose output differs from what its last run here wrote has none."""
    licence: dict[str, str]
    """Licence of the base model by the keys of its card's metadata; empty where the card names none."""
    removed: list[str] = field(default_factory=list)
    """Modules whose residual branches were removed, in order."""
    variants: list[VariantRow] = field(default_factory=list)
    """Models and their variants; empty without variants."""

    @property
    def source(self) -> dict[str, Any]:
        """Source of the base model, without the path on this machine."""
        found: dict[str, Any] = self.runs["fetch"]["params"]["fetch"]["model"]
        return {**found, "path": Path(found["path"]).name} if found.get("path") else found

    @property
    def base(self) -> str:
        """Name of the base model."""
        return name_source(self.source)

    @property
    def has_equal_widths(self) -> bool:
        """Whether finetuned has the widths of pruned; several rounds rank anew, and may cut others."""
        pruned, finetuned = (self.record.models[name] for name in RELEASED)
        return (pruned.macs, pruned.params) == (finetuned.macs, finetuned.params)

    def verdict(self, name: str = FINETUNED) -> Verdict:
        """Judge one of the models."""
        return judge(self.record, self.costs, name)

    @property
    def recovered(self) -> float | None:
        """Share of the FID lost by pruning that finetuning recovered; None where the loss is within the interval."""
        dense, pruned, finetuned = (self.record.models[name].fid for name in MODELS)
        if not (pruned.above_dense and pruned.above_dense.is_distinct and pruned.mean > dense.mean):
            return None
        return (pruned.mean - finetuned.mean) / (pruned.mean - dense.mean)


def name_source(source: Mapping[str, Any]) -> str:
    """Return the repository of a source, its name as a bundled one, or the last part of its path or address."""
    place = source.get("path") or source.get("uri") or ""
    return printable(str(source.get("repo") or source.get("name") or Path(place).name))


def read_report_data(artifacts: Path, reports: Path) -> ReportData:
    """Read the outputs of all stages: the model folders in `artifacts`, the report folders in `reports`.

    Raises:
        InputError: A file is missing, damaged, or of other weights.
    """
    folders = stage_folders(artifacts, reports)
    files = _weights_files(folders)
    record = _read_evaluation(folders["evaluate"], files)
    runs = {stage: read_run_record(folder) for stage, folder in folders.items()}
    provenance = {stage: found for stage, folder in folders.items() if (found := read_provenance(folder))}
    plan, index = read_json(folders["finetune"] / PLAN), read_json(folders["finetune"] / "model_index.json")
    component = denoiser_name(folders["finetune"])
    try:
        for source in ("model", "data"):
            SourceRecord.model_validate(runs["fetch"]["params"]["fetch"][source])
        return ReportData(
            record=record,
            costs=_read_costs(folders["costs"], record),
            curve=read_curve(reports / "finetune" / "curve.csv"),
            ema_decay=float(read_json(reports / "finetune" / "metrics.json")["ema_decay"]),
            ssim=read_ssim(folders["evaluate"] / "pairs.csv", MODELS[1:]),
            widths=_widths(read_shapes(files[DENSE]), read_shapes(files["finetuned"])),
            importance=read_importance(reports / "importance" / "heatmap.csv"),
            losses=read_losses(reports / "importance" / "losses.csv"),
            criterion=plan["criterion"],
            formula=plan["formula"],
            prune=PruneRecord.model_validate(plan["prune"]),
            rounds=RoundsParams.model_validate(runs["rounds"]["params"]["rounds"]),
            finetune=FinetuneRecord.model_validate(runs["finetune"]["params"]["finetune"]),
            plans={name: file_sha256(folders[stage] / PLAN) for name, stage in RELEASED.items()},
            pipeline="AutoModel" if is_pixel_dit(folders["finetune"]) else str(index["_class_name"]),
            code=f"{component}/{index[component][0]}.py",
            runs=runs,
            provenance=provenance,
            licence=_read_licence(folders["fetch"] / "README.md"),
            variants=_read_variants(reports, record),
            removed=[RemovedBranch.model_validate(branch).name for branch in plan.get("removed", [])],
        )
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"a plan or run.json below {artifacts} is invalid ({first_line(error)}); run its stage again"
        ) from None


def _weights_files(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the weights of each model."""
    stages = zip(MODELS, ("fetch", "prune", "finetune"), strict=True)
    return {name: folders[stage] / denoiser_name(folders[stage]) / WEIGHTS for name, stage in stages}


def _read_evaluation(folder: Path, files: Mapping[str, Path]) -> EvaluationRecord:
    """Read the evaluation with the models in the order of the pipeline; JSON keeps them in alphabetical order.

    Raises:
        InputError: The evaluation is missing or damaged, or is of other models or weights than `files`.
    """
    record = read_evaluation(folder)
    if set(record.models) != set(files):
        raise InputError(f"{folder} holds {', '.join(record.models)}; expected {', '.join(files)}")
    for name, file in files.items():
        if record.models[name].weights_sha256 != file_sha256(file):
            raise InputError(f"{folder} was measured on other weights than {file}; run the evaluate stage first")
    return record.model_copy(update={"models": {name: record.models[name] for name in files}})


def _read_costs(folder: Path, record: EvaluationRecord) -> CostsRecord:
    """Read the costs of the models that the evaluation is of.

    Raises:
        InputError: The costs are missing, damaged, or of other weights.
    """
    costs = read_costs(folder)
    if costs.weights_sha256 != {name: model.weights_sha256 for name, model in record.models.items()}:
        raise InputError(f"{folder} holds the costs of other weights than the evaluation; run the costs stage first")
    return costs


def _read_variants(reports: Path, record: EvaluationRecord) -> list[VariantRow]:
    """Read the variants and their times.

    Raises:
        InputError: They are missing or damaged, or do not belong to the evaluation.
    """
    return join_variants(record, read_variants(reports / "variants"), read_variant_costs(reports / "costs"))


def _widths(before: dict[str, list[int]], after: dict[str, list[int]]) -> list[Width]:
    """Compare the number of output channels of each layer; 0 are left of one in a removed branch."""
    layers = {name.removesuffix(".weight"): shape[0] for name, shape in before.items() if len(shape) > 1}
    return [Width(layer, layers[layer], after.get(f"{layer}.weight", [0])[0]) for layer in in_run_order(layers)]


def _read_licence(card: Path) -> dict[str, str]:
    """Read the licence from a card's metadata; a card may hold anything.

    Raises:
        InputError: The metadata is not valid YAML or passes a limit.
    """
    if not card.is_file():
        return {}
    try:
        head = parse_yaml(_split_head(read_bytes(card).decode(errors="replace")), "its head")
    except InputError as error:
        raise InputError(f"{card} has invalid YAML metadata ({error.message}); correct or remove it") from None
    head = head if isinstance(head, dict) else {}
    licence = {key: head[key] for key in LICENCE_KEYS if head.get(key)}
    return {
        key: printable(" or ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in licence.items()
    }


def _split_head(card: str) -> str:
    """Return the metadata of a card, between two lines of dashes at its top; empty without them."""
    first, *lines = re.split(r"\r\n|\r|\n", card.lstrip())
    end = next((index for index, line in enumerate(lines) if line[:3] == "---" and line.split() == ["---"]), None)
    return "\n".join(lines[:end]) if first.strip() == "---" and end is not None else ""


def read_picture(path: Path) -> bytes:
    """Read and verify a PNG.

    Raises:
        InputError: It is missing or damaged.
    """
    content = read_bytes(path)
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise InputError(f"{path} is no valid image ({first_line(error)}); run its stage again") from None
    return content
