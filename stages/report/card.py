"""Report data -> model folders with model cards in the format of the Hugging Face Hub."""

import html
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from stages.models.autoencoder import read_autoencoder
from stages.models.layout import SNAPSHOTS, denoiser_name
from stages.models.pipeline import autoencoder_folder, weights_file
from stages.models.pruned_own import CLASS_NAME
from stages.protocol.evaluation import DENSE, FID_DENSE
from stages.report.page import lineage, write_worst
from stages.report.report_data import RELEASED, JacobianRecord, LossRecord, ReportData, name_source
from stages.report.summary import PICTURE
from stages.report.table import to_markdown, write_count, write_params, write_size, write_speed_up, write_target
from stages.report.templates import environment
from stages.storage.files import copy_file, read_json, write_atomically

LOSSES = {
    "noise": "squared error of the prediction",
    "output": "squared distance from the dense model's prediction",
    "feature": "relative squared distance from its features of the kept channels",
}
"""Key of finetune.loss -> its description."""
JACOBIAN = "difference of the squared norms of one random vector times the Jacobian of each model"
TASK = "unconditional-image-generation"
WORST = "worst-pairs.png"


def release(report: ReportData, folders: Mapping[str, Path], reports: Path, summary: Path, folder: Path) -> None:
    """Copy the model folders, and add a card and pictures to each.

    Args:
        report: Data of the compression.
        folders: Stage -> its output folder.
        reports: Folder of the report folders.
        summary: Folder of the picture of all models.
        folder: Output folder.
    """
    for name, stage in RELEASED.items():
        shutil.copytree(folders[stage], folder / name, ignore=shutil.ignore_patterns(SNAPSHOTS))
        copy_file(summary / PICTURE, folder / name / PICTURE)
        copy_file(reports / "evaluate" / f"{name}-worst.png", folder / name / WORST)
        write_atomically(folder / name / "README.md", write_card(report, name, folder / name).encode())


def write_card(report: ReportData, name: str, model: Path) -> str:
    """Write a model card, metadata and text; the config in its folder decides how the model is used."""
    record = report.record
    text = (
        environment(autoescape=False)
        .get_template("card.md.j2")
        .render(
            report=report,
            record=record,
            base=_plain(report.base),
            name=name,
            verdict=report.verdict(name).sentence,
            dense=record.models[DENSE],
            model=record.models[name],
            count=write_count,
            params=write_params,
            size=write_size,
            target=write_target(report.prune.target),
            losses=write_losses(report.finetune.loss),
            results=to_markdown(record, report.costs),
            worst=write_worst(record.models[name]),
            picture=PICTURE,
            worst_picture=WORST,
            speed=_speed(report, name),
            use=_read_use(model),
            licence=_plain(" ".join(report.licence.values())),
            lineage=[(key, _plain(value)) for key, value in lineage(report, name)],
        )
    )
    return f"---\n{_head(report, name).to_yaml()}\n---\n\n{text}"


@dataclass(frozen=True)
class Use:
    """What whoever draws with a released model has to know of it."""

    condition: str | None = None
    """Argument of the denoiser that tells it the class."""
    component: str = "unet"
    """Name of the denoiser in the pipeline."""
    has_variance: bool = False
    is_own: bool = False
    """Whether the class is not one of diffusers."""
    autoencoder: str | None = None
    """Name of the autoencoder in the pipeline; None in pixel space."""
    scale: str = "1.0"
    mean: str = "0.0"
    std: str = "1.0"
    """Python expressions: images are decoded from z · std / scale + mean."""
    is_shifted: bool = False
    """Whether the latents have mean and std, which the pipelines of diffusers ignore."""
    has_two_sides: bool = False
    """Whether the config has a height and a width of the latents; LDMPipeline takes one number alone."""


def _read_use(model: Path) -> Use:
    """Read from the configs of a released folder how one draws with it."""
    config, folder = read_json(weights_file(model).with_name("config.json")), autoencoder_folder(model)
    is_own = config.get("_class_name") == CLASS_NAME
    inputs = config["description"]["inputs"] if is_own else {}
    condition = None
    if config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or inputs.get("labels"):
        condition = "class_labels"
    elif config.get("cross_attention_dim") is not None or inputs.get("encoder_states"):
        condition = "encoder_hidden_states"
    has_variance = not is_own and config.get("out_channels") == 2 * config.get("in_channels", 0)
    component = denoiser_name(model)
    latents: dict[str, Any] = {}
    if folder is not None:
        coder = read_autoencoder(model, torch.device("cpu"))
        assert coder is not None
        values = {"scale": torch.tensor(coder.scale), "mean": coder.mean, "std": coder.std}
        latents = {
            **{name: _expression(value) for name, value in values.items()},
            "autoencoder": folder.name,
            "is_shifted": bool(coder.mean.any() or (coder.std != 1).any()),
            "has_two_sides": isinstance(config.get("sample_size"), list),
        }
    return Use(condition=condition, component=component, has_variance=has_variance, is_own=is_own, **latents)


def _expression(values: torch.Tensor) -> str:
    """Write one number, or one for each channel of latents, in Python."""
    numbers = [float(f"{value:.7g}") for value in values.flatten().tolist()]
    return f"{numbers[0]}" if len(numbers) == 1 else f"torch.tensor({numbers}).view(1, -1, 1, 1)"


def write_losses(loss: LossRecord) -> str:
    """Describe the training loss: weight × loss, for each loss in use."""
    parts = [f"{getattr(loss, name):g} × {what}" for name, what in LOSSES.items() if getattr(loss, name)]
    if loss.jacobian:
        parts.append(_write_jacobian(loss.jacobian))
    return " + ".join(parts) + (f", min-SNR weights with γ {loss.min_snr:g}" if loss.min_snr else "")


def _write_jacobian(loss: JacobianRecord) -> str:
    squared = "squared relative" if loss.relative else "squared"
    limits = {
        f"averaged over {loss.vectors} vectors": loss.vectors > 1,
        f"on {loss.images} images": loss.images,
        f"once in {loss.every} steps, {loss.every}-fold": loss.every > 1,
        f"with a weight that rises from 0 over {loss.ramp_steps} steps": loss.ramp_steps,
    }
    given = [text for text, is_set in limits.items() if is_set]
    return ", ".join([f"{loss.weight:g} × {squared} {JACOBIAN}", *given])


def _plain(text: str) -> str:
    """Escape text from outside so that Markdown shows it as it is."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _head(report: ReportData, name: str) -> ModelCardData:
    source, dataset_source = report.source, report.runs["fetch"]["params"]["fetch"]["data"]
    dataset = name_source(dataset_source)
    protocol, model = report.record.protocol, report.record.models[name]
    seen = f"{protocol.extractor} features, sets of {protocol.num_images}"
    labels = {
        "fid": f"FID ({seen})",
        FID_DENSE: f"FID to the dense model's images from the same noise ({seen})",
        "kid": f"KID ({seen})",
        "precision": f"precision ({seen})",
        "recall": f"recall ({seen})",
        "ssim": "SSIM against the dense model",
    }
    scores = {key: (metric, labels[key]) for key, metric in model.metrics().items() if key in labels}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=f"{dataset}, protocol {protocol.id}",
            metric_type=key,
            metric_name=label,
            metric_value=round(metric.mean, 6),
        )
        for key, (metric, label) in scores.items()
    ]
    more = {"base_model": source["repo"], "base_model_relation": "finetune"} if "repo" in source else {}
    head: dict[str, Any] = {"license": "unknown", **report.licence, **more}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["diffusion", "pruning", "espalier"],
        model_name=f"{report.base}, {name}",
        eval_results=results,
        ignore_metadata_errors=True,
        **head,
    )


def _speed(report: ReportData, name: str) -> str:
    cost = report.costs.first(name)
    if cost.speed_up is None:
        return "no time was measured"
    ratio = report.record.macs_ratio(name)
    setting = f"at batch {cost.batch}, {cost.precision}, {cost.mode}, {cost.kernels}, on {cost.device}"
    return f"{ratio:.2f}× fewer MACs gave {write_speed_up(cost)} the speed {setting}"
