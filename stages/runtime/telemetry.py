"""Environment variables that switch off the libraries' telemetry."""

import os

OFF = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the second user interface calls other servers with any setting
}


def switch_off() -> None:
    """Set the variables for this process and its children; call this before the libraries are imported."""
    os.environ.update(OFF)
