"""The notebooks of the documentation still do what they show."""

import re

import nbformat
import numpy as np
import pytest

from docs.run_notebooks import NOTEBOOKS, run

pytestmark = pytest.mark.e2e
DECIMAL = re.compile(r"\d+\.\d+")


def outputs(notebook):
    """What the cells printed, with each decimal number as #; these numbers; and the kinds of what is shown."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") for output in found)
    shown = [sorted(output.get("data", {})) for output in found]
    return DECIMAL.sub("#", text), [float(number) for number in DECIMAL.findall(text)], shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_says(path):
    """Counts exactly; measured numbers, which depend on the kind of CPU, within 0.05."""
    text, numbers, shown = outputs(nbformat.read(path, as_version=4))
    text_now, numbers_now, shown_now = outputs(run(nbformat.read(path, as_version=4)))

    assert text_now == text
    assert shown_now == shown
    np.testing.assert_allclose(numbers_now, numbers, atol=0.05)
