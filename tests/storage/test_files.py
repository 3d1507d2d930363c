"""Atomic writes, checked reads and run records."""

import errno
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.data.images import RowSelection, evenly_spaced, read_images, write_images
from stages.models.saliency import read_importance, write_importance
from stages.runtime.code_hash import hash_code
from stages.runtime.errors import InputError
from stages.storage import provenance
from stages.storage.files import (
    check_free,
    copy_file,
    make_private,
    read_json,
    write_atomically,
    write_json,
    writing,
)
from stages.storage.provenance import fingerprint, write_provenance, write_run_record
from stages.storage.run_record import read_provenance
from stages.storage.tensors import read_array, read_tensors, tensors_sha256, write_tensors
from tests.repository import make_repository


def test_a_folder_is_replaced_at_the_end(tmp_path):
    """The old folder stays while the new one is written, then the new one replaces it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()

    with writing(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert (tmp_path / "out" / "run.json").exists()

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_everybody_may_read_an_output(tmp_path):
    """The temporary folder is its owner's alone until it is complete."""
    with writing(tmp_path / "out") as folder:
        assert folder.stat().st_mode & 0o077 == 0

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    """The old folder had been moved away before the new one could not take its place."""
    write_json(tmp_path / "out" / "run.json", {})
    rename = Path.rename

    def refuse_new(path, target):
        if (path / "new").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    def work():
        with writing(tmp_path / "out") as folder:
            (folder / "new").touch()

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(InputError, match=r"cannot write .*/out: Input/output error"):
        work()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "run.json"]


def test_what_a_process_that_was_killed_while_it_replaced_a_folder_left_is_in_nobodys_way(tmp_path):
    """The folder that it had moved away goes before the next one is moved there."""
    write_json(tmp_path / "out" / "run.json", {})
    write_json(tmp_path / ".given.old" / "left.json", {})
    with writing(tmp_path / "out", tmp_path / ".given") as folder:
        (folder / "new").touch()

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out"]


def test_a_temporary_folder_of_a_given_name_begins_empty(tmp_path):
    """Processes that were killed have left files in it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "left").touch()
    with writing(tmp_path / "out", tmp_path / "shared") as folder:
        (folder / "new").touch()

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path):
    """A folder stands in its place."""
    (tmp_path / "file").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*/file: "):
        write_atomically(tmp_path / "file", b"content")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_folder_is_made_private(tmp_path):
    """As a new one is."""
    (tmp_path / "old").mkdir(mode=0o755)
    for name in ("old", "new"):
        make_private(tmp_path / name)

        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


def test_a_copy_of_what_is_missing_names_the_source(tmp_path):
    """Room on the disk and another folder would not help."""
    with pytest.raises(InputError, match=r"cannot read .*/source: No such file or directory; complete the folder"):
        copy_file(tmp_path / "source", tmp_path / "target")
    (tmp_path / "source").touch()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*/file/target: "):
        copy_file(tmp_path / "source", tmp_path / "file" / "target")


def test_files_that_no_stage_wrote_are_never_replaced(tmp_path):
    """A model folder, a file or the top of a project that is given as output by mistake is refused and not changed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()

    for place in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors", tmp_path):
        with pytest.raises(InputError, match="holds files that no stage wrote"):
            check_free(place)
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_outputs_that_overlap_with_inputs_or_each_other_are_refused(tmp_path):
    """An output equal to, inside or around another folder would destroy one of the two."""
    model, out = tmp_path / "model", tmp_path / "out"

    for folders, inputs in [
        ([model], [model]),
        ([model / "x"], [model]),
        ([tmp_path], [model]),
        ([out, out / "x"], []),
    ]:
        with pytest.raises(InputError, match="overlaps with"):
            check_free(*folders, inputs=inputs)
    check_free(out, tmp_path / "report", inputs=[model])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 1, 8, 8), np.float32), np.zeros(5, np.uint8), np.zeros((0, 1, 8, 8), np.uint8)]
)
def test_arrays_that_are_not_images_are_refused(tmp_path, images, array):
    """Arrays of another type, another number of dimensions or without images are refused."""
    write_images(tmp_path, images, {})
    np.save(tmp_path / "heldout.npy", array)

    with pytest.raises(InputError, match="holds no packed images"):
        read_images(tmp_path)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    """A failed write leaves neither the folder nor its temporary one, and the old folder stays."""
    (tmp_path / "out").mkdir()

    def fail():
        with writing(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, number, is_full):
    """Libraries write pictures and copies; any other error of theirs stays what it is."""

    def fail():
        with writing(tmp_path / "out"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(InputError if is_full else OSError, match="free some space" if is_full else os.strerror(number)):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_full_disk_is_named_by_what_was_written_there(tmp_path, is_inside):
    """A path of the temporary folder means nothing to the user; one on another disk does."""
    elsewhere = "/elsewhere/cache"

    def fail():
        with writing(tmp_path / "out") as folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "file") if is_inside else elsewhere)

    with pytest.raises(InputError, match=f"^cannot write {tmp_path / 'out' if is_inside else elsewhere}: "):
        fail()


def test_an_output_that_one_may_not_enter_is_refused(tmp_path, monkeypatch):
    """In one line; the tests may run as root, who may enter all."""

    def refuse(_path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match="out: Permission denied"):
        check_free(tmp_path / "out")


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path):
    """Writing 1 MiB to a file system of 64 KiB fails with a clear error and leaves no file."""
    code = (
        "import torch; from pathlib import Path; from stages.runtime.errors import InputError\n"
        "from stages.storage.files import writing; from stages.storage.tensors import write_tensors\n"
        "try:\n"
        f"  with writing(Path({str(tmp_path)!r}) / 'out') as folder:\n"
        "    write_tensors(folder / 'a.safetensors', {'a': torch.zeros(1 << 18)})\n"
        "except InputError as error: print(error.message)\n"
        f"print(list(Path({str(tmp_path)!r}).rglob('*')))\n"
    )
    mount = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec {sys.executable} -c "$CODE"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    result = subprocess.run(command, env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"mounting is not permitted on this machine: {result.stderr.strip()}")

    message, left = result.stdout.splitlines()
    assert "No space left on device; free some space" in message
    assert left == "[]"


def test_tensors_are_read_as_they_were_written(tmp_path):
    """Tensors keep every bit, and equal tensors give equal files, whatever their order."""
    tensors = {"b": torch.randn(3, 4).T, "a": torch.arange(5)}
    write_tensors(tmp_path / "one.safetensors", tensors)
    write_tensors(tmp_path / "two.safetensors", dict(reversed(tensors.items())))

    found = read_tensors(tmp_path / "one.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_several_arrays_in_one_file_are_refused(tmp_path):
    """As numpy's own archives hold them."""
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))

    with pytest.raises(ValueError, match="several arrays in one file"):
        read_array(tmp_path / "two.npz")


@pytest.mark.parametrize("size", [0, 7, 100, 200])
def test_a_truncated_tensor_file_is_refused(tmp_path, size):
    """A file that was cut at any byte is refused."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.randn(64)})
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(InputError, match="is not a whole safetensors file"):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    """The error of each reader contains the path of the missing file."""
    for read in (read_tensors, read_json, read_images, read_importance):
        with pytest.raises(InputError, match=str(tmp_path / "nothing")):
            read(tmp_path / "nothing")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "holds a list")])
def test_a_file_without_a_json_object_is_refused(tmp_path, text, message):
    """Damaged JSON and JSON of another type are refused."""
    (tmp_path / "a.json").write_text(text)

    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json")


def test_images_are_read_as_they_were_written(tmp_path, images):
    """Images are memory-mapped and equal, and dataset.json describes them."""
    write_images(tmp_path, images, {"source": "test"})

    found = read_images(tmp_path)
    assert isinstance(found.train, np.memmap)
    assert np.array_equal(found.train, images.train)
    assert np.array_equal(found.heldout, images.heldout)
    assert read_json(tmp_path / "dataset.json") == {"heldout": 8, "shape": [1, 8, 8], "source": "test", "train": 24}


def test_importance_is_read_as_it_was_written(tmp_path, magnitude):
    """Every field is equal."""
    write_importance(tmp_path, magnitude)

    found = read_importance(tmp_path)
    assert tensors_sha256(found.saliency) == tensors_sha256(magnitude.saliency)
    assert {**vars(found), "saliency": None} == {**vars(magnitude), "saliency": None}


def test_the_hash_of_tensors_depends_on_names_types_shapes_and_values():
    """The hash does not depend on the memory layout."""
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).int()},
        {"a": torch.ones(2, 3)},
    ]

    assert tensors_sha256(base) == tensors_sha256({"a": torch.zeros(3, 2).T})
    assert len({tensors_sha256(tensors) for tensors in [base, *others]}) == 5


def test_a_run_record_explains_the_folder(tmp_path, params):
    """run.json holds what decides an output and nothing that varies: a second run writes the same bytes."""
    write_run_record(tmp_path, "prune", seed=params.seed, prune=params.prune)
    first = (tmp_path / "run.json").read_bytes()
    write_run_record(tmp_path, "prune", seed=params.seed, prune=params.prune)

    record = json.loads(first)
    assert record["params"] == {"seed": 0, "prune": params.prune.model_dump(mode="json")}
    assert record["params"]["prune"]["target"]["ratio"] == 0.3
    assert set(record) == {"stage", "params", "python", "packages"}
    assert record["packages"] == {name: version(name) for name in provenance.PACKAGES}
    assert (tmp_path / "run.json").read_bytes() == first


def test_what_came_into_an_output_meanwhile_is_kept(tmp_path):
    """The work before the replacement may take hours."""

    def work():
        with writing(tmp_path / "out") as folder:
            (folder / "result").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine.txt").touch()

    with pytest.raises(InputError, match="holds files that no stage wrote"):
        work()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_stage_replaces_only_its_own_output(tmp_path, params):
    """An output folder that another stage wrote is refused, so a mistaken path destroys no model."""
    write_run_record(tmp_path / "out", "finetune", seed=params.seed, finetune=params.finetune)

    check_free(tmp_path / "out", stage="finetune")
    with pytest.raises(InputError, match="was written by finetune; give reference another folder"):
        check_free(tmp_path / "out", stage="reference")


def test_a_circle_of_links_is_refused(tmp_path):
    """The error says what to change."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(InputError, match="choose another folder"):
        check_free(tmp_path / "loop", inputs=[tmp_path / "in"])


def test_a_fingerprint_depends_on_params_and_inputs(tmp_path, params):
    """A checkpoint belongs to exactly one fingerprint."""
    write_json(tmp_path / "in" / "a.json", {"a": 1})
    inputs, section = [tmp_path / "in"], params.finetune
    before = fingerprint("finetune", inputs, seed=0, finetune=section)

    assert fingerprint("finetune", inputs, seed=0, finetune=section) == before
    assert fingerprint("finetune", inputs, seed=1, finetune=section) != before
    assert fingerprint("finetune", inputs, seed=0, finetune=section.model_copy(update={"steps": 1})) != before
    assert fingerprint("prune", inputs, seed=0, finetune=section) != before  # by other code
    write_json(tmp_path / "in" / "run.json", {"a": 1})  # which a stage's input has of another run with equal outcome
    assert fingerprint("finetune", inputs, seed=0, finetune=section) == before
    write_json(tmp_path / "in" / "a.json", {"a": 2})
    assert fingerprint("finetune", inputs, seed=0, finetune=section) != before


def test_threads_decide_a_training_on_the_cpu_alone(tmp_path, params, monkeypatch):
    """Another number of threads sums in another order there; a GPU does not care."""

    def prints():
        found = []
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(fingerprint("finetune", [tmp_path], finetune=params.finetune))
        return len(set(found))

    assert prints() == 2
    before = fingerprint("finetune", [tmp_path], finetune=params.finetune)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")  # as do other kernels
    assert fingerprint("finetune", [tmp_path], finetune=params.finetune) != before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert prints() == 1


def test_provenance_stands_beside_the_output(tmp_path, params):
    """Commit, device and times are in a file beside the folder, and belong to one run.json."""
    out = tmp_path / "out"
    write_run_record(out, "prune", prune=params.prune)
    before = sorted(path.name for path in out.iterdir())
    write_provenance(out, cost={"steps": 3})

    found = read_provenance(out)
    assert sorted(path.name for path in out.iterdir()) == before
    assert found["device"]["threads"] == torch.get_num_threads()
    assert found["cost"] == {"steps": 3}
    assert found["code_sha256"] == hash_code("prune")
    assert found["seconds"] > 0
    (out / "weights").write_text("of another commit")
    write_provenance(out)
    (out / "weights").unlink()  # as DVC brings back what an earlier commit wrote by equal params
    assert read_provenance(out) is None
    write_provenance(out)
    write_run_record(out, "prune", prune=params.prune.model_copy(update={"round_to": 8}))
    assert read_provenance(out) is None


def test_provenance_tells_whether_the_code_was_committed(tmp_path, params, monkeypatch):
    """A change beside the code counts for nothing."""
    code = tmp_path / "project" / "stages"
    code.mkdir(parents=True)
    (code / "a.py").touch()
    commit = make_repository(code.parent)
    monkeypatch.setattr(provenance, "STAGES", code)
    write_run_record(tmp_path / "out", "prune", prune=params.prune)
    found = []
    for changed in (code.parent / "notes.txt", code / "b.py"):
        changed.touch()
        write_provenance(tmp_path / "out")
        found.append(read_provenance(tmp_path / "out"))

    assert [(it["git_commit"], it["git_dirty"]) for it in found] == [(commit, False), (commit, True)]


def test_a_subset_of_images_is_evenly_spaced():
    """Each index occurs once; a limit of None or above the number of images gives all."""
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 5).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]


def test_selected_images_are_read_like_an_array():
    """A selection supports len, shape, an index and a slice."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 2, 2)).astype(np.uint8)
    rows = evenly_spaced(10, 4)
    selection = RowSelection(pixels, rows)

    assert (len(selection), selection.shape) == (4, (4, 1, 2, 2))
    assert np.array_equal(selection[1], pixels[3])
    assert np.array_equal(selection[1:], pixels[rows][1:])


def test_an_output_behind_a_missing_folder_destroys_nothing(tmp_path, monkeypatch):
    """A path such as missing/../mine seems not to exist until missing does, and would then replace mine."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("a note")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)

    for path in ("missing/../mine", "missing/../new", "there/../missing/../mine"):
        with pytest.raises(InputError, match="missing does not exist; write the path without"), writing(Path(path)):
            pytest.fail("it began to write")
    with writing(Path("there/../new")) as folder:
        write_json(folder / "run.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new", "there"]
    assert (tmp_path / "mine" / "note.txt").read_text() == "a note"
