"""A story -> a model folder with its card, in the format of the Hugging Face Hub."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from stages.artifacts import copy_file, write_atomically
from stages.report.page import environment, lineage
from stages.report.story import DENSE, UNKNOWN, Story
from stages.report.table import to_markdown, write_count, write_target

SCORES = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "ssim": "SSIM against dense"}


def release(story: Story, name: str, model: Path, reports: Path, target: Path) -> None:
    """Copy a model's folder and put card and pictures beside it.

    Args:
        story: What happened to it.
        name: pruned or finetuned.
        model: Its folder.
        reports: The folder of report folders.
        target: Where to.
    """
    shutil.copytree(model, target)
    pictures = {"comparison.png": "summary/summary.png", "worst-pairs.png": f"evaluate/{name}-worst.png"}
    for here, there in pictures.items():
        copy_file(reports / there, target / here)
    write_atomically(target / "README.md", write_card(story, name, *pictures).encode())


def write_card(story: Story, name: str, picture: str, worst_picture: str) -> str:
    """Fill the card in: a head that the Hub reads, and the text."""
    models = story.evaluation["models"]
    head = _head(story, name).to_yaml()
    text = (
        environment(autoescape=False)
        .get_template("card.md.j2")
        .render(
            base=story.base,
            name=name,
            dense=models[DENSE],
            model=models[name],
            count=write_count,
            plan=story.plan,
            target=write_target(story.plan["prune"]["target"]),
            finetune=story.runs["finetune"]["params"]["finetune"],
            heldout_loss=story.heldout_loss,
            recovered=story.recovered,
            evaluation=story.evaluation,
            results=to_markdown(story.evaluation),
            num_worst=len(models[name]["worst_pairs"]),
            worst=", ".join(f"{pair['ssim']:.2f}" for pair in models[name]["worst_pairs"]),
            picture=picture,
            worst_picture=worst_picture,
            speed=_speed(models[name]),
            licence_text=_licence_text(story),
            lineage=list(lineage(story)),
        )
    )
    return f"---\n{head}\n---\n\n{text}"


def _head(story: Story, name: str) -> ModelCardData:
    source, data = (story.runs["fetch"]["params"]["fetch"][key] for key in ("model", "data"))
    dataset = data.get("repo") or data.get("name") or Path(data["path"]).name
    metrics = story.evaluation["models"][name]["metrics"]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=str(dataset),
            dataset_name=f"{dataset}, protocol {story.evaluation['protocol_id']}",
            metric_type=key,
            metric_name=label,
            metric_value=round(metrics[key]["mean"], 6),
        )
        for key, label in SCORES.items()
    ]
    more: dict[str, Any] = {"base_model": source["repo"], "base_model_relation": "finetune"} if "repo" in source else {}
    return ModelCardData(
        license=story.licence,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusion", "pruning", "espalier"],
        model_name=f"{story.base}, {name}",
        eval_results=results,
        ignore_metadata_errors=True,
        **more,
    )


def _speed(model: dict[str, Any]) -> str:
    if not model["speed_up"]:
        return "no time was measured"
    return f"{model['macs_ratio']:.2f}× fewer MACs gave {model['speed_up']:.2f}× the speed where it was measured"


def _licence_text(story: Story) -> str:
    if story.licence == UNKNOWN:
        return "The base model names no licence; ask its authors before you use or publish this one."
    return f"That of the base model: {story.licence}."
