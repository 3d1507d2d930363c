"""Params, models and a reference -> the output folders of the stage."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from stages.protocol.evaluation import DENSE
from stages.protocol.variants import VARIANTS_FILE, VariantsRecord
from stages.storage.files import write_json, writing
from stages.storage.provenance import write_provenance, write_run_record
from stages.variants.params import Params


def write_outputs(params: Params, models: Mapping[str, Path], reference: Path, out: Path, report: Path) -> None:
    """Write the variants and their quality; without the block variants, an empty table.

    Args:
        params: What the stage reads of params.yaml.
        models: Name of a model -> its folder.
        reference: Output of the stage reference.
        out: Folder of the variants.
        report: Folder of their quality.

    Raises:
        InputError: The reference has another protocol or dense model, a model cannot have such a variant, or images
            are not finite.
    """
    with writing(out) as folder, writing(report) as report_folder:
        record = VariantsRecord(variants={})
        if params.variants:
            record = _build_and_measure(params, models, reference, folder, report_folder)
        write_json(report_folder / VARIANTS_FILE, record.model_dump(mode="json"))
        if record.variants:
            write_json(report_folder / "metrics.json", record.flat_metrics())
        write_run_record(folder, "variants", variants=params.variants or {})  # the protocol changes no variant
        write_run_record(report_folder, "variants", **params.decisive())
    write_provenance(out)
    write_provenance(report)


def _build_and_measure(
    params: Params, models: Mapping[str, Path], reference: Path, folder: Path, report: Path
) -> VariantsRecord:
    from stages.evaluate.opened import open_reference  # noqa: PLC0415
    from stages.models.pipeline import read_unet  # noqa: PLC0415
    from stages.runtime.device import check_precision, select_device  # noqa: PLC0415  # heavy, and most runs have none
    from stages.variants.build import build_variants  # noqa: PLC0415
    from stages.variants.measure import measure_variants  # noqa: PLC0415

    assert params.variants
    device, scratch = select_device(), report / "scratch"
    check_precision(params.reference.precision, "reference.precision", device)
    dense = {DENSE: read_unet(models[DENSE], device)}
    opened = open_reference(reference, models[DENSE], params.reference, params.seed, device)
    opened.check_models(dense, reference)
    folders = build_variants(params.variants, models, folder)
    scratch.mkdir()
    record = measure_variants(folders, models, opened, scratch, device)
    shutil.rmtree(scratch)
    return record
