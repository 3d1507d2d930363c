"""What is said of work that was done again."""

import shutil
import subprocess

import pytest

from stages.register.lineage import FILES, Lineage, hash_outputs
from stages.register.registry import EVIDENCE, MODEL
from stages.register.reproduce import Reproduction, Value, _clone, _compare, _empty
from stages.runtime.errors import InputError, without_password
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors
from stages.tracking.compression import stage_folders

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROVENANCE = {"device": {"name": "cpu", "threads": 2}}
MACHINE = {"python": "3.11", "packages": {"torch": "2"}, "provenance": PROVENANCE}


@pytest.fixture
def again(package, tmp_path):
    """A workspace in which the same came out, and what compares it with the version."""
    place = tmp_path / "again"
    for name in ("finetuned", "released/finetuned"):
        shutil.copytree(package / MODEL, place / "artifacts" / name)
    folders = stage_folders(place / "artifacts", place / "reports")
    shutil.copytree(package / EVIDENCE / "evaluation", folders["evaluate"])
    for home in folders.values():
        write_json(home / "run.json", MACHINE)
    lineage = Lineage(
        git_commit="c" * 40,
        git_remote=None,
        files=dict.fromkeys(FILES, "e" * 64),
        data_sha256="d" * 64,
        outputs=hash_outputs(place),
        runs=dict.fromkeys(folders, MACHINE),
        dvc_remotes=[],
    )
    return place, lambda: _compare("models:/tiny/1", package, lineage, place)


def nudge(place, amount):
    """Change one weight of the model that came out."""
    for name in ("finetuned", "released/finetuned"):
        tensors = read_tensors(place / "artifacts" / name / WEIGHTS)
        tensors["conv_in.bias"] = tensors["conv_in.bias"] + amount
        write_tensors(place / "artifacts" / name / WEIGHTS, tensors)


def remeasure(place, fid):
    """Let the model have another mean FID."""
    path = place / "reports" / "evaluate" / "evaluation.json"
    told = read_json(path)
    told["models"]["finetuned"]["fid"]["mean"] = fid
    write_json(path, told)


def test_the_same_files_and_numbers_are_identical(again):
    """Hash by hash."""
    found = again[1]()

    assert (found.verdict, found.files, found.machine) == ("identical", [], [])
    assert found.num_files == 7


def test_other_weights_with_metrics_within_their_intervals_are_equal(again):
    """It says which tensors are off, and by how much."""
    place, compare = again
    nudge(place, 0.5)
    remeasure(place, 1.05)
    found = compare()

    assert found.verdict == "equal within tolerance"
    assert [file.path for file in found.files] == [
        f"artifacts/{it}/{WEIGHTS}" for it in ("finetuned", "released/finetuned")
    ]
    assert found.files[1].what == "1 of 144 tensors, most conv_in.bias by 0.5"


def test_a_metric_beyond_its_interval_is_different(again):
    """And it says which."""
    place, compare = again
    remeasure(place, 2.0)
    found = compare()

    assert found.verdict == "different"
    assert [value.name for value in found.metrics if not value.is_equal] == ["fid"]


def test_without_an_interval_only_the_same_number_is_equal():
    """One set allows nothing."""
    verdicts = [Reproduction("x", 1, [], [Value("fid", 1.0, now, 0)]).verdict for now in (1.0, 1.0 + 1e-9)]

    assert verdicts == ["identical", "different"]


def test_a_file_that_was_not_made_is_named(again):
    """And so is another machine."""
    place, compare = again
    (place / "artifacts" / "finetuned" / "pruning_plan.json").unlink()
    write_json(place / "artifacts" / "pruned" / "run.json", {**MACHINE, "packages": {"torch": "3"}})
    found = compare()

    assert [(file.path, file.what) for file in found.files] == [("artifacts/finetuned/pruning_plan.json", "not made")]
    assert found.verdict == "different"
    assert found.machine == ["torch 2, now 3"]


def test_other_data_or_code_is_different(again, protocol):
    """Its numbers do not compare."""
    place, compare = again
    path = place / "reports" / "evaluate" / "evaluation.json"
    other = protocol.model_copy(update={"sets": 3, "real_sha256": "e" * 64})
    write_json(path, {**read_json(path), "protocol": other.model_dump(mode="json"), "protocol_id": other.id})

    found = compare()
    assert found.verdict == "different"
    assert found.hindrance.startswith(f"the protocol came out as {other.id}, not as ")


def test_another_plan_is_different_whatever_the_metrics_say(again):
    """So are other tensors: only the values of the same numbers may be equal within tolerance."""
    place, compare = again
    for name in ("finetuned", "released/finetuned"):
        write_json(place / "artifacts" / name / "pruning_plan.json", {"kept": [1]})
    assert compare().verdict == "different"

    tensors = read_tensors(place / "artifacts" / "released" / "finetuned" / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:1]
    write_tensors(place / "artifacts" / "released" / "finetuned" / WEIGHTS, tensors)
    assert "other tensors" in [file.what for file in compare().files]


def test_a_commit_that_is_nowhere_is_one_line(tmp_path):
    """With what git said; an address is never taken for an option, and nothing runs."""
    lineage = Lineage(
        git_commit="c" * 40,
        git_remote="--upload-pack=touch pwned",
        files=dict.fromkeys(FILES, "e" * 64),
        data_sha256="d" * 64,
        outputs={},
        runs={},
        dvc_remotes=[],
    )
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True)
    for source in (str(tmp_path / "other"), None, "ext::touch pwned", str(tmp_path / "nothing")):
        with pytest.raises(
            InputError, match=r"^commit cccccccccccc cannot be had from [^\n]*; name another with --repository$"
        ):
            _clone(lineage, source, tmp_path / f"place-{source is None}-{len(source or '')}")
    assert not list(tmp_path.rglob("pwned"))


def test_work_is_done_in_an_empty_place_only(tmp_path):
    """Never over somebody's files."""
    (tmp_path / "mine").write_text("")

    with pytest.raises(InputError, match="is not empty"):
        _empty(tmp_path)


def test_addresses_lose_their_password():
    """And nothing else."""
    for password in ("secret", "a@b", "p%40"):
        assert without_password(f"https://me:{password}@host/path") == "https://host/path"
    assert without_password("git@host:path") == "git@host:path"
    two = [f"{kind}://me:{'x' * 9}@host" for kind in ("postgresql", "http")]
    assert without_password(" and ".join(two)) == "postgresql://host and http://host"
