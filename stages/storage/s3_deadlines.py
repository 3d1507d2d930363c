"""A client of S3 -> one that gives up on a server whose answer never ends.

The timeouts of botocore begin anew with every byte, so a server that sends one byte every two seconds would hold a
process for ever.
"""

import time
from threading import Event, Thread
from typing import Any

ANSWER_S = 60.0
"""Longest wait for an answer without its object, in addition to the time for what is sent."""
COMPLETION_S = 600.0
"""The same for the end of an upload in parts, which S3 puts together while it sends blanks."""
MIN_UPLOAD_BYTES_PER_S = 16 * 1024
"""Rate that is assumed for what is sent."""
GRACE_S, MIN_BYTES_PER_S = 30.0, 1024
"""Once an object has been waited for so many seconds, it must have come at this rate on average."""
PIECE_BYTES = 64 * 1024


def bound_waiting(client: Any) -> None:  # noqa: ANN401  # boto3 creates its classes at run time
    """Bound the time of every request of a client; a longer one is a ReadTimeoutError, which botocore retries."""
    session = client._endpoint.http_session  # noqa: SLF001  # botocore has no public way to its session

    def send(request: Any, event_name: str, **_: Any) -> Any:  # noqa: ANN401
        """Send a request in place of botocore, within the time of its kind."""
        is_completion = event_name.endswith(".CompleteMultipartUpload")
        response = _send_in_time(session, request, COMPLETION_S if is_completion else ANSWER_S)
        if request.stream_output:
            response.raw = PacedStream(response.raw, request.url)
        return response

    client.meta.events.register_last("before-send.s3", send)


def _send_in_time(session: Any, request: Any, answer_s: float) -> Any:  # noqa: ANN401
    from botocore.exceptions import ReadTimeoutError

    found: list[Any] = []
    is_late = Event()

    def send() -> None:
        """Send the request, and close a response that nobody waits for any more."""
        try:
            found.append(session.send(request))
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            found.append(error)
        else:
            if is_late.is_set():
                found[0].raw.close()

    thread = Thread(target=send, name="s3 request", daemon=True)  # does not delay the exit
    thread.start()
    thread.join(answer_s + int(request.headers.get("Content-Length") or 0) / MIN_UPLOAD_BYTES_PER_S)
    if not found:
        is_late.set()
        raise ReadTimeoutError(endpoint_url=request.url)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class PacedStream:
    """The body of an answer; reading it fails if it comes too slowly."""

    def __init__(self, stream: Any, url: str) -> None:  # noqa: ANN401  # a response of urllib3
        self._stream, self._url = stream, url
        self._waited_s, self._num_bytes = 0.0, 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return any other attribute of the response."""
        return getattr(self._stream, name)

    def read(self, amt: int | None = None) -> bytes:
        """Read so many bytes, or all.

        Raises:
            ReadTimeoutError: They come too slowly.
        """
        pieces, left = [], amt
        while left is None or left > 0:
            piece = self._read_piece(PIECE_BYTES if left is None else min(left, PIECE_BYTES))
            if not piece:
                break
            pieces.append(piece)
            left = None if left is None else left - len(piece)
        return b"".join(pieces)

    def _read_piece(self, num_bytes: int) -> bytes:
        from botocore.exceptions import ReadTimeoutError

        begin = time.monotonic()
        piece: bytes = self._stream.read1(num_bytes)
        self._waited_s += time.monotonic() - begin
        self._num_bytes += len(piece)
        if self._waited_s > GRACE_S and self._num_bytes < MIN_BYTES_PER_S * self._waited_s:
            self._stream.close()
            raise ReadTimeoutError(endpoint_url=self._url)
        return piece
