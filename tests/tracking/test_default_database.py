"""Without MLFLOW_TRACKING_URI, all that MLflow writes lies in the current folder, however its path is spelled."""

import os

import pytest

from stages.tracking.mlflow_client import connect, find_experiment


@pytest.mark.parametrize("name", ["space ü", "%41 #x 'q'"])
def test_the_default_database_lies_in_the_project(tmp_path, monkeypatch, name):
    """MLflow's own default writes to another folder, whose name is percent-encoded."""
    project = tmp_path / name
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored after the test
    client = connect()
    run = client.create_run(find_experiment(client, "espalier")).info.run_id
    (tmp_path / "note.txt").write_text("a note")
    client.log_artifact(run, str(tmp_path / "note.txt"))

    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{project}/mlflow.db"
    assert {path.name for path in tmp_path.iterdir()} == {name, "note.txt"}
    assert (project / "mlflow.db").is_file()
    assert [path.name for path in project.rglob("note.txt")] == ["note.txt"]
