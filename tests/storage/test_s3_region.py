"""The region of S3: from the environment or a profile, checked before anything is sent."""

import pytest

from stages.runtime.environment import ENDPOINTS, REGIONS
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.s3_client import connect


@pytest.fixture(autouse=True)
def config(monkeypatch, tmp_path):
    """Credentials without a region, and an empty config file, which is returned."""
    for name in (*REGIONS, *ENDPOINTS, "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "config"
    file.touch()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return file


@pytest.mark.parametrize("variable", REGIONS)
@pytest.mark.parametrize("region", ["frankfurt", "Frankfurt!", "eu_central_1", "EU-CENTRAL-1", "eu-central-1a", "-x"])
def test_a_region_that_s3_does_not_have_is_named(monkeypatch, variable, region):
    """With its variable, as a mistake; otherwise the name of its host would not be found, which is no outage."""
    monkeypatch.setenv(variable, region)

    with pytest.raises(InputError, match=f"{variable} gives the region '{region}'") as caught:
        connect()
    assert not isinstance(caught.value, UnavailableError)


def test_a_region_of_a_profile_is_named_with_its_file(monkeypatch, config):
    """The variables of the region are not set."""
    config.write_text("[profile work]\nregion = nowhere\n")
    monkeypatch.setenv("AWS_PROFILE", "work")

    with pytest.raises(InputError, match=f"profile work of {config} gives the region 'nowhere'"):
        connect()


def test_an_empty_region_is_refused(monkeypatch):
    """It would become a part of the host's name."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")

    with pytest.raises(InputError, match="AWS_DEFAULT_REGION is empty"):
        connect()


@pytest.mark.parametrize("region", [None, "eu-central-1", "us-gov-west-1", "cn-north-1", "eusc-de-east-1"])
def test_a_region_of_s3_is_taken(monkeypatch, region):
    """From AWS_REGION, as in Amazon's other programs, before AWS_DEFAULT_REGION; without one boto3 has a default."""
    if region:
        monkeypatch.setenv("AWS_REGION", region)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    client = connect()

    assert client.meta.region_name == (region or "us-east-1")
    assert (region or "amazonaws.com") in client.meta.endpoint_url


def test_a_profile_may_name_another_server(monkeypatch, config):
    """Whose region may have any name, too."""
    config.write_text("[profile work]\nregion = garage\nendpoint_url = http://127.0.0.1:9000\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    client = connect()

    assert (client.meta.region_name, client.meta.endpoint_url) == ("garage", "http://127.0.0.1:9000")


def test_another_server_may_have_any_region(monkeypatch):
    """Its address is not made from the region."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "garage")

    assert connect().meta.region_name == "garage"
