"""Arrays and tensors whose rows are written as they come."""

import numpy as np
import pytest
import torch

from stages.storage.rows import array_file, tensors_file
from stages.storage.tensors import read_tensors, write_array, write_tensors

DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 1, 4, 4), (1, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_rows_in_any_order_make_the_file_of_the_whole_array(tmp_path, shape, kind):
    """The bytes are those of `write_array`, also for rows of the second axis, counted through the first."""
    values = DRAWS.integers(0, 256, shape).astype(kind)
    write_array(tmp_path / "whole.npy", values)
    file = array_file(tmp_path / "rows.npy", kind, shape)
    file.create()
    rows = values.reshape(-1, *shape[2:]) if len(shape) > 2 else values
    for start in DRAWS.permutation(range(0, len(rows), 2)).tolist():
        file.write(start, rows[start : start + 2])

    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert np.array_equal(file.read(), values)


def test_a_file_that_is_long_enough_is_not_cut(tmp_path):
    """An array that is made later may lie before one that is already written."""
    first, last = tensors_file(tmp_path / "rows.safetensors", {"a": (2, 3), "b": (4,)}).values()
    last.create()
    last.write(0, np.arange(4, dtype=np.float32))
    first.create()

    assert last.read().tolist() == [0, 1, 2, 3]
    assert first.read().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_rows_of_another_type_become_those_of_the_array(tmp_path):
    """A row has the size that the array's type gives it."""
    file = array_file(tmp_path / "rows.npy", np.float32, (3, 2))
    file.create()
    file.write(1, np.array([[1.5, 2.5], [3.5, 4.5]], np.float64))

    assert np.load(tmp_path / "rows.npy").tolist() == [[0, 0], [1.5, 2.5], [3.5, 4.5]]


@pytest.mark.parametrize("sizes", [(8, 10), (1, 1), (123, 4567)])
def test_tensors_in_any_order_make_the_file_of_all_tensors(tmp_path, sizes):
    """The bytes are those of `write_tensors`, whatever the length of the header."""
    tensors = {"real": torch.rand(sizes[1], 3), "dense": torch.rand(2, sizes[0], 3)}
    write_tensors(tmp_path / "whole.safetensors", tensors)
    files = tensors_file(tmp_path / "rows.safetensors", {name: tuple(tensors[name].shape) for name in tensors})
    for file in files.values():
        file.create()
    files["real"].write(0, tensors["real"].numpy())
    for index in (1, 0):
        files["dense"].write(index * sizes[0], tensors["dense"][index].numpy())

    assert (tmp_path / "rows.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "rows.safetensors")["dense"], tensors["dense"])
