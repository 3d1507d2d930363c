"""Errors, seeds, progress, device, telemetry, git, checked records, code hashes of this process."""
