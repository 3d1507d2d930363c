"""Errors of boto3 -> one line that says what to change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.storage.files import FULL

SERVER_ERROR = 500
"""The lowest HTTP status of a failure in the server."""
ADVICE = {
    "NoSuchBucket": "there is no such bucket; create it or correct the address",
    "SignatureDoesNotMatch": "the secret is wrong; correct AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the key is unknown; correct AWS_ACCESS_KEY_ID",
    "AccessDenied": "access is denied; request the rights to read, write and list",
    "403": "access is denied; check key, secret and rights",
    "404": "there is no such object, or no such bucket",
    "NoSuchKey": "there is no such object",
}
"""Error code of S3 -> what is wrong and what to change."""
TRANSIENT = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "500", "502", "503", "504")
"""Error codes of S3 after which a later attempt may succeed."""
OUTAGES = frozenset(
    {
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
)
"""Errors of botocore and boto3 after which a later attempt may succeed; all others are mistakes."""


@contextmanager
def s3_errors(name: str) -> Iterator[None]:
    """Translate the errors of boto3 and of the disk inside the block.

    Args:
        name: What the block reads or writes; the message begins with it.

    Raises:
        UnavailableError: The server fails or cannot be reached.
        InputError: The server refuses the request, credentials are missing, or the disk is full.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        is_down = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= SERVER_ERROR
        kind = UnavailableError if is_down else InputError
        raise kind(f"{name}: {ADVICE.get(str(error.response['Error']['Code']), first_line(error))}") from None
    except (BotoCoreError, Boto3Error) as error:
        # The transfer manager wraps a refused request in an error of its own, with the code in the text only.
        if advice := next((text for code, text in ADVICE.items() if f"({code})" in str(error)), None):
            raise InputError(f"{name}: {advice}") from None
        code = re.search(r"An error occurred \((\w+)\)", str(error))
        is_refused = code is not None and code[1] not in TRANSIENT
        kind = UnavailableError if type(error).__name__ in OUTAGES and not is_refused else InputError
        raise kind(f"{name}: {first_line(error)}") from None
    except OSError as error:
        advice = "; free some space" if error.errno in FULL else ""
        raise InputError(f"{name}: {error.strerror or error}{advice}") from None
