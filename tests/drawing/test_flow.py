"""The flow draw: the command below Prefect, with what it found as the state of the run."""

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.draw import draw


@pytest.fixture
def run(prefect_server, model_folder, tmp_path, root, monkeypatch):
    """Draw the tiny model in two steps by the flow; returns its state."""
    monkeypatch.chdir(root)
    for name, value in prefect_server.client_environment().items():
        monkeypatch.setenv(name, value)
    fixed = {"steps": 2, "shard-size": 4, "batch-size": 4, "jobs": 1}

    def run_one(*, options=fixed, **parameters):
        given = {"model": str(model_folder), "out": str(tmp_path / "drawn"), "num_images": 8, **parameters}
        with temporary_settings({PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}):
            return draw(**given, options=options, return_state=True)

    return run_one


@pytest.mark.e2e
def test_the_flow_draws_and_checks(run, tmp_path):
    """A check draws nothing and tells what is finished; a damaged shard fails it in one line."""
    without_jobs = {"steps": 2, "shard-size": 4, "batch-size": 4}
    before = run(check=True, options=without_jobs)
    drawn = run()
    shards = sorted((tmp_path / "drawn").glob("*.parquet"))
    checked = run(check=True, options=without_jobs)
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    damaged = run(check=True, options=without_jobs)

    assert before.is_failed()
    assert "drawn holds no job; correct --out, or leave --check out to draw" in before.message
    assert drawn.message.startswith("8 images in 2 shards of ")
    assert len(shards) == 2
    assert checked.message == f"2 of 2 shards of {tmp_path / 'drawn'} are finished, and each has its hash"
    assert damaged.is_failed()
    assert "shard-00000.parquet is damaged: it has " in damaged.message
    assert "\n" not in damaged.message
