"""Imports without garbage collections."""

import gc

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
