"""Small records of the stages, for tests of those who read them."""

from stages.protocol.costs import VARIANT_COSTS, Cost, CostsRecord
from stages.protocol.evaluation import METRICS, EvaluationRecord, Metric, Model, Pair
from stages.protocol.variants import MEASURED, VARIANTS_FILE, Variant, VariantsRecord
from stages.storage.files import write_json
from stages.tools.comparison.cells import CELL, COSTS_FOLDER, CellRecord

STAGES = [
    "code",
    "fetch",
    "reference",
    "importance",
    "prune",
    "rounds",
    "finetune",
    "evaluate",
    "variants",
    "costs",
    "report",
]
"""The stages of dvc.yaml in the order in which they run."""


def make_model(metrics=None, **changes):
    """Make the evaluation of a model with these metrics (name -> Metric); the others are .5 in each of three sets."""
    alike = Metric(sets=[0.5] * 3, mean=0.5, half_width=0.0)
    size = {"params": 1, "macs": 1, "attention_macs": 0, "size_bytes": 1, "fid_pooled": 1}
    fixed = {"weights_sha256": "c" * 64, "ssim_quantiles": {}, "worst_pairs": [Pair(set=0, index=0, ssim=0.5, mse=0.1)]}
    return Model(**{**size, **fixed, **dict.fromkeys(METRICS, alike), **(metrics or {}), **changes})


def make_evaluation(protocol, models, dense="a"):
    """Make the evaluation of models, whose dense model's hash repeats a digit."""
    return EvaluationRecord(
        protocol_id=protocol.id, protocol=protocol, dense_sha256=dense * 64, floor_fid=0.4, models=models
    )


def make_costs(evaluation, speed_up=1.2, device="cpu", *, deterministic=False):
    """Costs of an evaluation's models: one eager row each, the dense one at speed-up 1."""
    rows = []
    for name in evaluation.models:
        ratio = 1.0 if name == "dense" else speed_up
        interval = {"speed_up_low": ratio - 0.05, "speed_up_high": ratio + 0.05}
        setting = {"batch": 1, "precision": "float32", "mode": "eager", "device": device}
        setting |= {"deterministic": deterministic}
        rows.append(Cost(model=name, **setting, passes=30, median_ms=2.5, speed_up=ratio, **interval))
    hashes = {name: model.weights_sha256 for name, model in evaluation.models.items()}
    return CostsRecord(weights_sha256=hashes, costs=rows)


def write_cell_files(folder, record, **note):
    """Write a finished cell with this evaluation and the fields of its cell.json, and return its folder."""
    write_json(folder / "evaluation.json", record.model_dump(mode="json"))
    write_json(folder / "costs.json", make_costs(record).model_dump(mode="json"))
    write_json(folder / CELL, CellRecord(**note).model_dump(mode="json"))
    return folder


def write_variants(folder, record, fids, protocol_id=None, costs=None):
    """Write the variants of a cell: an int8 one of each model in `fids`, with that FID; and times as in `costs`."""
    variants = {
        f"{model}+int8": Variant(
            model=model,
            form="int8",
            interval=1,
            size_bytes=1_250_000,
            sha256="e" * 64,
            metrics={name: Metric(sets=[fid, fid], mean=fid, half_width=0.0) for name in MEASURED},
        )
        for model, fid in fids.items()
    }
    found = VariantsRecord(protocol_id=protocol_id or record.protocol_id, variants=variants)
    write_json(folder / VARIANTS_FILE, found.model_dump(mode="json"))
    if costs:
        timed = {name: it.sha256 for name, it in variants.items()}
        rows = [costs.first(it.model).model_copy(update={"model": name}) for name, it in variants.items()]
        times = CostsRecord(weights_sha256={**costs.weights_sha256, **timed}, costs=[*costs.costs, *rows])
        (folder / COSTS_FOLDER).mkdir(exist_ok=True)
        write_json(folder / COSTS_FOLDER / VARIANT_COSTS, times.model_dump(mode="json"))
