"""An S3 server on loopback: OpenStack Swift with s3api, which checks checksums and signatures."""

import contextlib
import secrets
import socket
import socketserver
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from stages.storage.s3 import Store

BIN = Path(sys.executable).parent
KEY, SECRET = "test:tester", secrets.token_hex(16)
KINDS = ("account", "container", "object", "proxy")
COMMON = """[DEFAULT]
swift_dir = {root}
bind_ip = 127.0.0.1
bind_port = {port}
devices = {root}/disks
mount_check = false
workers = 0
user = {user}
log_level = ERROR
"""
SERVER = """[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY = """[pipeline:main]
pipeline = catch_errors s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


def free_ports(count):
    """Find unused ports, below the range from which the system assigns ports to clients."""
    with contextlib.ExitStack() as stack:
        ports = []
        while len(ports) < count:
            listener, port = stack.enter_context(socket.socket()), 20_000 + secrets.randbelow(12_000)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def wait_for(port, seconds=30):
    """Wait until a server listens on a port."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, f"no server listens on port {port}"
        time.sleep(0.05)


class Swift:
    """Swift's four servers over one disk, which can be killed and started again."""

    def __init__(self, root):
        self.root, self.ports = root, dict(zip(KINDS, free_ports(4), strict=True))
        self.processes = []
        (root / "disks" / "d1").mkdir(parents=True)
        (root / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = a\n[storage-policy:0]\nname = one\ndefault = yes\n"
        )
        for kind in KINDS:
            body = PROXY.format(secret=SECRET) if kind == "proxy" else SERVER.format(kind=kind)
            head = COMMON.format(root=root, port=self.ports[kind], user=self._user())
            (root / f"{kind}.conf").write_text(head + body)
            if kind != "proxy":
                for step in (
                    ("create", "4", "1", "0"),
                    ("add", f"r1z1-127.0.0.1:{self.ports[kind]}/d1", "1"),
                    ("rebalance",),
                ):
                    command = [BIN / "swift-ring-builder", root / f"{kind}.builder", *step]
                    subprocess.run(command, check=False, capture_output=True)

    @staticmethod
    def _user():
        return subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()

    @property
    def port(self):
        """The port of the S3 interface."""
        return self.ports["proxy"]

    def start(self):
        """Start all four servers and wait until they listen."""
        for kind in KINDS:
            with (self.root / f"{kind}.log").open("a") as log:
                command = [BIN / f"swift-{kind}-server", self.root / f"{kind}.conf"]
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        for port in self.ports.values():
            wait_for(port)

    def kill(self):
        """Kill all four servers with SIGKILL."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []


class FaultyProxy(socketserver.ThreadingTCPServer):
    """A TCP proxy that can break connections, delay them, flip a bit, or answer 503 itself.

    `plan(n)` gives the fault of the n-th connection: None; ("cut", bytes, way) closes it after so many bytes;
    ("garble", bytes, way) flips a bit of that byte; ("slow", seconds, way) delays each chunk; ("busy", 0, way) answers
    503. A way is up or down.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, target, plan):
        super().__init__(("127.0.0.1", 0), ProxiedConnection)
        self.target, self.plan, self.count, self.lock = target, plan, 0, threading.Lock()

    def next_fault(self):
        """Count the next connection and return its fault."""
        with self.lock:
            self.count += 1
            return self.plan(self.count)


class ProxiedConnection(socketserver.BaseRequestHandler):
    """One connection through the proxy."""

    def handle(self):
        """Forward bytes both ways until one side closes."""
        fault = self.server.next_fault()
        if fault and fault[0] == "busy":
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as server:
            down = threading.Thread(target=self.forward, args=(server, self.request, fault, "down"), daemon=True)
            down.start()
            self.forward(self.request, server, fault, "up")
            down.join(30)

    def forward(self, source, target, fault, way):
        """Forward bytes one way, with the fault if it belongs to this way."""
        kind, amount, faulty_way = fault or ("none", 0, "")
        forwarded = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                if faulty_way == way and kind == "slow":
                    time.sleep(amount)
                if faulty_way == way and kind == "garble" and forwarded <= amount < forwarded + len(chunk):
                    index = amount - forwarded
                    chunk = chunk[:index] + bytes([chunk[index] ^ 1]) + chunk[index + 1 :]
                if faulty_way == way and kind == "cut" and forwarded + len(chunk) > amount:
                    break
                forwarded += len(chunk)
                target.sendall(chunk)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def swift(tmp_path_factory):
    """The running Swift server."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Swift runs on Linux only")
    server = Swift(tmp_path_factory.mktemp("swift"))
    server.start()
    yield server
    server.kill()


def answer(client, status, code, asked):
    """Answer the requests of a client for which `asked` is true with a status and code of S3, in the server's place."""
    from botocore.awsrequest import AWSResponse

    session, body = client._endpoint.http_session, f"<Error><Code>{code}</Code></Error>".encode()
    send = session.send

    def reply(request):
        if not asked(request):
            return send(request)
        raw = type("Raw", (), {"stream": lambda *_, **__: iter([body])})()
        return AWSResponse(request.url, status, {"content-type": "application/xml"}, raw)

    session.send = reply


@pytest.fixture
def credentials(monkeypatch):
    """Set the server's credentials, ignore this machine's own, and shorten the waits between retries."""
    from botocore.retries.standard import ExponentialBackoff

    delay_amount = ExponentialBackoff.delay_amount
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *arguments: delay_amount(*arguments) / 20)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture
def connect(swift, credentials, monkeypatch):  # noqa: ARG001
    """Open a store in the test's own bucket, directly or through a faulty proxy."""
    proxies = []

    def open_store(plan=None, uri=None):
        port = swift.port
        if plan:
            proxies.append(FaultyProxy(swift.port, plan))
            threading.Thread(target=proxies[-1].serve_forever, daemon=True).start()
            port = proxies[-1].server_address[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        return Store(uri or f"s3://{bucket}/some/prefix")

    bucket = f"bucket-{uuid.uuid4().hex}"
    open_store().client.create_bucket(Bucket=bucket)
    yield open_store
    for proxy in proxies:
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture
def folder(tmp_path):
    """A folder with two equal small files and a large one in a subfolder."""
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 140_000)  # 34 MiB: three parts
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text("{}")
    return folder


@pytest.fixture
def content():
    """Read all files of a folder: path -> bytes."""

    def read(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
