"""Imports without garbage collections."""

import gc
import subprocess
import sys
from importlib.util import find_spec

import pytest

from stages.runtime.imports import importing


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_off_in_the_block_and_as_before_after_it(was_enabled):
    """Also in a block within a block, and after an import that failed."""
    if not was_enabled:
        gc.disable()
    try:
        with importing():
            with importing():
                pass
            assert not gc.isenabled()
        assert gc.isenabled() == was_enabled

        with pytest.raises(ImportError), importing():
            import no_such_module  # noqa: F401
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_what_a_block_imports_is_left_out_of_later_collections(tmp_path, monkeypatch):
    """A block that imports nothing new leaves the objects of the program to them."""
    (tmp_path / "brand_new_module.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with importing():
        import brand_new_module
    kept = [[] for _ in range(1000)]
    with importing():
        import brand_new_module
    collected = {id(it) for it in gc.get_objects()}
    del sys.modules["brand_new_module"]

    assert not any(id(made) in collected for made in brand_new_module.made)
    assert all(id(each) in collected for each in kept)


@pytest.mark.skipif(find_spec("triton") is None, reason="PyTorch for CPUs comes without triton")
def test_all_is_freed_at_the_end_of_the_process(root):
    """Otherwise triton, which looks for objects that are left, prints hundreds of lines."""
    code = "from stages.runtime.imports import importing\nwith importing(): import triton"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")
