"""Named seeds."""

import torch

from stages.runtime.seeds import derive_seed, generator


def test_every_name_has_a_seed_of_its_own():
    """Names, their order and the root seed all matter."""
    seeds = [
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(1, "a"),
        derive_seed(0, "a", 1),
        derive_seed(0, 1, "a"),
    ]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_name_stands_for_the_same_draws_for_ever():
    """The value is part of what makes old runs reproducible."""
    assert derive_seed(0, "sample", 0) == 178316582436694654
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))
