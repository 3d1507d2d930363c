"""The canary of a version with its own class: what either sandbox prints is checked before it is decoded."""

import io

import numpy as np
import pytest
from PIL import Image

from stages.register import canary
from stages.register.registry import MODEL
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from tests.register.conftest import claim_size


def to_png(pixels):
    """Encode pixels [H, W] or [H, W, C]."""
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


SOUND = to_png(np.arange(64).reshape(8, 8))
FALSE = {
    "no picture": (b"no picture", "is invalid"),
    "cut off": (SOUND[:45], "is invalid"),
    "huge": (claim_size(SOUND, 60_000), "is invalid"),
    "large": (claim_size(SOUND, 9_000), "another size"),
    "colours": (to_png(np.zeros((8, 8, 3))), "another size or kind than 8 x 8"),
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Check the canary of a version whose sandboxes print the given pictures."""
    config = {"_class_name": "PrunedDenoiser", "sample_size": 8, "in_channels": 1}
    write_json(tmp_path / MODEL / "unet" / "config.json", config)

    def run(drawn, expected):
        pictures = {canary.PROGRAM: drawn, canary.EXPECTED: expected}
        monkeypatch.setattr(canary, "_run", lambda _, program, __, seeds, ___: dict.fromkeys(seeds, pictures[program]))
        return canary.check_canary(tmp_path, 1.0, [5, 6])

    return run


@pytest.mark.parametrize("kind", FALSE)
def test_a_false_picture_of_either_sandbox_is_refused_in_one_line(check, kind):
    """The size is that of the configs, whatever the class prints: equal pictures of another size do not pass."""
    png, reason = FALSE[kind]
    for drawn, expected in ((SOUND, png), (png, SOUND), (png, png)):
        with pytest.raises(InputError, match=reason):
            check(drawn, expected)


def test_pictures_of_both_sandboxes_are_compared(check):
    """Equal ones pass, others do not."""
    assert "off by 0 levels" in check(SOUND, SOUND)
    with pytest.raises(InputError, match="off by 2 levels"):
        check(SOUND, to_png(np.arange(64).reshape(8, 8) + 2))
