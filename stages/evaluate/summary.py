"""An evaluation -> the record of it: every number with its interval, and what its difference from dense is worth."""

from typing import Any

import numpy as np

from stages.evaluate.costs import Cost
from stages.evaluate.evaluation import DENSE, METRICS, Evaluation, Measured

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_WORST = 8
WITH_INTERVAL = ("fid", "kid", "ssim")
"""In the flat files, which are to be read as one table; the record has every interval."""


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """Write an evaluation as evaluation.json holds it; docs/metrics.md explains each key."""
    return {
        "protocol_id": evaluation.protocol.id,
        "protocol": evaluation.protocol.model_dump(mode="json"),
        "dense_sha256": evaluation.dense_sha256,
        "floor_fid": evaluation.floor,
        "models": {name: _model(name, evaluation) for name in evaluation.models},
        "costs": [vars(cost) for cost in evaluation.costs],
    }


def _model(name: str, evaluation: Evaluation) -> dict[str, Any]:
    measured, dense = evaluation.models[name], evaluation.models[DENSE]
    latency_ms, dense_ms = (_headline(who, evaluation.costs).median_ms for who in (name, DENSE))
    macs_ratio = dense.macs / measured.macs
    speed_up = dense_ms / latency_ms if dense_ms and latency_ms else None
    return {
        "params": measured.params,
        "macs": measured.macs,
        "attention_macs": measured.attention_macs,
        "size_bytes": measured.size_bytes,
        "latency_ms": latency_ms,
        "macs_ratio": macs_ratio,
        "speed_up": speed_up,
        "efficiency": speed_up / macs_ratio if speed_up else None,
        "metrics": {metric: _metric(measured, dense, metric) for metric in METRICS},
        "ssim_quantiles": {str(q): float(np.quantile(measured.pairs.ssim, q)) for q in QUANTILES},
        "worst_pairs": [
            {"set": row, "index": index, "ssim": measured.pairs.ssim[row, index], "mse": measured.pairs.mse[row, index]}
            for row, index in measured.pairs.worst(NUM_WORST)
        ],
    }


def _headline(name: str, costs: list[Cost]) -> Cost:
    """The row whose latency stands in the results: the first of the table."""
    return next(cost for cost in costs if cost.model == name)


def _metric(measured: Measured, dense: Measured, metric: str) -> dict[str, Any]:
    found = {"sets": measured.sets[metric], **vars(measured.estimate(metric))}
    if measured is dense or metric in ("ssim", "mse"):  # those two are differences from dense already
        return found
    above = measured.above(dense, metric)
    return {**found, "above_dense": {**vars(above), "is_distinct": above.is_distinct}}


def flat_metrics(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """One model's numbers on one level, as DVC and MLflow take them."""
    model = summary["models"][name]
    kept = ("params", "macs", "size_bytes", "latency_ms")
    flat = {"protocol": summary["protocol_id"], **{key: model[key] for key in kept}}
    for metric, found in model["metrics"].items():
        flat[metric] = found["mean"]
        if metric in WITH_INTERVAL and found["half_width"] is not None:
            flat[f"{metric}_interval"] = found["half_width"]
    return {key: value for key, value in flat.items() if value is not None}
