"""One seed and a name -> a seed of its own for every random draw."""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Give the draw called `names` a seed that no other draw shares.

    The same seed and names give the same value on every machine; the value lies in [0, 2^63).
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Give the CPU generator of the draw called `names`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
