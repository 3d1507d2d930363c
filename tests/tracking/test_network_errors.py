"""Each error of the network libraries: an outage, after which a later attempt may succeed, or a mistake."""

import inspect
from string import Formatter
from types import SimpleNamespace

import boto3.exceptions
import botocore.exceptions
import httpx
import pytest
import requests

from stages.runtime.errors import InputError, UnavailableError
from stages.storage.s3_errors import s3_errors
from stages.tracking import mlflow_client

S3_OUTAGES = {
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "EndpointConnectionError",
    "IncompleteReadError",
    "MetadataRetrievalError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "RetriesExceededError",
    "S3TransferFailedError",
    "S3UploadFailedError",
}
WEB_MISTAKES = {
    "InvalidHeader",
    "InvalidProxyURL",
    "InvalidSchema",
    "InvalidURL",
    "JSONDecodeError",
    "MissingSchema",
    "SSLError",
    "TooManyRedirects",
    "UnsupportedProtocol",
}


def classes_of(module, base):
    """List the exception classes that a module defines below a base class."""
    return [
        found for _, found in inspect.getmembers(module, inspect.isclass) if issubclass(found, base) and found != base
    ]


def make_s3_error(kind):
    """Make an error of botocore or boto3 with plausible arguments."""
    if issubclass(kind, botocore.exceptions.BotoCoreError):
        named = {name: "x" for _, name, _, _ in Formatter().parse(kind.fmt) if name}
        return kind(**named, **({"last_response": {}} if kind is botocore.exceptions.WaiterError else {}))
    return kind("x", "y") if kind is boto3.exceptions.DynamoDBOperationNotSupportedError else kind("x")


S3_CLASSES = [
    *classes_of(botocore.exceptions, botocore.exceptions.BotoCoreError),
    boto3.exceptions.RetriesExceededError,
    boto3.exceptions.S3TransferFailedError,
    boto3.exceptions.S3UploadFailedError,
    boto3.exceptions.NoVersionFound,
]


def test_every_error_of_botocore_is_an_outage_or_a_mistake():
    """Only a network or server that fails is an outage; the message has one line and begins with what was done."""
    outages = set()
    for kind in S3_CLASSES:
        with pytest.raises(InputError) as caught, s3_errors("the list"):
            raise make_s3_error(kind)
        assert caught.value.message.startswith("the list: ")
        assert "\n" not in caught.value.message
        if isinstance(caught.value, UnavailableError):
            outages.add(kind.__name__)

    assert len(S3_CLASSES) > 50
    assert outages == S3_OUTAGES


def make_web_error(kind):
    """Make an error of requests or httpx."""
    if kind.__name__ == "HTTPStatusError":
        return kind("x", request=None, response=SimpleNamespace(status_code=503))
    return kind("x", "", 0) if kind.__name__ == "JSONDecodeError" else kind("x")


@pytest.mark.parametrize(
    ("module", "base"), [(requests.exceptions, requests.RequestException), (httpx, httpx.HTTPError)]
)
def test_every_error_of_requests_and_httpx_is_an_outage_or_a_mistake(module, base):
    """An invalid address, header or certificate is a mistake, whatever wraps it."""
    for kind in classes_of(module, base):
        with pytest.raises(InputError) as caught, mlflow_client.errors("does not answer"):
            raise make_web_error(kind)
        assert isinstance(caught.value, UnavailableError) == (kind.__name__ not in WEB_MISTAKES), kind


@pytest.mark.parametrize(("status", "is_outage"), [(401, False), (403, False), (404, False), (429, True), (503, True)])
def test_a_refusal_of_the_server_is_a_mistake(status, is_outage):
    """A server that refuses the user is not away."""
    response = requests.Response()
    response.status_code = status
    with pytest.raises(InputError) as caught, mlflow_client.errors("does not answer"):
        raise requests.HTTPError("refused", response=response)

    assert isinstance(caught.value, UnavailableError) == is_outage
