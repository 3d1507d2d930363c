"""The Prefect side of the flows: tasks, runners, artifacts, notifications, progress."""
