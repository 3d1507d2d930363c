"""Variants and a reference -> the quality of each, from the same noise and with the same metrics as in evaluate."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from stages.evaluate.consistency import images_to_ssim
from stages.evaluate.drawn import DrawnFiles, draw_models
from stages.evaluate.opened import OpenedReference
from stages.evaluate.scores import Measurer, by_set
from stages.models.variants.folder import read_model, read_variant_record, variant_file
from stages.protocol.evaluation import DENSE, TO_DENSE, Metric, make_metric
from stages.protocol.variants import MEASURED, Variant, VariantsRecord
from stages.runtime.processes import Processes
from stages.storage.files import file_sha256


def measure_variants(
    folders: Mapping[str, Path],
    models: Mapping[str, Path],
    opened: OpenedReference,
    scratch: Path,
    device: torch.device,
) -> VariantsRecord:
    """Draw the images of the protocol with each variant, one after the other, and measure them.

    The models that variants are made of draw, too, but the dense one, whose images the reference has: evaluate keeps no
    images, and each variant is compared with those of its own model.

    Args:
        folders: Name of a variant -> its folder.
        models: Name of a model -> its folder.
        opened: The reference, which has been checked against the dense model.
        scratch: An existing folder for the images.
        device: Where variants but graphs draw.

    Raises:
        InputError: Images are not finite, or the disk is full.
    """
    reference, processes = opened.reference, Processes(device)
    drawn: dict[str, DrawnFiles] = {}
    of_model = {name: read_variant_record(folder).model for name, folder in folders.items()}
    originals = {name: models[name] for name in dict.fromkeys(of_model.values()) if name != DENSE}
    for name, folder in {**originals, **folders}.items():
        model = {name: read_model(folder, device)}
        drawn |= draw_models(model, scratch, opened, processes)
    scores = Measurer(reference, drawn, scratch, processes).measure([DENSE, *folders])
    of_dense = by_set(scores[0])
    variants = {}
    for (name, folder), row in zip(folders.items(), scores[1:], strict=True):
        sets = {**by_set(row), **drawn[name].pairs().means()}
        to_model = _ssim_sets(drawn[name], drawn.get(of_model[name]))
        variants[name] = _describe(folder, dict(_metrics(sets, of_dense)), to_model)
    return VariantsRecord(protocol_id=reference.protocol.id, variants=variants)


def _ssim_sets(drawn: DrawnFiles, of_model: DrawnFiles | None) -> list[float]:
    """Mean SSIM of each set with the images of the variant's own model, from the same noise; None is the dense one."""
    if of_model is None:
        return drawn.pairs().means()["ssim"]
    pairs = zip(drawn.samples.read(), of_model.samples.read(), strict=True)
    return [float(images_to_ssim(images, others).mean()) for images, others in pairs]


def _describe(folder: Path, metrics: dict[str, Metric], to_model: list[float]) -> Variant:
    record, file = read_variant_record(folder), variant_file(folder)
    return Variant(
        model=record.model,
        form=record.form,
        interval=record.interval,
        size_bytes=file.stat().st_size,
        sha256=file_sha256(file),
        metrics=metrics,
        ssim_to_model=make_metric(to_model),
    )


def _metrics(sets: Mapping[str, list[float]], dense: Mapping[str, list[float]]) -> Iterator[tuple[str, Metric]]:
    """Estimate each metric over the sets, and its difference from the dense model's unless it compares anyway."""
    for name in MEASURED:
        yield name, make_metric(sets[name], None if name in TO_DENSE else dense[name])
