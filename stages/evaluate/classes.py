"""Pairs of images and their classes -> how many images of each class changed."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.evaluate.opened import OpenedReference
from stages.protocol.classifiers import CLASSIFIERS, predict
from stages.protocol.evaluation import VISIBLE_SSIM, ClassChange


@dataclass(frozen=True)
class ImageClasses:
    """The classes of the dense model's images."""

    by: Literal["labels", "predictions"] | None
    """Conditions of the model, or predictions of the extractor; None if there are neither."""
    names: dict[int, str]
    """Number of a class -> its name."""
    classes: NDArray[np.int64]
    """[sets, N] class of each image; zeros if there are none."""
    predicted: NDArray[np.int64] | None
    """[sets, N] class that the extractor predicts; None if it has no classifier."""

    def changes(self, predicted: NDArray[np.int64] | None, ssim: NDArray[np.float64]) -> list[ClassChange]:
        """Count the images of each class that changed.

        Args:
            predicted: Classes of the other model's images from the same noise, [sets, N]; None as in `self.predicted`.
            ssim: SSIM of the pairs, [sets, N].
        """
        moved = None if predicted is None or self.predicted is None else predicted != self.predicted
        visible = ssim < VISIBLE_SSIM
        members = {name: self.classes == number for number, name in self.names.items()}
        return [
            ClassChange(
                name=name,
                images=int(own.sum()),
                visible=int(visible[own].sum()),
                changed=None if moved is None else int(moved[own].sum()),
            )
            for name, own in members.items()
            if own.any()
        ]


def classify_reference(opened: OpenedReference) -> ImageClasses:
    """Find the classes of the dense model's images: the conditions that drew them, or else the extractor's."""
    reference, extractor, context = opened.reference, opened.extractor, opened.sampling
    protocol, predicted = reference.protocol, predict(extractor, reference.features)
    if context.table is not None:
        sets = [context.labels(protocol.seed, protocol.num_images, index) for index in range(protocol.sets)]
        names = {number: f"class {number}" for number in range(len(context.table) - 1)}
        return ImageClasses("labels", names, np.array(sets, np.int64), predicted)
    if predicted is None:
        return ImageClasses(None, {}, np.zeros(reference.samples.shape[:2], np.int64), None)
    return ImageClasses("predictions", dict(enumerate(CLASSIFIERS[extractor.name].names)), predicted, predicted)
