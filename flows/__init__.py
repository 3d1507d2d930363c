"""Prefect flows over the stages of dvc.yaml: schedules, sweeps, retries, promotion."""

import os

# Here, because Prefect reads it as it is imported: the server that it would start by itself needs no password, so any
# web page could run code through it. flows/tasks/temporary_server.py starts one that answers to its own flow only.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
