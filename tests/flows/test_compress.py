"""The flow compress: what it refuses before anything runs."""

import logging

import pytest

from flows.compress import compress
from flows.tasks import errors


@pytest.mark.parametrize("given", [{"overrides": {"seed": 1}}, {"preset": "digits"}], ids=str)
def test_the_checkout_as_it_stands_takes_no_changes(monkeypatch, given):
    """Its params.yaml is the user's own."""
    monkeypatch.setattr(errors, "get_run_logger", logging.getLogger)
    state = compress.fn(**given, commit=None)

    assert state.is_failed()
    assert state.message == "overrides and presets need a commit, since the checkout's params.yaml stays; give HEAD"
