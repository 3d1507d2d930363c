"""Folders in a bucket, and what goes wrong on the way."""

import json
import subprocess
import sys
import threading

import pytest

from stages.runtime.errors import InputError
from stages.storage.s3 import Manifest, Store

NAME = "checkpoints/run/step-00000050"


def refused(call):
    """Run something that must be refused: the line that does it."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value.message


def stored(store):
    """All keys of the store's bucket."""
    return sorted(item["Key"] for item in store.client.list_objects_v2(Bucket=store.bucket).get("Contents", []))


def test_a_folder_comes_back_as_it_was(connect, folder, content, tmp_path):
    """Equal files are one object, named by its hash; the manifest names them all."""
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


def test_what_is_there_is_not_sent_again(connect, folder):
    """A second push of the same folder sends no object, under another name only a manifest."""
    store = connect()
    store.push(folder, NAME)
    sent = []
    store.client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method))
    store.push(folder, NAME)
    assert set(sent) == {"GET"}

    store.push(folder, "other")
    assert sent.count("PUT") == 1


def test_what_is_stored_is_never_changed(connect, folder):
    """Another folder under the same name is refused, and the first is still there."""
    store = connect()
    first = store.push(folder, NAME)
    (folder / "a.json").write_text("{ }")

    assert "what is stored is never changed, take another name" in refused(lambda: store.push(folder, NAME))
    assert store._read(NAME) == first


@pytest.mark.parametrize("uri", ["bucket", "s3://", "s3://B", "http://bucket/x", "s3://bucket?x"])
@pytest.mark.usefixtures("credentials")
def test_an_address_that_is_none_is_refused(uri):
    """With what one looks like."""
    assert "give s3://BUCKET or s3://BUCKET/PREFIX" in refused(lambda: Store(uri))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\b", "", "a//b", "./a"])
def test_no_name_leads_out(connect, folder, name):
    """Neither a folder's nor, in a manifest that somebody else wrote, a file's."""
    store = connect()
    refused(lambda: store.push(folder, name))
    entry = {"path": name, "sha256": "a" * 64, "size_bytes": 1}
    with pytest.raises(ValueError, match="leads out of the folder"):
        Manifest.model_validate({"version": 1, "files": [entry]})


def test_a_wrong_secret_is_refused(connect, folder, monkeypatch):
    """By the server, and told with the variable to correct; the secret itself is not told."""
    uri = connect().uri
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    message = refused(lambda: Store(uri).push(folder, NAME))

    assert "correct AWS_SECRET_ACCESS_KEY" in message
    assert "mistaken" not in message


def test_a_missing_bucket_is_told(connect, folder):
    """With its address."""
    store = connect(uri="s3://no-such-bucket/here")

    assert "no-such-bucket/here: there is no such bucket" in refused(lambda: store.push(folder, NAME))


@pytest.mark.usefixtures("credentials")
def test_no_server_is_told(folder, monkeypatch):
    """After a few tries, in one line."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = Store("s3://bucket")

    assert "http://127.0.0.1:9" in refused(lambda: store.push(folder, NAME))


def test_bursts_of_503_are_outlasted(connect, folder, content, tmp_path):
    """The first connections are all answered Slow Down."""
    store = connect(lambda n: ("busy", 0, "up") if n <= 3 else None)
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


def test_connections_that_break_are_opened_again(connect, folder, content, tmp_path):
    """Every third one ends after a mebibyte, up and down."""
    store = connect(lambda n: ("cut", 2**20, "up" if n % 2 else "down") if n % 3 == 0 else None)
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


def test_a_slow_network_is_only_slow(connect, folder, content, tmp_path):
    """Ten milliseconds for every 64 KiB."""
    store = connect(lambda _: ("slow", 0.01, "up"))
    store.push(folder, NAME)
    connect().pull(NAME, tmp_path / "back")

    assert content(tmp_path / "back") == content(folder)


def test_what_is_garbled_on_the_way_up_is_refused_by_the_server(connect, folder, content, tmp_path):
    """One bit of every upload: nothing wrong is stored, and there is no manifest of it."""
    store = connect(lambda _: ("garble", 500_000, "up"))
    refused(lambda: store.push(folder, NAME))

    assert connect().names() == []
    store = connect()
    store.push(folder, NAME)
    store.pull(NAME, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_what_is_garbled_on_the_way_down_is_noticed(connect, folder, tmp_path):
    """By its hash; nothing is left behind."""
    connect().push(folder, NAME)
    store = connect(lambda _: ("garble", 500_000, "down"))

    assert "expected" in refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_deleted_object_is_told_and_nothing_is_half_there(connect, folder, tmp_path):
    """With the file that is missing."""
    store = connect()
    store.push(folder, NAME)
    store.client.delete_object(Bucket=store.bucket, Key=stored(store)[1])

    refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("body", ['{"version": 1, "fil', "", '{"version": 2, "files": []}'])
def test_a_damaged_manifest_is_told(connect, folder, tmp_path, body):
    """Truncated, empty, or of another version."""
    store = connect()
    store.push(folder, NAME)
    store.client.put_object(Bucket=store.bucket, Key=stored(store)[0], Body=body.encode())

    assert f"the manifest {NAME}" in refused(lambda: store.pull(NAME, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_server_killed_in_the_middle_loses_nothing(connect, swift, folder, content, tmp_path, way):
    """It ends in one line and no half state; with the server back, the same call goes through."""
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


def test_a_full_disk_is_told(connect, folder, tmp_path):
    """The place for the download is too small."""
    connect().push(folder, NAME)
    (tmp_path / "small").mkdir()
    uri = connect().uri
    code = (
        f"from stages.storage import Store; from pathlib import Path; Store({uri!r}).pull({NAME!r}, Path('small/back'))"
    )
    mount = f'mount -t tmpfs -o size=8m tmpfs small && {sys.executable} -c "{code}" 2>&1 | tail -1; ls -A small'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"this machine lets nobody mount: {result.stderr.strip()}")

    assert "No space left on device; free some space" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1, result.stdout


def test_memory_is_bounded(connect, tmp_path):
    """300 MiB go up and down in a process that never holds more than a fraction of them."""
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "weights").open("wb") as file:
        for index in range(300):
            file.write(bytes([index % 251]) * 2**20)
    uri = connect().uri
    code = (
        "import resource; from pathlib import Path; from stages.storage import Store; import boto3.s3.transfer\n"
        f"store = Store({uri!r}); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store.push(Path('large'), 'large'); store.pull('large', Path('back'))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert float(result.stdout.split()[-1]) < 150
    assert (tmp_path / "back" / "weights").stat().st_size == 300 * 2**20


def test_no_pickle_and_no_secret_is_stored(connect, folder):
    """Objects are the files themselves, manifests are JSON."""
    store = connect()
    store.push(folder, NAME)
    key = f"some/prefix/manifests/{NAME}.json"
    manifest = json.loads(store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read())

    assert set(manifest) == {"version", "files"}
    assert "testing" not in json.dumps(manifest)
