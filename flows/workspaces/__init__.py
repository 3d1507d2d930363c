"""The checkout, params and commands of a run; no Prefect."""
