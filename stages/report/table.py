"""The record of an evaluation -> the results table, as Markdown and as rows of text."""

from collections.abc import Mapping
from typing import Any

HEADER = ["model", "params", "MACs", "FID", "KID × 10³", "precision", "recall", "SSIM", "latency"]
ALIKE = "≈"
"""Marks what does not differ from dense by more than the interval of the difference."""


def to_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Write each model's numbers as text, in the order of `HEADER`."""
    return [_row(name, model) for name, model in summary["models"].items()]


def _row(name: str, model: Mapping[str, Any]) -> list[str]:
    metrics, latency_ms = model["metrics"], model["latency_ms"]
    return [
        name,
        f"{model['params'] / 1e6:.3f} M",
        write_count(model["macs"]),
        write_metric(metrics["fid"], 3),
        write_metric(metrics["kid"], 2, factor=1e3),
        write_metric(metrics["precision"], 3),
        write_metric(metrics["recall"], 3),
        write_metric(metrics["ssim"], 3),
        "–" if latency_ms is None else f"{latency_ms:.2f} ms",
    ]


def write_count(macs: float) -> str:
    """Write operations in millions or billions."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"  # noqa: PLR2004


def write_metric(found: Mapping[str, Any], digits: int, factor: float = 1) -> str:
    """Write a mean, its interval, and a mark where it does not differ from dense by more than the interval."""
    text = f"{found['mean'] * factor:.{digits}f}"
    if found["half_width"]:
        text += f" ± {found['half_width'] * factor:.{digits}f}"
    return f"{text} {ALIKE}" if found.get("above_dense", {}).get("is_distinct") is False else text


def protocol_to_text(summary: Mapping[str, Any]) -> str:
    """Write the protocol in words."""
    protocol, sampler = summary["protocol"], summary["protocol"]["sampler"]
    sets = protocol["sets"]
    intervals = (
        f"± is the 95 % interval over the {sets} sets; {ALIKE} marks a difference from dense within its own."
        if sets > 1
        else "One set, so no intervals."
    )
    return (
        f"Protocol {summary['protocol_id']}: {sets} × {protocol['num_images']} images, seed {protocol['seed']}, "
        f"{sampler['scheduler']} with {sampler['steps']} steps ({sampler['spacing']}), eta {sampler['eta']:g}, "
        f"{protocol['precision']}; features of `{protocol['extractor']}` ({protocol['extractor_sha256'][:8]}) against "
        f"{protocol['num_real_images']} real images ({protocol['real_sha256'][:8]}); KID over "
        f"{protocol['kid_subsets']} subsets of {protocol['kid_subset_size']}. SSIM: pairs from the same noise. "
        f"{intervals} FID of one half of the real images against the other: {summary['floor_fid']:.3f}."
    )


def latency_to_text(summary: Mapping[str, Any]) -> str:
    """Write what the latency is of."""
    row = summary["costs"][0]
    return f"Latency: median of a pass, batch {row['batch']}, {row['precision']}, {row['mode']}, {row['device']}."


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Write the table with the protocol below it."""
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *to_rows(summary)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{protocol_to_text(summary)} {latency_to_text(summary)}\n"


def write_target(target: Mapping[str, Any]) -> str:
    """Write how small the model was to become."""
    return ", ".join(f"{key} {value}" for key, value in target.items() if value is not None)
