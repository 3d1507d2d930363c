"""Variables of the environment -> a client of S3 that signs every part and fails fast."""

import os
import re
from functools import cache
from itertools import chain
from typing import Any

from stages.runtime.environment import ENDPOINTS, REGIONS, check_credentials
from stages.runtime.errors import InputError, first_line
from stages.storage.s3_deadlines import bound_waiting

MIB = 1024 * 1024
PART_BYTES, CONCURRENCY = 16 * MIB, 4
"""Part size and number of parallel parts of a transfer; their product bounds its memory."""
AMAZON = ".amazonaws."
"""Part of the hosts of Amazon's own S3; another server may have regions of any name."""
ATTEMPTS, RETRY_MODES = 6, ("standard", "adaptive", "legacy")
"""Attempts at a request, and modes of botocore, of which the first is taken, where AWS's own variables say nothing."""
SETTINGS = {
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
    from botocore.exceptions import BotoCoreError, InvalidRegionError
    from botocore.session import Session

    check_credentials()
    try:
        # boto3's default session would keep the credentials that it was first used with, and no session reads
        # AWS_REGION, as Amazon's other programs do.
        own = Session()
        own.register_component("data_loader", _definitions())
        session = boto3.session.Session(botocore_session=own, region_name=os.environ.get("AWS_REGION") or None)
        client = session.client("s3", config=Config(retries=_retries(), **SETTINGS))
    except InvalidRegionError:
        raise _invalid_region(session) from None
    except (BotoCoreError, ValueError) as error:  # an unknown profile, an invalid endpoint
        raise InputError(f"cannot connect to S3: {first_line(error)}; correct the AWS variables") from None
    is_chosen = any(os.environ.get(name) for name in ENDPOINTS) or AMAZON not in client.meta.endpoint_url
    if not is_chosen and session.region_name not in _regions(session):
        raise _invalid_region(session)
    bound_waiting(client)
    return client


def _retries() -> dict[str, Any]:
    """Return the settings of AWS_RETRY_MODE and AWS_MAX_ATTEMPTS, or ours.

    Raises:
        InputError: One of them has a value that botocore does not know.
    """
    mode, attempts = os.environ.get("AWS_RETRY_MODE") or RETRY_MODES[0], os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS
    if mode not in RETRY_MODES:
        raise InputError(f"AWS_RETRY_MODE is {mode!r}; allowed: {', '.join(RETRY_MODES)}")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", str(attempts)):
        raise InputError(f"AWS_MAX_ATTEMPTS is {attempts!r}; give a number from 1 to 9999")
    return {"mode": mode, "total_max_attempts": int(attempts)}


@cache
def _definitions() -> Any:  # noqa: ANN401  # boto3 is imported late
    """Return the loader of Amazon's definitions of its services; they hold no settings, and take .2 s to read."""
    from botocore.session import Session

    return Session().get_component("data_loader")


def _regions(session: Any) -> set[str | None]:  # noqa: ANN401  # boto3 is imported late
    """List the regions of S3, and None, for which boto3 takes a default."""
    names = session.get_available_partitions()
    known = [session.get_available_regions("s3", name, allow_non_regional=True) for name in names]
    return {None, *chain(*known)}


def _invalid_region(session: Any) -> InputError:  # noqa: ANN401  # boto3 is imported late
    config = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    profile = f"profile {session.profile_name} of {config}"
    origin = next((name for name in REGIONS if os.environ.get(name)), profile)
    advice = "write one such as eu-central-1, or set AWS_ENDPOINT_URL_S3 to a server of your own"
    return InputError(f"{origin} gives the region {session.region_name!r}, which S3 does not have; {advice}")


def transfer_config() -> Any:  # noqa: ANN401  # boto3 is imported late
    """Return the sizes and numbers of the parts of a transfer."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONCURRENCY)
