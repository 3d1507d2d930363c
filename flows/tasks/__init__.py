"""Prefect glue: tasks, runners, artifacts, notifications, progress."""
