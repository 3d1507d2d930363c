"""This process -> the number of cores that it may use."""

import os


def count_cores() -> int:
    """Count the cores that this process may use, which a container or taskset can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
