"""What trainings left behind in a store and on disk: what may go, and what must stay."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from ruamel.yaml import YAML

from stages.finetune.checkpoint import TRAINING, Checkpoint, Checkpoints
from stages.grid.__main__ import main as grid
from stages.importance.folders import CHECKPOINTS as IMPORTANCE
from stages.rounds.params import read_params
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.storage.in_use import hold_folder
from stages.storage.s3_contents import StoreContents
from stages.tools.leftovers import (
    CELLS,
    CURRENT,
    IN_USE,
    ROUNDS,
    SUMS,
    UNKNOWN,
    YOUNG,
    Needed,
    current_trainings,
    find_cells,
    find_checkpoints,
    find_in_store,
    find_sums,
    held_trainings,
    measure,
    training_key,
)
from tests.repository import make_repository

RUN, OTHER = "a" * 64, "b" * 64
HOUR = timedelta(hours=1)
PUSH = """
import sys
from pathlib import Path
from stages.storage.s3 import Store
Store(sys.argv[1]).push(Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def current(params):
    """The training of the default params, as it is recorded."""
    return {"seed": params.seed, "finetune": params.finetune.model_dump(mode="json")}


@pytest.fixture
def given_up(current):
    """The training of other params."""
    return {**current, "finetune": {**current["finetune"], "steps": 7}}


@pytest.fixture
def checkout(tmp_path, root):
    """A checkout with the default params."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    return folder


@pytest.fixture
def small(tmp_path):
    """A folder with two small files."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("a.json", "weights.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def needed(checkout):
    """What must stay, where everything that exists is old."""
    return Needed(current_trainings(checkout), datetime.now(UTC) + HOUR)


def train(checkout, run, training, store=None, steps=(2, 4, 6)):
    """Save the checkpoints of a training that was stopped."""
    checkpoints = Checkpoints(checkout / "checkpoints/finetune", run, store)
    checkpoints.lock = checkpoints.hold(training)
    for step in steps:
        checkpoints.save(Checkpoint(step, {"weight": torch.full((4,), float(step))}, [], []))
        checkpoints.wait()
    return checkpoints


def stop(checkpoints):
    """End the process of a training."""
    checkpoints.lock.close()


def put(store, key, body=b"x"):
    """Upload one object."""
    store.client.put_object(Bucket=store.bucket, Key=key, Body=body)


def test_only_given_up_trainings_leave_the_disk(checkout, current, given_up, needed):
    """One that runs stays, one of the current params, and one whose params nobody recorded."""
    for digit, training in (("a", current), ("b", given_up), ("d", {})):
        stop(train(checkout, digit * 64, training))
    running = train(checkout, "c" * 64, given_up)
    found = {it.name[-1]: it for it in find_checkpoints(checkout, needed)}

    assert {name: it.reason_to_keep for name, it in found.items()} == {
        "a": CURRENT, "b": None, "c": IN_USE, "d": UNKNOWN,
    }  # fmt: skip
    folder = checkout / found["b"].name
    assert found["b"].size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [found[name].remove() for name in "bc"] == [True, False]  # a run that began meanwhile is seen, too
    assert not folder.exists()
    assert held_trainings(checkout) == {"c" * 16}
    stop(running)


def test_a_sum_that_stopped_half_way_leaves_the_disk_when_it_is_old(checkout, needed):
    """One that is written to stays; the folder is the one of the stage importance."""
    path = checkout / SUMS / f"{'a' * 16}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1234")
    (young,) = find_sums(checkout, Needed(needed.trainings, datetime.now(UTC) - HOUR))
    (old,) = find_sums(checkout, Needed(needed.trainings, datetime.now(UTC) + HOUR))

    assert SUMS == IMPORTANCE
    assert (young.reason_to_keep, old.reason_to_keep, old.size_bytes) == (YOUNG, None, 4)
    assert old.remove()
    assert not path.exists()


def test_old_cells_of_grids_can_go_unless_one_is_drawn(checkout, needed):
    """The lock of a grid keeps all cells, also those that it has drawn long ago; a stopped cell is hidden."""
    for name in ("a" * 16, f".{'b' * 16}.xyz"):
        (checkout / CELLS / name).mkdir(parents=True)
        (checkout / CELLS / name / "samples.npy").write_bytes(b"1234")
    late = Needed(needed.trainings, datetime.now(UTC) + HOUR)
    with hold_folder(checkout / CELLS):
        held = list(find_cells(checkout, late))
        assert not held[0].remove()
    (young, _) = find_cells(checkout, Needed(needed.trainings, datetime.now(UTC) - HOUR))
    old = list(find_cells(checkout, late))

    assert next(option.default for option in grid.params if option.name == "store") == CELLS
    assert [it.reason_to_keep for it in (*held, young, *old)] == [IN_USE, IN_USE, YOUNG, None, None]
    assert [it.remove() for it in old] == [True, True]
    assert [path.name for path in (checkout / CELLS).iterdir()] == ["lock"]


def test_what_is_younger_stays(checkout, given_up, needed):
    """By the time of the last write."""
    stop(train(checkout, RUN, given_up))
    (found,) = find_checkpoints(checkout, Needed(needed.trainings, datetime.now(UTC) - HOUR))

    assert found.reason_to_keep == YOUNG
    for path in (checkout / found.name).iterdir():
        os.utime(path, (1, 1))
    os.utime(checkout / found.name, (1, 1))
    (found,) = find_checkpoints(checkout, Needed(needed.trainings, datetime.now(UTC) - HOUR))
    assert (found.reason_to_keep, found.modified.year) == (None, 1970)


def test_finished_rounds_are_kept_for_the_training_after_them(checkout):
    """Those of the current params stay, those of others may go."""
    tree = YAML(typ="safe").load((checkout / "params.yaml").read_text()) | {"rounds": {"count": 3, "steps": 20}}
    (checkout / "params.yaml").write_text(json.dumps(tree))
    params = read_params(checkout / "params.yaml")
    other = replace(params, seed=params.seed + 1)
    for name, each in (("a", params), ("b", other)):
        write_json(checkout / ROUNDS / (name * 16) / TRAINING, each.last_training())
    needed = Needed(current_trainings(checkout), datetime.now(UTC) + HOUR)
    found = {leftover.name: leftover.reason_to_keep for leftover in find_checkpoints(checkout, needed)}

    assert found == {f"{ROUNDS}/{'a' * 16}": CURRENT, f"{ROUNDS}/{'b' * 16}": None}


def test_checkpoints_of_rounds_are_kept_in_the_store(connect, checkout):
    """A machine may be lost in any round; each training has a seed and steps of its own."""
    tree = YAML(typ="safe").load((checkout / "params.yaml").read_text()) | {"rounds": {"count": 3, "steps": 20}}
    (checkout / "params.yaml").write_text(json.dumps(tree))
    params, store = read_params(checkout / "params.yaml"), connect()
    folder, running = checkout / ROUNDS / ("a" * 16) / "round-2", []
    for run, given in ((RUN, params), (OTHER, replace(params, seed=params.seed + 1))):
        *_, (_, tree) = zip(range(2), given.trees([given.prune.target] * 2), strict=True)
        checkpoints = Checkpoints(folder / "checkpoints", run, store)
        checkpoints.lock = checkpoints.hold({key: tree[key] for key in ("seed", "finetune")})
        checkpoints.save(Checkpoint(1, {"weight": torch.ones(4)}, [], []))
        checkpoints.wait()
        running.append(checkpoints)
    needed = Needed(current_trainings(checkout), datetime.now(UTC) + HOUR)
    contents = StoreContents(store.uri, "ESPALIER_STORE")

    found = {it.name: it.reason_to_keep for it in find_in_store(contents, needed, held_trainings(checkout))}
    assert found == {RUN[:16]: IN_USE, OTHER[:16]: IN_USE}
    for checkpoints in running:
        stop(checkpoints)
    found = {it.name: it.reason_to_keep for it in find_in_store(contents, needed, held_trainings(checkout))}
    assert found == {RUN[:16]: CURRENT, OTHER[:16]: None}


@pytest.mark.parametrize("name", ["params.yaml", "dvc.lock", "committed"])
def test_the_params_that_count_are_those_of_the_file_the_lock_and_the_commit(checkout, given_up, name):
    """Whoever goes back to them resumes."""
    changed = YAML(typ="safe").load((checkout / "params.yaml").read_text())
    changed["finetune"]["steps"] = 7
    locked = {"stages": {"finetune": {"params": {"params.yaml": given_up}}}}
    with (checkout / ("dvc.lock" if name == "dvc.lock" else "params.yaml")).open("w") as file:
        YAML(typ="safe").dump(locked if name == "dvc.lock" else changed, file)
    if name == "committed":
        make_repository(checkout)
        (checkout / "params.yaml").unlink()

    assert training_key(given_up) in current_trainings(checkout)


def test_invalid_params_end_the_search(checkout):
    """It is unknown what they need."""
    (checkout / "params.yaml").write_text("finetune: {steps: many}")
    with pytest.raises(InputError):
        current_trainings(checkout)


def test_only_what_nothing_needs_leaves_the_store(connect, small, checkout, current, given_up, needed, tmp_path):
    """Versions, files of other programs, current and running trainings stay, and can be read as before."""
    store, contents = connect(), StoreContents(connect().uri)
    store.push(small, "models/digits/1")
    for run, training in ((RUN, current), (OTHER, given_up), ("c" * 64, given_up)):
        stop(train(checkout, run, training, store))
    store.push(small, f"checkpoints/{'d' * 64}/step-00000001")  # of an unknown training, which shares its files
    incomplete, foreign = hashlib.sha256(b"half").hexdigest(), store._key("objects/files/md5/aa/bb")
    put(store, store._object(incomplete), b"half")
    put(store, foreign)
    put(store, "outside/objects/aa/" + "a" * 64)
    begun = store.client.create_multipart_upload(Bucket=store.bucket, Key=store._object("f" * 64))
    part = {"Bucket": store.bucket, "Key": store._object("f" * 64), "UploadId": begun["UploadId"], "PartNumber": 1}
    store.client.upload_part(**part, Body=b"y" * 100)
    before = set(store.names())

    found = list(find_in_store(contents, needed, held={"c" * 16}))
    removable = {it.name: it for it in found if it.reason_to_keep is None}
    kept = {it.name[0]: it.reason_to_keep for it in found if it.reason_to_keep}

    assert {name: it.kind for name, it in removable.items()} == {
        OTHER[:16]: "stored checkpoints", incomplete[:12]: "incomplete upload", "f" * 12: "incomplete upload",
    }  # fmt: skip
    assert kept == {"a": CURRENT, "c": IN_USE, "d": UNKNOWN}
    assert (removable[incomplete[:12]].size_bytes, removable["f" * 12].size_bytes) == (4, 100)
    assert all(it.remove() for it in removable.values())
    assert set(store.names()) == {name for name in before if OTHER not in name}
    again = list(find_in_store(contents, needed, held={"c" * 16}))
    assert [it for it in again if it.reason_to_keep is None] == []
    assert foreign in store._keys(store._key(""))
    store.pull("models/digits/1", tmp_path / "version")
    assert Checkpoints(tmp_path / "second", RUN, connect()).newest().step == 6


def test_objects_of_other_programs_are_never_listed(connect, needed):
    """Their keys begin as those of the store's files do, of whole objects and of unfinished uploads."""
    store, contents = connect(), StoreContents(connect().uri)
    other = store._object("a" * 64) + ".index"
    put(store, other)
    store.client.create_multipart_upload(Bucket=store.bucket, Key=other)

    assert (contents.objects(), contents.unfinished_uploads()) == ({}, [])
    assert list(find_in_store(contents, needed, set())) == []


def test_an_upload_is_as_young_as_its_last_part(connect):
    """One of many gigabytes may have begun days ago."""
    store = connect()
    key = store._object("f" * 64)
    begun = store.client.create_multipart_upload(Bucket=store.bucket, Key=key)
    time.sleep(1.1)  # the store counts whole seconds
    part = {"Bucket": store.bucket, "Key": key, "UploadId": begun["UploadId"], "PartNumber": 1}
    store.client.upload_part(**part, Body=b"y")
    (listed,) = store.client.list_parts(Bucket=store.bucket, Key=key, UploadId=begun["UploadId"])["Parts"]
    (uploads,) = store.client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    (found,) = StoreContents(store.uri).unfinished_uploads()

    assert found.item.modified == listed["LastModified"] > uploads["Initiated"]


@pytest.mark.parametrize("body", [b"{", b"[" * 1000, b"[]"])
def test_a_damaged_note_leaves_the_params_unknown(connect, small, needed, body):
    """The checkpoints stay, and the search goes on."""
    store = connect()
    store.push(small, f"checkpoints/{RUN}/step-00000001")
    put(store, store._key(f"notes/checkpoints/{RUN}.json"), body)
    (found,) = find_in_store(StoreContents(store.uri), needed, set())

    assert found.reason_to_keep == UNKNOWN


def test_a_file_that_gets_a_manifest_meanwhile_stays(connect, small, needed, tmp_path):
    """The manifests are read once more before the first file is removed."""
    store, contents = connect(), StoreContents(connect().uri)
    manifest = store.push(small, "models/digits/1")
    store.delete([store._key("manifests/models/digits/1.json")])
    found = list(find_in_store(contents, needed, set()))
    store.push(small, "models/digits/2")

    assert len(found) == len({entry.sha256 for entry in manifest.files})
    assert not any(it.remove() for it in found)
    store.pull("models/digits/2", tmp_path / "version")


def test_a_damaged_manifest_ends_the_search(connect, small, needed):
    """The files that it names are unknown, so none is taken for incomplete."""
    store = connect()
    store.push(small, "models/digits/1")
    put(store, store._key("manifests/models/digits/1.json"), b"{")

    with pytest.raises(InputError, match=r"the manifest models/digits/1 .* is damaged"):
        list(find_in_store(StoreContents(store.uri), needed, set()))


def test_a_running_training_elsewhere_keeps_its_old_copies(connect, checkout, given_up, needed):
    """Its note is written anew when it starts, before its first upload."""
    store = connect()
    stop(train(checkout, RUN, given_up, store))
    time.sleep(1.1)  # the store counts whole seconds
    (old,) = find_in_store(StoreContents(store.uri), needed, set())
    between = Needed(needed.trainings, datetime.now(UTC))
    (found,) = find_in_store(StoreContents(store.uri), between, set())
    assert (old.reason_to_keep, found.reason_to_keep) == (None, None)
    time.sleep(1.1)
    stop(train(checkout, RUN, given_up, store, steps=()))

    (found,) = find_in_store(StoreContents(store.uri), between, set())
    assert found.reason_to_keep == YOUNG


@pytest.mark.e2e  # the rule is above
def test_a_killed_upload_leaves_nothing_that_is_not_found(connect, folder, needed, root):
    """Kill -9 during a part: its parts are listed with their size and removed, and the next push succeeds."""
    store, contents = connect(), StoreContents(connect().uri)
    slow = connect(lambda _: ("slow", 0.02, "up"))  # for the process that starts now
    command = [sys.executable, "-c", PUSH, slow.uri, str(folder), f"checkpoints/{RUN}/step-00000002"]
    process = subprocess.Popen(command, cwd=root)
    while not any(upload.item.size_bytes for upload in contents.unfinished_uploads()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = list(find_in_store(contents, needed, set()))

    assert {it.kind for it in found} == {"incomplete upload"}
    assert max(it.size_bytes for it in found) >= 2 * 2**20  # the last part, the smallest
    assert all(it.remove() for it in found)
    assert (contents.unfinished_uploads(), contents.objects()) == ([], {})
    store.push(folder, f"checkpoints/{RUN}/step-00000002")
    assert contents.names() == [f"checkpoints/{RUN}/step-00000002"]


def test_what_vanishes_before_it_is_measured_has_no_size(tmp_path):
    """A run that ends meanwhile removes its workspace: that is no error, and nothing is older than what is gone."""
    size_bytes, modified = measure(tmp_path / "gone")

    assert size_bytes == 0
    assert datetime.now(UTC) - HOUR < modified <= datetime.now(UTC)
