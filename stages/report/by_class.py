"""An evaluation -> what changed by class, for the page."""

from dataclasses import dataclass
from typing import Any

from stages.protocol.evaluation import VISIBLE_SSIM, ClassChange, EvaluationRecord
from stages.protocol.verdict import FINETUNED, KEPT_SHARE, LOST_SHARE, write_share

CLASS_TITLE, VISIBLE_TITLE = "predicted class changed", "differ visibly"
SOURCES = {
    "labels": "The classes are the labels that the pictures were drawn with.",
    "predictions": "The classes are those that the extractor's classifier gives the dense model's pictures.",
}


@dataclass(frozen=True)
class ClassRow:
    """One class: its name, its pictures, and how many of them changed."""

    name: str
    images: int
    visible: int
    share: float
    """Share of its pictures that changed their predicted class; that differ visibly where there is no classifier."""
    tone: str
    """Class of its colour."""


def describe_classes(record: EvaluationRecord) -> dict[str, Any] | None:
    """Describe the changes of the finetuned model by class, the most changed first; None where no class was counted."""
    changes = record.models[FINETUNED].classes
    if record.classes_by is None or not changes:
        return None
    is_predicted = all(change.changed is not None for change in changes)
    rows = sorted((_row(change) for change in changes), key=lambda row: -row.share)
    changed = sum((change.changed or 0) if is_predicted else change.visible for change in changes)
    share = write_share(changed, sum(change.images for change in changes))
    what = (
        f"In {share} pictures the classifier {record.protocol.extractor} sees another class than in the dense model's"
        if is_predicted
        else f"{record.protocol.extractor} predicts no classes, so what differs visibly (SSIM below {VISIBLE_SSIM}) is "
        f"counted: {share} pictures"
    )
    text = f"{what}. {SOURCES[record.classes_by]} A share of few pictures is coarse."
    return {"rows": rows, "text": text, "title": CLASS_TITLE if is_predicted else VISIBLE_TITLE}


def _row(change: ClassChange) -> ClassRow:
    share = (change.visible if change.changed is None else change.changed) / change.images
    tone = "good" if share <= KEPT_SHARE else "worse" if share > LOST_SHARE else "changed"
    return ClassRow(change.name, change.images, change.visible, share, tone)
