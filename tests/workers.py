"""Which worker of pytest-xdist runs which file, in which order, and what no other worker may run beside."""

import fcntl
from pathlib import Path

import pytest

from tests.reaper import start_reaper

TESTS = Path(__file__).parent
STORES = [
    "fetch/test_s3.py",
    "storage/test_s3.py",
    "register/test_server.py",
    "pipeline/test_remote.py",
    "fetch/test_listing.py",
    "fetch/test_shown.py",
    "finetune/test_checkpoint_upload.py",
    "finetune/test_kill.py",
    "storage/test_s3_region.py",
    "storage/test_s3_retries.py",
    "tools/test_leftovers.py",
]
"""Files that use the S3 server: one worker runs them all and starts it once."""
PREFECT = [
    "flows/test_prefect_server.py",
    "flows/test_deploy.py",
    "flows/test_outcome.py",
    "flows/test_pools.py",
    "flows/test_stages.py",
    "flows/test_start.py",
]
"""Files that use the Prefect server; likewise."""
SLOW = [
    "pipeline/test_pipeline.py",
    *PREFECT,
    *STORES,
    "register/test_sandbox.py",
    "finetune/test_stage.py",
    "prune/test_families.py",
    "pipeline/test_registry.py",
    "pipeline/test_systems.py",
    "prune/test_oracle.py",
    "pipeline/test_bad_input.py",
    "pipeline/test_page.py",
    "register/test_gate.py",
    "register/test_ledger.py",
]
"""Workers take files in this order, so that one builds the finished workspace while others run other tests."""


def pytest_configure():
    """Let nothing outlive this session, however it ends."""
    start_reaper()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, give a worker whole files, and all files of a server together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    server = {name: files[0] for files in (STORES, PREFECT) for name in files}

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return server.get(file.removeprefix("tests/"), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Order files for workers: the slowest first, those that compare times last; tests in a file keep their order."""
    if hasattr(config, "workerinput"):
        order = {TESTS / name: place for place, name in enumerate(SLOW)}
        timed = {item.path for item in items if item.get_closest_marker("timed")}
        items.sort(key=lambda item: order.get(item.path, len(SLOW) + (item.path in timed)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run a test that compares times while no other worker runs a test."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("timed") else fcntl.LOCK_SH)
        return (yield)
