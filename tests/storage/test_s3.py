"""Folders in a bucket, and failures of network, server and disk."""

import contextlib
import itertools
import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
import time

import pytest
from botocore.retries.standard import ExponentialBackoff

from stages.runtime.errors import InputError, UnavailableError
from stages.storage import s3_deadlines
from stages.storage.manifest import MAX_BYTES, Entry, Manifest, check_space, parse_manifest
from stages.storage.s3 import Store
from tests.swift import KEY, SECRET, answer

NAME = "checkpoints/run/step-00000050"


def refused(call):
    """Return the error message of a call that must be refused; it has one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value.message


def stored(store):
    """List all keys of the store's bucket."""
    return sorted(item["Key"] for item in store.client.list_objects_v2(Bucket=store.bucket).get("Contents", []))


def test_a_folder_is_pulled_as_it_was_pushed(connect, folder, content, tmp_path):
    """Equal files are stored as one object, named by its hash; the manifest lists every file."""
    store = connect()
    manifest = store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)
    assert [entry.path for entry in manifest.files] == ["a.json", "b.json", "unet/weights.safetensors"]
    keys = stored(store)
    assert len(keys) == 3
    assert keys[0] == f"some/prefix/manifests/{NAME}.json"
    assert keys[1].startswith("some/prefix/objects/")
    assert store.names("checkpoints/run/") == [NAME]
    assert store.names("checkpoints/other/") == []


def test_stored_files_are_not_sent_again(connect, folder):
    """A second push of a folder sends nothing; under another name it sends only a manifest."""
    store = connect()
    store.push(folder, NAME)
    sent = []
    store.client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method))
    store.push(folder, NAME)
    assert set(sent) == {"GET"}

    store.push(folder, "other")
    assert sent.count("PUT") == 1


def test_a_stored_file_of_another_size_is_sent_again(connect, folder, content, tmp_path):
    """It is a part of the file, and its folder could not be pulled."""
    store = connect()
    manifest = store.push(folder, NAME)
    key = store._object(manifest.files[0].sha256)
    store.client.put_object(Bucket=store.bucket, Key=key, Body=b"")
    store.push(folder, "other")
    store.pull("other", tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


@pytest.mark.parametrize(
    ("status", "code", "is_outage", "message"),
    [
        (500, "InternalError", True, "InternalError"),
        (503, "SlowDown", True, "SlowDown"),
        (403, "AccessDenied", False, "access is denied; request the rights to read, write and list"),
        (400, "EntityTooLarge", False, "EntityTooLarge"),
    ],
)
def test_a_refused_upload_is_no_outage(connect, folder, status, code, is_outage, message):
    """The transfer manager has one error for both, and the code in its text only."""
    store = connect()
    answer(store.client, status, code, lambda request: request.method == "PUT")
    with pytest.raises(InputError, match=message) as caught:
        store.push(folder, NAME)

    assert isinstance(caught.value, UnavailableError) == is_outage
    assert "\n" not in caught.value.message


def test_a_stored_folder_is_never_changed(connect, folder):
    """A push of another folder under the same name is refused, and the first manifest stays."""
    store = connect()
    first = store.push(folder, NAME)
    (folder / "a.json").write_text("{ }")

    assert "a stored folder is never changed, choose another name" in refused(lambda: store.push(folder, NAME))
    assert store._read(NAME) == first


@pytest.mark.parametrize(("status", "is_outage"), [(500, True), (502, True), (400, False), (499, False)])
def test_a_server_that_fails_is_an_outage(connect, status, is_outage):
    """And one that refuses is not."""
    store = connect()
    answer(store.client, status, "Code", lambda _: True)
    with pytest.raises(InputError) as caught:
        store.names()

    assert isinstance(caught.value, UnavailableError) == is_outage


def test_a_list_of_many_objects_comes_in_pages(connect):
    """All of them are read."""
    store = connect()
    for name in "abc":
        store.client.put_object(Bucket=store.bucket, Key=store._key(f"manifests/{name}.json"), Body=b"{}")
    store.client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=1)
    )

    assert store.names() == ["a", "b", "c"]


def test_only_the_end_of_an_upload_in_parts_may_take_long(connect, folder, monkeypatch):
    """S3 puts the parts together then; a file of 34 MiB has three."""
    seen, send = [], s3_deadlines._send_in_time

    def record(session, request, answer_s):
        seen.append((request.method, "partNumber=" in request.url, answer_s))
        return send(session, request, answer_s)

    monkeypatch.setattr(s3_deadlines, "_send_in_time", record)
    connect().push(folder, NAME)

    assert [answer_s for method, _, answer_s in seen if method == "POST"] == [60.0, 600.0]  # its begin and its end
    assert {answer_s for method, _, answer_s in seen if method != "POST"} == {60.0}
    assert sum(is_part for _, is_part, _ in seen) == 3


@pytest.mark.parametrize("uri", ["bucket", "s3://", "s3://B", "http://bucket/x", "s3://bucket?x"])
@pytest.mark.usefixtures("credentials")
def test_an_invalid_address_is_refused(uri):
    """The error gives the form of a valid address."""
    assert "give s3://BUCKET or s3://BUCKET/PREFIX" in refused(lambda: Store(uri))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\b", "", "a//b", "./a"])
def test_a_name_that_leads_out_of_the_folder_is_refused(connect, folder, name):
    """This holds for the name of a folder and for the path of a file in a manifest."""
    store = connect()
    refused(lambda: store.push(folder, name))
    entry = {"path": name, "sha256": "a" * 64, "size_bytes": 1}
    with pytest.raises(ValueError, match=r"leads out of the folder|is no plain path of printable names"):
        Manifest.model_validate({"version": 1, "files": [entry]})


def test_a_wrong_secret_is_refused(connect, folder, monkeypatch):
    """The server refuses it; the error names the variable to correct and does not contain the secret."""
    uri = connect().uri
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    message = refused(lambda: Store(uri).push(folder, NAME))

    assert "correct AWS_SECRET_ACCESS_KEY" in message
    assert "mistaken" not in message


def test_a_missing_bucket_is_an_error(connect, folder):
    """The error contains the address."""
    store = connect(uri="s3://no-such-bucket/prefix")

    assert "no-such-bucket/prefix: there is no such bucket" in refused(lambda: store.push(folder, NAME))


@pytest.mark.usefixtures("credentials")
def test_a_server_that_does_not_answer_is_an_error(folder, monkeypatch):
    """After several attempts, one line names the endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = Store("s3://bucket")

    assert "http://127.0.0.1:9" in refused(lambda: store.push(folder, NAME))


def test_push_and_pull_retry_after_503(connect, folder, content, tmp_path):
    """The first three connections are answered with Slow Down."""
    store = connect(lambda n: ("busy", 0, "up") if n <= 3 else None)
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


def test_push_and_pull_retry_broken_connections(connect, folder, content, tmp_path):
    """Every third connection breaks after 1 MiB, in either direction."""
    store = connect(lambda n: ("cut", 2**20, "up" if n % 2 else "down") if n % 3 == 0 else None)
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


def test_a_slow_network_causes_no_error(connect, content, tmp_path, monkeypatch):
    """An upload of 2.4 s where an answer may take one: its size counts, too. Each 64 KiB take .3 s."""
    monkeypatch.setattr(s3_deadlines, "ANSWER_S", 1.0)
    monkeypatch.setattr(s3_deadlines, "MIN_UPLOAD_BYTES_PER_S", 64 * 1024)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/weights").write_bytes(os.urandom(512 * 1024))
    store = connect(lambda _: ("slow", 0.3, "up"))
    store.push(tmp_path / "folder", NAME)
    connect().pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(tmp_path / "folder")


def test_an_upload_with_a_flipped_bit_is_refused_by_the_server(connect, folder, content, tmp_path):
    """No manifest is stored, and a later push succeeds."""
    store = connect(lambda _: ("garble", 500_000, "up"))
    refused(lambda: store.push(folder, NAME))

    assert connect().names() == []
    store = connect()
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_a_download_with_a_flipped_bit_is_refused(connect, folder, tmp_path):
    """The hash differs, and nothing is left on the disk."""
    connect().push(folder, NAME)
    store = connect(lambda _: ("garble", 500_000, "down"))

    assert "expected" in refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_deleted_object_is_an_error(connect, folder, tmp_path):
    """The pull fails and leaves no folder."""
    store = connect()
    store.push(folder, NAME)
    store.client.delete_object(Bucket=store.bucket, Key=stored(store)[1])

    refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("body", ['{"version": 1, "fil', "", '{"version": 2, "files": []}'])
def test_a_damaged_manifest_is_an_error(connect, folder, tmp_path, body):
    """A manifest that is truncated, empty or of another version is refused."""
    store = connect()
    store.push(folder, NAME)
    store.client.put_object(Bucket=store.bucket, Key=stored(store)[0], Body=body.encode())

    assert f"the manifest {NAME}" in refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_killed_server_loses_nothing(connect, swift, folder, content, tmp_path, way):
    """The call fails with one line and leaves nothing incomplete; after a restart of the server it succeeds."""
    if way == "pull":
        connect().push(folder, NAME)
    store = connect(lambda _: ("slow", 0.02, "up" if way == "push" else "down"))
    call = {"push": lambda: store.push(folder, NAME), "pull": lambda: store.pull(NAME, tmp_path / "back")}[way]
    timer = threading.Timer(1.0, swift.kill)
    timer.start()
    try:
        refused(call)
    finally:
        timer.join()
        swift.start()

    assert not (tmp_path / "back").exists()
    if way == "push":
        assert connect().names() == []
    call()
    connect().pull(NAME, tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)


def test_a_full_disk_is_an_error(connect, folder, tmp_path):
    """A pull to a file system that is too small fails with one line."""
    connect().push(folder, NAME)
    (tmp_path / "small").mkdir()
    uri = connect().uri
    imports = "from stages.storage.s3 import Store; from pathlib import Path"
    code = f"{imports}; Store({uri!r}).pull({NAME!r}, Path('small/back'))"
    mount = f'mount -t tmpfs -o size=8m tmpfs small && {sys.executable} -c "{code}" 2>&1 | tail -1; ls -A small'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"mounting is not permitted on this machine: {result.stderr.strip()}")

    assert "No space left on device; free some space" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1, result.stdout


def test_memory_is_bounded(connect, tmp_path):
    """A push and a pull of 300 MiB need less than 150 MiB of memory."""
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "weights").open("wb") as file:
        for index in range(300):
            file.write(bytes([index % 251]) * 2**20)
    uri = connect().uri
    code = (
        "import resource; from pathlib import Path; from stages.storage.s3 import Store; import boto3.s3.transfer\n"
        f"store = Store({uri!r}); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store.push(Path('large'), 'large'); store.pull('large', Path('back'))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert float(result.stdout.split()[-1]) < 150
    assert (tmp_path / "back" / "weights").stat().st_size == 300 * 2**20


def test_a_manifest_holds_only_version_and_files(connect, folder):
    """A manifest is JSON without secrets."""
    store = connect()
    store.push(folder, NAME)
    key = f"some/prefix/manifests/{NAME}.json"
    manifest = json.loads(store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read())

    assert set(manifest) == {"version", "files"}
    assert [secret for secret in (KEY, SECRET) if secret in json.dumps(manifest)] == []


def test_of_two_writers_of_one_name_the_first_stays(connect, folder, monkeypatch):
    """Although both found the name free; the same folder twice is no conflict."""
    first, second = connect(), connect()
    manifest = first.push(folder, NAME)
    looks = iter([False])  # as it was before the first one wrote
    monkeypatch.setattr(second, "_holds", lambda *given: next(looks, None) is None and Store._holds(second, *given))
    (folder / "a.json").write_text("{ }")
    message = refused(lambda: second.push(folder, NAME))

    assert "a stored folder is never changed" in message
    assert first._read(NAME) == manifest


def refuse_conditions(store):
    """Answer 501 to conditional writes, as stores that do not know them."""
    answer(store.client, 501, "NotImplemented", lambda request: "If-None-Match" in request.headers)


@pytest.mark.parametrize(("conflicts", "is_stored"), [(2, True), (3, False)])
def test_a_manifest_that_others_are_writing_is_tried_three_times(connect, folder, conflicts, is_stored):
    """A conflict is no refusal: the other writer may fail, and then nothing is stored."""
    store, number = connect(), itertools.count(1)
    answer(
        store.client,
        409,
        "ConditionalRequestConflict",
        lambda request: "If-None-Match" in request.headers and next(number) <= conflicts,
    )
    if is_stored:
        store.push(folder, NAME)
    else:
        with pytest.raises(UnavailableError, match="is being written by others; try again"):
            store.push(folder, NAME)

    assert store.names() == [NAME] * is_stored


def test_a_store_without_conditional_writes_keeps_the_last_whole_manifest(connect, folder, monkeypatch, capsys):
    """And the writer whose manifest was replaced says so."""
    store = connect()
    refuse_conditions(store)
    manifest = store.push(folder, NAME)
    assert store._read(NAME) == manifest
    assert "Warning" not in capsys.readouterr().err

    monkeypatch.setattr(store, "_read", lambda _: None)
    store.push(folder, "other")
    assert "has no conditional writes, and another writer has replaced other meanwhile" in capsys.readouterr().err


SHA256 = "a" * 64


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a", "a"], "a is listed twice"),
        (["a", "b", "a/c"], "a is listed as a file and as a folder"),
        (["a/b/c", "a"], "a is listed as a file and as a folder"),
        (["/".join("a" * 2000)], "2000 folders and 3999 bytes is too long"),
        (["a" * 300], "1 folders and 300 bytes is too long"),
        (["é" * 200], "1 folders and 400 bytes is too long"),
        (["/".join(["a" * 200] * 6)], "6 folders and 1205 bytes is too long"),
    ],
)
def test_a_manifest_that_no_folder_can_have_is_refused(paths, message):
    """Before anything is downloaded."""
    entries = [{"path": path, "sha256": SHA256, "size_bytes": 1} for path in paths]
    with pytest.raises(ValueError, match=message) as caught:
        parse_manifest(json.dumps({"files": entries}).encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b" " * (MAX_BYTES + 1), "larger than 16 MiB"),
        (lambda: files_json(50_001), "at most 50000"),
        (lambda: b"[" * 100_000, "limit"),
    ],
    ids=["bytes", "files", "levels"],
)
def test_a_manifest_of_any_size_is_bounded(content, message):
    """In bytes, files and levels; as many files as are allowed are read."""
    with pytest.raises(ValueError, match=message):
        parse_manifest(content())
    assert len(parse_manifest(files_json(50_000)).files) == 50_000


def test_a_manifest_with_a_negative_size_is_refused():
    """It would make room for other files."""
    with pytest.raises(ValueError, match="size_bytes"):
        parse_manifest(json.dumps({"files": [{"path": "a", "sha256": SHA256, "size_bytes": -1}]}).encode())


def test_files_that_fit_one_by_one_may_not_fit_together(tmp_path):
    """The folder does not exist yet, so its disk is that of the nearest one that does."""
    size_bytes = int(shutil.disk_usage(tmp_path).free * 0.6)
    one, two = (Entry(path=name, sha256=SHA256, size_bytes=size_bytes) for name in "ab")
    check_space(Manifest(files=[one]), tmp_path / "new/folder", "x")

    assert "free some space" in refused(lambda: check_space(Manifest(files=[one, two]), tmp_path / "new/folder", "x"))


def files_json(count):
    """A manifest of so many files."""
    entries = [{"path": str(number), "sha256": SHA256, "size_bytes": 1} for number in range(count)]
    return json.dumps({"files": entries}).encode()


def test_sizes_that_lie_are_found_before_the_download(connect, folder, tmp_path):
    """A manifest that understates a file, and one that the disk could not hold."""
    store = connect()
    manifest = store.push(folder, NAME)
    for size_bytes, message in ((1, "it has 2 bytes, expected 1"), (10**17, "free some space")):
        entries = [entry.model_copy(update={"size_bytes": size_bytes}) for entry in manifest.files]
        body = manifest.model_copy(update={"files": entries}).model_dump_json()
        store.client.put_object(Bucket=store.bucket, Key=store._key("manifests/lie.json"), Body=body)

        assert message in refused(lambda: store.pull("lie", tmp_path / "back"))
        assert not (tmp_path / "back").exists()


def test_keys_that_cannot_be_files_beside_one_another_are_refused(connect, tmp_path):
    """One is a folder of the other."""
    store = connect()
    for key in ("data/a.png", "data/a.png/b.png"):
        store.client.put_object(Bucket=store.bucket, Key=key, Body=b"x")
    store = connect(uri=f"s3://{store.bucket}/data")

    def download():
        with store.downloaded(["*"], tmp_path):
            pass

    assert "a.png is listed as a file and as a folder; rename it" in refused(download)


def test_patterns_of_keys_do_not_depend_on_case(connect, tmp_path):
    """Neither side's; a file keeps its own name."""
    store = connect()
    for name in ("readme.MD", "unet/Config.json", "notes.txt"):
        store.client.put_object(Bucket=store.bucket, Key=store._key(name), Body=b"x")
    with store.downloaded(["README.md", "UNET/*.json"], tmp_path) as folder:
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    assert found == ["readme.MD", "unet/Config.json"]


class Trickle(socketserver.BaseRequestHandler):
    """A server that sends one byte at a time: of its head, or of a body."""

    def handle(self):
        """Answer until the client gives up."""
        self.request.recv(65536)
        self.request.sendall(self.server.head)
        with contextlib.suppress(OSError):
            while True:
                time.sleep(0.02)
                self.request.sendall(b"x")


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nx-a: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"])
@pytest.mark.usefixtures("credentials")
def test_a_server_that_never_finishes_is_an_outage(monkeypatch, tmp_path, head):
    """A head, a list or an object that comes byte by byte ends after a bounded time."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Trickle)
    server.daemon_threads, server.head = True, head
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(s3_deadlines, "ANSWER_S", 0.06)
    monkeypatch.setattr(s3_deadlines, "GRACE_S", 0.05)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    store = Store("s3://bucket")

    for call in (store.names, lambda: store._read("x"), lambda: store._get("key", "key", tmp_path / "file")):
        with pytest.raises(UnavailableError) as caught:
            call()
        assert "\n" not in caught.value.message
    server.shutdown()
    server.server_close()
