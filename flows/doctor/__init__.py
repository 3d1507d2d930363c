"""Checks of a machine, its storage and its servers, for `espalier doctor`."""
