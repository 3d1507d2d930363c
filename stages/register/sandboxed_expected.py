"""A model version with an own class and seeds -> the images that Espalier draws with it, one line each.

Espalier runs the class to draw, so it does that in a sandbox as well, with a copy of its own code.
"""

import base64
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def draw(version: str, code: str, seeds: Sequence[int]) -> Iterator[str]:
    """Draw with the classes of Espalier, whose package `stages` is the folder `code`."""
    sys.path.insert(0, str(Path(code).parent))

    from PIL import Image

    from stages.models.trust import trusting
    from stages.register.canary import draw_expected

    with trusting(is_trusted=True):
        images = draw_expected(Path(version), seeds)
    for seed, image in zip(seeds, images, strict=True):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        yield f"{seed} {base64.b64encode(content.getvalue()).decode()}\n"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)  # so that a library that prints does not disturb the result
        result.writelines(draw(sys.argv[1], sys.argv[2], [int(seed) for seed in sys.argv[3:]]))
