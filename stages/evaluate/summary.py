"""An evaluation -> its record: each number with its interval, and its difference from the dense model."""

from statistics import fmean
from typing import Any

import numpy as np

from stages.evaluate.evaluation import NUM_WORST, Evaluation, MeasuredModel
from stages.protocol.evaluation import (
    DENSE,
    FID_DENSE,
    FID_DENSE_UNPAIRED,
    METRICS,
    TO_DENSE,
    VISIBLE_SSIM,
    EvaluationRecord,
    Metric,
    Model,
    Pair,
    make_metric,
)

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
WITH_INTERVAL = ("fid", FID_DENSE, "kid", "ssim")
"""Metrics whose interval is in the flat files; evaluation.json has all intervals."""


def summarise(evaluation: Evaluation) -> EvaluationRecord:
    """Make the record of an evaluation."""
    dense = evaluation.models[DENSE]
    return EvaluationRecord(
        protocol_id=evaluation.protocol.id,
        protocol=evaluation.protocol,
        dense_sha256=evaluation.dense_sha256,
        floor_fid=evaluation.floor,
        classes_by=evaluation.classes_by,
        models={name: _model(measured, dense) for name, measured in evaluation.models.items()},
    )


def _model(measured: MeasuredModel, dense: MeasuredModel) -> Model:
    pairs = measured.pairs
    return Model(
        params=measured.params,
        macs=measured.macs,
        attention_macs=measured.attention_macs,
        size_bytes=measured.size_bytes,
        weights_sha256=measured.weights_sha256,
        fid_pooled=measured.fid_pooled,
        ssim_quantiles={str(quantile): float(np.quantile(pairs.ssim, quantile)) for quantile in QUANTILES},
        worst_pairs=[
            Pair(set=row, index=index, ssim=pairs.ssim[row, index], mse=pairs.mse[row, index])
            for row, index in pairs.worst(NUM_WORST)
        ],
        visible_pairs=int((pairs.ssim < VISIBLE_SSIM).sum()),
        classes=tuple(measured.classes),
        fid_dense_unpaired=_unpaired(measured),
        **{metric: _metric(measured, dense, metric) for metric in (*METRICS, FID_DENSE)},
    )


def _unpaired(measured: MeasuredModel) -> Metric | None:
    sets = measured.sets.get(FID_DENSE_UNPAIRED)
    return Metric(sets=sets, mean=fmean(sets), half_width=None) if sets else None


def _metric(measured: MeasuredModel, dense: MeasuredModel, metric: str) -> Metric:
    has_difference = measured is not dense and metric not in TO_DENSE
    return make_metric(measured.sets[metric], dense.sets[metric] if has_difference else None)


def flat_metrics(record: EvaluationRecord, name: str) -> dict[str, Any]:
    """Numbers of one model without nesting, for DVC and MLflow."""
    model = record.models[name]
    flat = {
        "protocol": record.protocol_id,
        "params": model.params,
        "macs": model.macs,
        "size_bytes": model.size_bytes,
    }
    for metric, found in model.metrics().items():
        flat[metric] = found.mean
        if metric in WITH_INTERVAL and found.half_width is not None:
            flat[f"{metric}_interval"] = found.half_width
    if model.fid_dense_unpaired:
        flat[FID_DENSE_UNPAIRED] = model.fid_dense_unpaired.mean
    return flat
