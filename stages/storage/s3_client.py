"""Variables of the environment -> a client of S3 that signs every part and fails fast."""

from typing import Any

from stages.runtime.environment import check_credentials
from stages.runtime.errors import InputError, first_line
from stages.storage.s3_patience import bound_waiting

MIB = 1024 * 1024
PART_BYTES, CONCURRENCY = 16 * MIB, 4
"""Part size and number of parallel parts of a transfer; their product bounds its memory."""
SETTINGS = {
    "retries": {"mode": "standard", "total_max_attempts": 6},
    "connect_timeout": 5,
    "read_timeout": 60,
    # Every part is signed with its SHA-256, which the server compares, over HTTP as over HTTPS.
    "s3": {"payload_signing_enabled": True},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


def connect() -> Any:  # noqa: ANN401  # boto3 creates its classes at run time
    """Return a client of S3.

    Raises:
        InputError: A variable of the environment is wrong.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    check_credentials()
    try:
        # boto3's default session would keep the credentials that it was first used with.
        client = boto3.session.Session().client("s3", config=Config(**SETTINGS))
    except (BotoCoreError, ValueError) as error:  # an unknown profile, an invalid endpoint
        raise InputError(f"cannot connect to S3: {first_line(error)}; correct the AWS variables") from None
    bound_waiting(client)
    return client


def transfer_config() -> Any:  # noqa: ANN401  # boto3 is imported late
    """Return the sizes and numbers of the parts of a transfer."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONCURRENCY)
