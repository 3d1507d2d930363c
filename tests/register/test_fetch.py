"""A version of the registry as the pretrained model of a pipeline."""

import pytest

from stages.fetch.model import fetch_model
from stages.fetch.params import RegistryModel
from stages.register.registry import MODEL
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.files import file_sha256
from stages.storage.tensors import tensors_sha256
from tests.register.conftest import NAME, WEIGHTS


def version(uri=f"models:/{NAME}/1", sha256=None):
    """Name a version as params.yaml does."""
    return RegistryModel(source="registry", uri=uri, sha256=sha256)


@pytest.fixture
def refused(tmp_path):
    """Fetch a version that is refused; returns the one line of the message."""

    def fetch(source, kind=InputError):
        with pytest.raises(kind) as caught:
            fetch_model(source, tmp_path / "out")
        assert "\n" not in caught.value.message
        return caught.value.message

    return fetch


def test_a_version_is_fetched_as_a_folder(publish, package, tmp_path, unet, content):
    """Weights are equal bit for bit; neither temporary files nor the evidence of the version remain."""
    publish()
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    fetched = fetch_model(version(sha256=file_sha256(package / MODEL / WEIGHTS)), out)

    assert tensors_sha256(fetched.unet.state_dict()) == tensors_sha256(unet.state_dict())
    assert {name for name in content(out) if "evidence" in name or "MLmodel" in name} == set()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_another_hash_is_refused_with_the_uri(publish, refused):
    """The message names the version, since the temporary folder no longer exists."""
    publish()

    message = refused(version(sha256="0" * 64))
    assert message.startswith(f"models:/{NAME}/1/")
    assert "expected 000" in message


@pytest.mark.usefixtures("registry")
def test_a_missing_version_is_one_line(publish, refused):
    """The line names what to correct."""
    for uri in (f"models:/{NAME}/7", "models:/nobody/1"):
        message = refused(version(uri))
        assert message.startswith(f"the MLflow registry does not give {uri}: ")
        assert message.endswith("; correct fetch.model.uri or MLFLOW_TRACKING_URI")
    publish(lambda folder: (folder / MODEL / "model_index.json").parent.rename(folder / "elsewhere"))
    assert "does not give models:/tiny/1" in refused(version())


def test_an_unavailable_registry_raises_unavailable_error(refused, monkeypatch):
    """Its exit code makes a flow retry."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    assert "the MLflow registry does not give" in refused(version(), UnavailableError)
