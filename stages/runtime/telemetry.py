"""The libraries' habit of reporting home -> off."""

import os

OFF = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the second page calls others, whatever the settings say
}


def switch_off() -> None:
    """Tell every library that reports to someone not to; call it before they are imported."""
    os.environ.update(OFF)
