"""Finished cells with several settings, methods or recipes -> tables and plots with intervals over the seeds."""
