"""Where and with which params a run takes place; no Prefect."""
