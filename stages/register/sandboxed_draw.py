"""A model version, a graph or none, and seeds -> the images that its own code draws, a line each: seed, PNG in base64.

It runs in a sandbox, where Espalier is not.
"""

import os
import sys
from collections.abc import Iterable, Iterator


def draw(folder: str, seeds: Iterable[int], variant: str | None = None) -> Iterator[str]:
    """Load a version with mlflow.pyfunc and draw, with the model or with a variant of it."""
    import mlflow

    params = {"variant": variant} if variant else None
    for row in mlflow.pyfunc.load_model(folder).predict({"seed": list(seeds)}, params=params):
        yield f"{row['seed']} {row['png']}\n"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)  # so that a library that prints does not disturb the result
        result.writelines(draw(sys.argv[1], map(int, sys.argv[3:]), sys.argv[2]))
