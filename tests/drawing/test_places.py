"""Places: files are whole, a claim excludes other workers and ends with its owner; progress, and the run in MLflow."""

import errno
import fcntl
import itertools
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from stages.drawing import many
from stages.drawing.finished import find_finished, write_manifest
from stages.drawing.labels import Labels
from stages.drawing.worker import draw_pending, load_drawer
from stages.runtime.errors import InputError
from stages.storage import places, s3_place
from stages.storage.places import open_place
from stages.tracking.draws import EXPERIMENT, TAG, DrawRun
from tests.orchestra import until
from tests.swift import answer

HOLD = """
import sys
from pathlib import Path
from stages.storage.places import FolderPlace
with FolderPlace(Path(sys.argv[1])).claim("shard-00000") as is_own:
    print(is_own, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    """An empty folder, or the part of a bucket of a real server."""
    if request.param == "folder":
        return open_place(str(tmp_path / "out"), "--out")
    store = request.getfixturevalue("connect")()
    return open_place(f"{store.uri}/drawn", "--out")


def test_a_file_is_created_once_and_replaced_whole(place):
    """The second creation does nothing; names are those of the files."""
    assert (place.sizes(), place.read("a")) == ({}, None)
    assert [place.create(".job/a", b"one"), place.create(".job/a", b"two")] == [True, False]
    place.write("b", b"three")

    assert place.read(".job/a") == b"one"
    assert place.sizes() == {".job/a": 3, "b": 5}
    assert place.sha256("b").startswith("8b5b9db0")
    place.remove("b")
    assert place.read("b") is None


def test_a_killed_process_loses_its_claim(tmp_path):
    """While it lives, nobody else has the name; another name is free."""
    place = open_place(str(tmp_path), "--out")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], **pipes) as other:
        assert other.stdout.readline() == b"True\n"
        with place.claim("shard-00000") as is_own, place.claim("shard-00001") as other_is_own:
            assert (is_own, other_is_own) == (False, True)
        other.kill()
        other.wait()
    with place.claim("shard-00000") as is_own:
        assert is_own


def others_find(folder):
    """Whether another process gets the claim."""
    command = [sys.executable, "-c", HOLD, folder]
    return subprocess.run(command, input=b"", capture_output=True, check=True).stdout == b"True\n"


def test_the_end_of_one_claim_ends_no_other(tmp_path):
    """A process that closes a file loses all of its locks there; each claim ends by itself."""
    place = open_place(str(tmp_path), "--out")
    with place.claim("shard-00000"):
        with place.claim("shard-00001"):
            pass
        assert not others_find(tmp_path)
    assert others_find(tmp_path)


def test_a_created_file_leaves_no_other(tmp_path):
    """Whether it was there before or not."""
    place = open_place(str(tmp_path), "--out")
    for _ in range(2):
        place.create("a", b"one")

    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("address", ["", "http://host/x", "gs://bucket/x"])
def test_an_address_that_is_no_place_is_refused(address):
    """An empty one would be the current folder."""
    with pytest.raises(InputError, match=r"^--out '.*': give a folder or s3://BUCKET/PREFIX$"):
        open_place(address, "--out")


@pytest.mark.parametrize(
    ("code", "is_held"), [(errno.ENOLCK, False), (errno.EIO, False), (errno.EAGAIN, True), (errno.EACCES, True)]
)
def test_a_folder_without_locks_is_one_line(make, source, tmp_path, monkeypatch, code, is_held):
    """A worker that took it for another's claim would wait for ever; two errors do mean a claim."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    place = open_place(str(tmp_path), "--out")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    if is_held:
        with place.claim("shard-00000") as is_own:
            assert not is_own
        return
    job = make()
    found = f"cannot lock {tmp_path}/.job/claims: {os.strerror(code)}; choose a folder on a file system that has locks"
    with pytest.raises(InputError, match=found):
        draw_pending(load_drawer(job, source.folder, Labels()), place, job.shards(), lambda *_: None)


def test_a_claim_in_a_bucket_lapses(connect, monkeypatch):
    """Two machines: the second gets the name once the first gave it back, or did not renew it for long."""
    uri = connect().uri
    one, two = (open_place(uri, "--out") for _ in range(2))
    with one.claim("shard-00000") as is_own, two.claim("shard-00000") as other_is_own:
        assert (is_own, other_is_own) == (True, False)
    with two.claim("shard-00000") as is_own:
        assert is_own
    first = ExitStack()
    assert first.enter_context(one.claim("shard-00000"))
    monkeypatch.setattr(s3_place, "LAPSE_S", -10.0)
    with two.claim("shard-00000") as is_own:
        assert is_own
        monkeypatch.setattr(s3_place, "LAPSE_S", 120.0)
        first.close()
        with one.claim("shard-00000") as is_own_again:  # the second one's claim outlives the end of the first
            assert not is_own_again


def test_a_creation_whose_answer_was_lost_is_this_ones(connect):
    """Its second attempt finds what the first one wrote."""
    store = connect(lambda number: ("cut", 30, "down") if number == 1 else None)  # after 100 Continue
    place = open_place(store.uri, "--out")

    assert place.create("a", b"one")
    assert place.read("a") == b"one"


def test_a_lapsed_claim_is_taken_by_one(connect, monkeypatch):
    """Of two workers that find it lapsed at the same moment, on a server that compares the claim with what was found.

    Swift does not, so its answer is given in its place.
    """
    monkeypatch.setattr(s3_place, "LAPSE_S", -10.0)
    place = open_place(connect().uri, "--out")
    place.write(".job/claims/shard-00000", b"another")
    found = place.client.head_object(Bucket=place.bucket, Key=place._key(".job/claims/shard-00000"))["ETag"]
    answer(place.client, 412, "PreconditionFailed", lambda request: found in str(request.headers.get("If-Match")))
    with place.claim("shard-00000") as is_own:
        assert not is_own
    assert place.read(".job/claims/shard-00000") == b"another"


def test_a_store_without_conditional_writes_replaces_no_file(connect):
    """Where it is there already; without it, it is written."""
    place = open_place(connect().uri, "--out")
    answer(place.client, 501, "NotImplemented", lambda request: "If-None-Match" in request.headers)

    assert [place.create("a", b"one"), place.create("a", b"two")] == [True, False]
    assert place.read("a") == b"one"


def test_an_outage_does_not_end_the_renewal(connect, monkeypatch):
    """The next attempt may succeed before the claim lapses."""
    monkeypatch.setattr(s3_place, "BEAT_S", 0.05)
    place, written, number = open_place(connect().uri, "--out"), [], itertools.count(1)
    write = place.write
    monkeypatch.setattr(place, "write", lambda *arguments: (write(*arguments), written.append(arguments)))
    answer(place.client, 400, "Refused", lambda request: request.method == "GET" and next(number) <= 2)
    with place.claim("shard-00000"):
        assert until(lambda: len(written) > 1, 20)


def take_over(place, write):
    """Write the claim as another worker; false where the owner was just renewing it."""
    write(".job/claims/shard-00000", b"another")
    time.sleep(0.3)
    return place.read(".job/claims/shard-00000") == b"another"


def test_a_claim_in_a_bucket_is_renewed(connect, monkeypatch):
    """While its owner works; not once another worker has it."""
    monkeypatch.setattr(s3_place, "BEAT_S", 0.05)
    place, written = open_place(connect().uri, "--out"), []
    write = place.write
    monkeypatch.setattr(place, "write", lambda *arguments: (write(*arguments), written.append(arguments)))
    with place.claim("shard-00000"):
        assert until(lambda: len(written) > 2, 20)
        assert until(lambda: take_over(place, write), 20)
        count = len(written)
        time.sleep(0.5)
        assert len(written) == count
    assert place.read(".job/claims/shard-00000") == b"another"


def test_a_job_is_drawn_into_a_bucket(connect, make, draw, source, tmp_path):
    """Its shards are those of a folder; a damaged one is found by its size, and by its hash where that is wanted."""
    uri = f"{connect().uri}/drawn"
    job, place, _ = draw(uri)
    assert write_manifest(place, job)
    draw(tmp_path / "out")
    name = "shard-00001.parquet"
    assert place.read(name) == (tmp_path / "out" / name).read_bytes()

    place.write(name, bytes(len(place.read(name))))
    assert sorted(find_finished(place, job)) == [0, 1, 2]
    with pytest.raises(InputError, match=r"drawn/shard-00001\.parquet is damaged: it has sha256"):
        find_finished(place, job, only_check=True)
    place.write(name, b"short")
    with pytest.raises(InputError, match=r"is damaged: it has 5 bytes"):
        find_finished(place, job)
    other = make(of=source, steps=4)
    with pytest.raises(InputError, match=r"holds another job: sampler\.steps is 2 there, 4 here"):
        draw_pending(load_drawer(other, source.folder, Labels()), place, [], lambda *_: None)


def test_a_bucket_that_does_not_exist_is_one_line(connect, make):
    """Before anything is drawn."""
    connect()
    with pytest.raises(InputError, match="s3://no-such-bucket/x: there is no such bucket; create it"):
        find_finished(open_place("s3://no-such-bucket/x", "--out"), make())


def test_an_image_counts_once(make, monkeypatch):
    """Whether its worker is killed and another draws it anew, or several workers report it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = make()
    progress = many.Progress(job, job.numbers(), [2])
    lost, found = (
        [("batch", 0, 4), ("ready", 0, 0)],
        [("batch", 0, 8), ("done", 0, 8), ("found", 0, 8), ("found", 2, 4)],
    )
    reports = [*lost, *found, ("batch", 1, 4), ("done", 1, 8), ("found", 1, 8)]

    assert len(list(progress._images(iter(reports), DrawRun(job.id, "x", {})))) == 16
    assert (progress.before, progress.counted, progress.total, progress.drawn) == (4, 20, 20, 16)


@pytest.mark.parametrize(("finished", "is_complete"), [((0, 1, 2), True), ((0, 1), False)])
def test_workers_that_were_killed(make, monkeypatch, capsys, finished, is_complete):
    """Where others drew in the place of one, a warning says so; where all ended before the last shard, one line."""
    monkeypatch.setattr(DrawRun, "log", lambda *_: None)
    job = make()
    reports = [("ready", 0, 0), *(("done", number, len(job.shard(number).seeds)) for number in finished)]
    pool = SimpleNamespace(killed=["killed by signal 9"], reports=lambda: iter(reports), close=lambda: None)
    progress = many.Progress(job, job.numbers(), [])
    if is_complete:
        progress.follow(pool, "x", DrawRun(job.id, "x", {}))
        assert "Warning: 1 worker killed by signal 9; others drew in its place\n" in capsys.readouterr().err
        return
    with pytest.raises(InputError, match=r"^all workers have ended before the last shard \(one killed by signal 9\)"):
        progress.follow(pool, "x", DrawRun(job.id, "x", {}))


def test_mlflow_has_one_run_of_a_job(mlflow_database):
    """A call that goes on continues it; it has images, images per second, and the manifest."""
    client = MlflowClient(mlflow_database)
    for status, manifest in (("KILLED", None), ("FINISHED", b'{"num_images": 20}')):
        run = DrawRun("e" * 64, "tiny 0:20", {"batch_size": 4})
        run.log(20, 3.5)
        run.close(status, manifest)
    (found,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])

    assert (found.info.status, found.info.run_name, found.data.tags[TAG]) == ("FINISHED", "tiny 0:20", "e" * 64)
    assert (found.data.params, found.data.metrics) == ({"batch_size": "4"}, {"images": 20.0, "images_per_s": 3.5})
    assert [it.path for it in client.list_artifacts(found.info.run_id)] == ["manifest.json"]


def test_a_server_that_fails_costs_a_warning(monkeypatch, capsys):
    """One line, and the drawing goes on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = DrawRun("e" * 64, "tiny", {})
    run.log(1, 1.0)
    run.close("FINISHED")

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: MLflow does not show this job")


def test_a_file_that_another_process_removes_meanwhile_is_not_listed(tmp_path, monkeypatch):
    """Between the list of the names and the look at their sizes."""
    (tmp_path / "stays").write_bytes(b"four")
    names = {tmp_path: ["gone", "stays"]}
    monkeypatch.setattr(places, "_files", lambda folder: [folder / name for name in names.get(folder, [])])

    assert places.FolderPlace(tmp_path).sizes() == {"stays": 4}
