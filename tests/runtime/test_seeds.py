"""Seeds derived from names."""

import torch

from stages.runtime.seeds import derive_seed, generator


def test_every_name_has_its_own_seed():
    """Seeds differ by names, the order of the names and the root seed, and lie in [0, 2^63)."""
    seeds = [
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(1, "a"),
        derive_seed(0, "a", 1),
        derive_seed(0, 1, "a"),
    ]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_name_always_gives_the_same_draws():
    """A changed value would make old runs irreproducible."""
    assert derive_seed(0, "sample", 0) == 178316582436694654
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))
