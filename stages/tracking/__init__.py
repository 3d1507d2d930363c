"""MLflow: the client, the record of a finished compression, the live run of a training in progress."""
