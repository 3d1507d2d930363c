"""Prefect flows over the stages of dvc.yaml: schedules, sweeps, retries, promotion."""
