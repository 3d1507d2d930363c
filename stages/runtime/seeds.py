"""One seed and a name -> an independent seed for each random draw."""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive the seed of the draw called `names`, in [0, 2^63): the first 63 bits of SHA-256("seed/name/…").

    Equal arguments give equal seeds on every machine. PyTorch's generator on the CPU reads the low 32 bits, so that of
    250,000 draws, such as the images of five large sets, a few pairs are equal.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Create the CPU generator of the draw called `names`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
