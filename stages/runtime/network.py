"""An exception of a network library -> whether it is an outage, after which a later attempt may succeed."""

NETWORK = ("requests.", "urllib3.", "httpx", "prefect.exceptions")
"""Prefixes of modules whose errors are network errors, but for those of an invalid address or certificate."""


def is_outage(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is an outage of the network or the server."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(_is_mistake(found) for found in chain):
        return False
    return any(
        isinstance(found, ConnectionError | TimeoutError) or type(found).__module__.startswith(NETWORK)
        for found in chain
    )


def _is_mistake(error: BaseException) -> bool:
    """Return whether a network library refuses an address, a header or a certificate, or a server the request."""
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status < 500:  # noqa: PLR2004
        return status not in (408, 429)  # too slow, too many
    is_invalid = isinstance(error, ValueError) or name in ("InvalidURL", "UnsupportedProtocol", "TooManyRedirects")
    return type(error).__module__.startswith(NETWORK) and (is_invalid or name == "SSLError")
