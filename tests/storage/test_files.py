"""Folders between the stages."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from stages.data.images import RowSelection, evenly_spaced, read_images, write_images
from stages.models.saliency import read_importance, write_importance
from stages.runtime.errors import InputError
from stages.storage.files import check_free, read_json, write_json, writing
from stages.storage.provenance import fingerprint, read_provenance, write_provenance, write_run_record
from stages.storage.tensors import read_tensors, tensors_sha256, write_tensors


def test_a_folder_appears_whole(tmp_path):
    """What was there before is replaced at the end, not before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()

    with writing(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert (tmp_path / "out" / "run.json").exists()

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    """A model folder, a file or the top of a project given as output by mistake is refused and stays as it was."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()

    for place in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors", tmp_path):
        with pytest.raises(InputError, match="holds something that no stage has written"):
            check_free(place)
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_outputs_never_overlap_with_inputs_or_each_other(tmp_path):
    """Equal, inside or around: each would destroy one of the two."""
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
def test_arrays_that_are_no_images_are_refused(tmp_path, images, array):
    """Another type, another number of dimensions, or none at all."""
    write_images(tmp_path, images, {})
    np.save(tmp_path / "heldout.npy", array)

    with pytest.raises(InputError, match="holds no packed images"):
        read_images(tmp_path)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    """Neither the folder nor its temporary one is left, and what was there before stays."""
    (tmp_path / "out").mkdir()

    def fail():
        with writing(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path):
    """On a file system of 64 KiB, writing 1 MiB fails with words and leaves nothing."""
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
        pytest.skip(f"this machine lets nobody mount: {result.stderr.strip()}")

    message, left = result.stdout.splitlines()
    assert "No space left on device; free some space" in message
    assert left == "[]"


def test_tensors_come_back_bit_for_bit(tmp_path):
    """And equal tensors make equal files, in whatever order they are given."""
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5)}
    write_tensors(tmp_path / "one.safetensors", tensors)
    write_tensors(tmp_path / "two.safetensors", dict(reversed(tensors.items())))

    found = read_tensors(tmp_path / "one.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("size", [0, 7, 100, 200])
def test_a_truncated_tensor_file_is_refused(tmp_path, size):
    """At whichever byte it was cut."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.randn(64)})
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(InputError, match="is not a whole safetensors file"):
        read_tensors(path)


def test_what_is_missing_is_named(tmp_path):
    """Each reader says which file it lacks."""
    for read in (read_tensors, read_json, read_images, read_importance):
        with pytest.raises(InputError, match=str(tmp_path / "nothing")):
            read(tmp_path / "nothing")


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[1]", "holds a list")])
def test_what_is_no_json_object_is_refused(tmp_path, text, words):
    """Damaged JSON and JSON of another kind."""
    (tmp_path / "a.json").write_text(text)

    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "a.json")


def test_images_come_back(tmp_path, images):
    """Memory-mapped, equal, and with what is known of them beside."""
    write_images(tmp_path, images, {"source": "here"})

    found = read_images(tmp_path)
    assert isinstance(found.train, np.memmap)
    assert np.array_equal(found.train, images.train)
    assert np.array_equal(found.heldout, images.heldout)
    assert read_json(tmp_path / "dataset.json") == {"heldout": 8, "shape": [1, 8, 8], "source": "here", "train": 24}


def test_importance_comes_back(tmp_path, magnitude):
    """With every field."""
    write_importance(tmp_path, magnitude)

    found = read_importance(tmp_path)
    assert tensors_sha256(found.saliency) == tensors_sha256(magnitude.saliency)
    assert {**vars(found), "saliency": None} == {**vars(magnitude), "saliency": None}


def test_the_hash_of_tensors_sees_names_types_shapes_and_values():
    """And not how they are stored."""
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
    assert set(record) == {"stage", "params", "code_sha256", "python", "packages"}
    assert (tmp_path / "run.json").read_bytes() == first


def test_a_stage_replaces_only_what_it_has_written(tmp_path, params):
    """Samples are not written over a model because somebody mistook one folder for the other."""
    write_run_record(tmp_path / "out", "finetune", seed=params.seed, finetune=params.finetune)

    check_free(tmp_path / "out", stage="finetune")
    with pytest.raises(InputError, match="was written by the stage finetune; give reference another place"):
        check_free(tmp_path / "out", stage="reference")


def test_a_loop_of_links_is_refused(tmp_path):
    """In words."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(InputError, match="choose another place"):
        check_free(tmp_path / "loop", inputs=[tmp_path / "in"])


def test_a_fingerprint_sees_params_and_inputs(tmp_path, params):
    """A checkpoint belongs to exactly one of them."""
    write_json(tmp_path / "in" / "a.json", {"a": 1})
    inputs, section = [tmp_path / "in"], params.finetune
    before = fingerprint("finetune", inputs, seed=0, finetune=section)

    assert fingerprint("finetune", inputs, seed=0, finetune=section) == before
    assert fingerprint("finetune", inputs, seed=1, finetune=section) != before
    assert fingerprint("finetune", inputs, seed=0, finetune=section.model_copy(update={"steps": 1})) != before
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
    assert found["seconds"] > 0
    write_run_record(out, "prune", prune=params.prune.model_copy(update={"round_to": 8}))
    assert read_provenance(out) is None


def test_of_many_images_some_are_taken_from_all_of_them():
    """Evenly spaced and each once; all where no fewer are wanted."""
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 5).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]


def test_chosen_images_are_read_as_an_array_is():
    """One, a slice, and their number and shape."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 2, 2)).astype(np.uint8)
    rows = evenly_spaced(10, 4)
    chosen = RowSelection(pixels, rows)

    assert (len(chosen), chosen.shape) == (4, (4, 1, 2, 2))
    assert np.array_equal(chosen[1], pixels[3])
    assert np.array_equal(chosen[1:], pixels[rows][1:])
