"""Features -> the distance of each to its k-th neighbour, and the share of points inside such neighbourhoods."""

import torch

AT_ONCE, BLOCK_BYTES = 10_000, 2**30
"""Largest number of points whose distances to all others are computed at once, and of the bytes of these distances."""


def row_blocks(num_points: int, num_others: int) -> list[range]:
    """Divide points into blocks whose distances to the other points fit into BLOCK_BYTES; the last may be smaller."""
    size = max(1, min(AT_ONCE, BLOCK_BYTES // (8 * max(num_points, num_others))))
    return [range(start, min(start + size, num_points)) for start in range(0, num_points, size)]


def neighbour_distances(features: torch.Tensor, rows: range, neighbours: int, device: torch.device) -> torch.Tensor:
    """Distance of some of the points [N, D] to the k-th nearest other point of all: [rows], float64 on the CPU."""
    distances = _distances(features[rows.start : rows.stop], features, device)
    nearest = distances.topk(neighbours + 1, largest=False).values  # the nearest is the point itself
    return nearest[:, -1].cpu()


def covered_share(points: torch.Tensor, others: torch.Tensor, radii: torch.Tensor, device: torch.device) -> float:
    """Share of the points [N, D] no farther from some other point [M, D] than that one's radius [M], in [0, 1]."""
    limits = radii.to(device)
    blocks = row_blocks(len(points), len(others))
    covered = [(_distances(points[rows.start : rows.stop], others, device) <= limits).any(dim=1) for rows in blocks]
    return torch.cat(covered).cpu().float().mean().item()


def _distances(points: torch.Tensor, others: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Euclidean distances [N, M] in float64, on the device; of the other points some are there at a time."""
    own = points.to(device)
    return torch.cat([torch.cdist(own, part.to(device)) for part in others.split(AT_ONCE)], dim=1)
