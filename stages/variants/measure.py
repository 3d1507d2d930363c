"""Variants and a reference -> the quality of each, from the same noise and with the same metrics as in evaluate."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from stages.evaluate.drawn import DrawnFiles, draw_models
from stages.evaluate.scores import Measurer, by_set
from stages.models.autoencoder import read_autoencoder
from stages.models.pipeline import read_scheduler
from stages.models.sampling import SamplingContext
from stages.models.variants.folder import read_variant, read_variant_record, variant_file
from stages.protocol.evaluation import DENSE, TO_DENSE, Difference, Metric
from stages.protocol.extractors import Extractor
from stages.protocol.intervals import estimate, paired_difference
from stages.protocol.params import ReferenceParams
from stages.protocol.protocol import check_current
from stages.protocol.reference import read_reference
from stages.protocol.variants import MEASURED, Variant, VariantsRecord
from stages.runtime.processes import Processes
from stages.storage.files import file_sha256


def measure_variants(
    folders: Mapping[str, Path],
    dense: Path,
    reference_path: Path,
    params: ReferenceParams,
    seed: int,
    scratch: Path,
    device: torch.device,
) -> VariantsRecord:
    """Draw the images of the protocol with each variant, one after the other, and measure them.

    Args:
        folders: Name of a variant -> its folder.
        dense: Folder of the dense model, which has the noise schedule and the autoencoder of all.
        reference_path: Output of the stage reference.
        params: The block reference.
        seed: The root seed.
        scratch: An existing folder for the images.
        device: Where variants but graphs draw.

    Raises:
        InputError: The reference has another protocol, or images are not finite.
    """
    reference, extractor = read_reference(reference_path), Extractor(params.extractor, params.batch_size)
    scheduler, processes = read_scheduler(dense), Processes(device)
    check_current(reference.protocol, params, seed, scheduler, extractor, reference_path)
    context = SamplingContext(read_autoencoder(dense, device), reference.table, reference.protocol.guidance)
    drawn: dict[str, DrawnFiles] = {}
    for name, folder in folders.items():
        models = {name: read_variant(folder, device)}
        drawn |= draw_models(models, scratch, scheduler, reference, extractor, context, processes)
    scores = Measurer(reference, drawn, scratch, processes).measure([DENSE, *folders])
    of_dense = by_set(scores[0])
    variants = {}
    for (name, folder), row in zip(folders.items(), scores[1:], strict=True):
        sets = {**by_set(row), **drawn[name].pairs().means()}
        variants[name] = _describe(folder, dict(_metrics(sets, of_dense)))
    return VariantsRecord(protocol_id=reference.protocol.id, variants=variants)


def _describe(folder: Path, metrics: dict[str, Metric]) -> Variant:
    record, file = read_variant_record(folder), variant_file(folder)
    return Variant(
        model=record.model,
        form=record.form,
        interval=record.interval,
        size_bytes=file.stat().st_size,
        sha256=file_sha256(file),
        metrics=metrics,
    )


def _metrics(sets: Mapping[str, list[float]], dense: Mapping[str, list[float]]) -> Iterator[tuple[str, Metric]]:
    """Estimate each metric over the sets, and its difference from the dense model's unless it compares anyway."""
    for name in MEASURED:
        found, difference = estimate(sets[name]), None
        if name not in TO_DENSE:
            above = paired_difference(sets[name], dense[name])
            difference = Difference(mean=above.mean, half_width=above.half_width, is_distinct=above.is_distinct)
        yield name, Metric(sets=sets[name], mean=found.mean, half_width=found.half_width, above_dense=difference)
