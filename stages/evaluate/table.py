"""Metrics -> the results table, as Markdown and as rows of text."""

from collections.abc import Mapping
from typing import Any

HEADER = ["model", "params", "MACs", "FID", "KID × 10³", "SSIM", "latency"]


def metrics_to_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Write each model's metrics as text, in the order of `HEADER`."""
    return [_row(name, values) for name, values in metrics.items() if name != "protocol"]


def _row(name: str, values: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{values['params'] / 1e6:.3f} M",
        f"{values['macs'] / 1e6:.1f} M",
        f"{values['fid']:.3f}",
        f"{values['kid'] * 1e3:.2f} ± {values['kid_std'] * 1e3:.2f}",
        f"{values['ssim']:.3f}",
        f"{values['latency_ms']:.2f} ms",
    ]


def metrics_to_markdown(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the table with the protocol below it."""
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *metrics_to_rows(metrics)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    protocol = metrics["protocol"]
    return (
        f"{table}\n\n"
        f"{protocol['num_images']} images a model, seed {protocol['seed']}, {protocol['sampler']}, "
        f"{protocol['sampler_steps']} steps. FID and KID: features of `{protocol['extractor']}`, against "
        f"{protocol['num_real_images']} real images; KID ± standard deviation over {protocol['kid_subsets']} subsets "
        f"of {protocol['kid_subset_size']}. SSIM: pairs from the same noise. Latency: {protocol['latency']}. "
        "One seed, so no interval on FID and SSIM.\n"
    )
