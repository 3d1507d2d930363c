"""No Prefect server -> one for this process alone, on loopback, which ends with it even by kill -9."""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from flows.tasks.database import create_database
from flows.tasks.server import find_server
from stages.runtime import telemetry
from stages.runtime.errors import UnavailableError, first_line
from stages.runtime.stopping import stop_in_one_line

HOST = "127.0.0.1"
START_S = 120.0
"""Longest wait for the first answer."""
STOP_S = 10.0
"""Longest wait for the end in order."""


def ensure_server() -> None:
    """Make sure that a flow has a server: that of the environment, or a temporary one, which reports to nobody.

    From now on, Ctrl-C and SIGTERM end this process in one line. During a flow, Prefect first marks its run as Crashed.

    Raises:
        InputError: The server of the environment refuses the password, or its address is invalid.
        UnavailableError: The server does not answer.
    """
    telemetry.switch_off()
    stop_in_one_line((signal.SIGINT, signal.SIGTERM))
    if find_server() is None:
        start_temporary_server()


def start_temporary_server() -> None:
    """Start a server with a password of its own, and point this process's Prefect and its children to it.

    The server inherits a listening socket, so no other program can take its port, and one end of a pipe, whose other
    end closes when this process ends.

    Raises:
        UnavailableError: It does not answer.
    """
    create_database()
    auth = f"flow:{secrets.token_hex(32)}"
    with socket.create_server((HOST, 0)) as listening:
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listening.fileno())],
            stdin=subprocess.PIPE,
            env={
                **os.environ,
                "PREFECT_SERVER_API_AUTH_STRING": auth,
                "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,
                "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": address,
            },
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
    atexit.register(_stop, process)
    os.environ.update(PREFECT_API_URL=f"{address}/api", PREFECT_API_AUTH_STRING=auth)
    _wait(f"{address}/api/health", process)


def _wait(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait for the first answer, and let this process's Prefect read the environment anew."""
    import httpx
    from prefect.context import refresh_global_settings_context

    try:
        httpx.get(address, timeout=START_S).raise_for_status()
    except httpx.HTTPError as error:
        _stop(process)
        reason = f"no answer in {START_S:.0f} s" if isinstance(error, httpx.TimeoutException) else first_line(error)
        raise UnavailableError(f"Prefect's temporary server did not start ({reason}); try again") from None
    refresh_global_settings_context()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipe, whereupon the server ends; kill it if it takes long."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Serve on the inherited socket until standard input closes."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    listening = socket.socket(fileno=int(sys.argv[1]))

    import uvicorn
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = create_app(ephemeral=True, final=True)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST])
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on")).run(sockets=[listening])


def _end_with_caller() -> None:
    """Wait until the caller's end of standard input closes; end in order, and at once where that takes long."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(STOP_S / 2)
    os._exit(1)


if __name__ == "__main__":
    main()
