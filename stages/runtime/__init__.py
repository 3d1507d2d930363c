"""This process: errors, seeds, progress, device, telemetry, git, checked records."""
