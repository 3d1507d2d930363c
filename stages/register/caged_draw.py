"""A model version and seeds -> the images that its own code draws, one line each: seed, PNG in base64.

It runs in a cage, where Espalier is not.
"""

import os
import sys
from collections.abc import Iterable, Iterator


def draw(folder: str, seeds: Iterable[int]) -> Iterator[str]:
    """Load a version with mlflow.pyfunc and draw."""
    import mlflow

    for row in mlflow.pyfunc.load_model(folder).predict({"seed": list(seeds)}):
        yield f"{row['seed']} {row['png']}\n"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)  # so that a library that prints does not disturb the result
        result.writelines(draw(sys.argv[1], map(int, sys.argv[2:])))
