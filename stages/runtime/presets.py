"""Where a repository keeps its presets."""

PRESETS = "recipes/presets"
"""Folder of a commit with whole params files, which a run may take in place of params.yaml."""
