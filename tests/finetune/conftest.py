"""Params of a short training."""

import pytest

from stages.finetune.params import FinetuneParams

SHORT = {
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "ema_decays": (0.9,),
    "clip_norm": 1.0,
    "flip": False,
    "heldout_images": 8,
    "heldout_every": 4,
    "checkpoint_every": 4,
}


@pytest.fixture
def short_training():
    """Return a function that builds the params of four steps; keywords change them."""
    return lambda **changes: FinetuneParams(**SHORT | changes)
