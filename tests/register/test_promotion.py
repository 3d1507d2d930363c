"""The gate, the aliases and the ledger."""

import base64
import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from pydantic import ValidationError
from ruamel.yaml import YAML

from flows.__main__ import main
from stages.models.sampling import draw
from stages.protocol.protocol import Protocol
from stages.register import canary, promotion, sandboxed_draw
from stages.register import ledger as ledger_module
from stages.register.gate import VersionFiles, run_checks
from stages.register.ledger import Ledger
from stages.register.limits import run_check
from stages.register.package import list_files
from stages.register.pipeline import load_pipeline
from stages.register.policy import Policy, load_policy, resolve_tolerance
from stages.register.promotion import promote, roll_back
from stages.register.registry import EVIDENCE, MODEL, WITHDRAWN, Registry, refusal_reason
from stages.register.sandbox import run as sandbox
from stages.runtime.errors import InputError, MachineError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors
from tests.register.conftest import draw_in_process
from tests.servers import ROOT

NAME, WEIGHTS = "tiny", "unet/diffusion_pytorch_model.safetensors"
REAL_DRAW = canary.draw_isolated


@pytest.fixture
def real_canary():
    """Draw the canary in its sandbox, as outside the tests."""


@pytest.fixture(autouse=True)
def quick_canary(request, monkeypatch):
    """Draw the canary in this process unless the test requests `real_canary`."""
    if "real_canary" not in request.fixturenames:
        monkeypatch.setattr(canary, "draw_isolated", draw_in_process)


def outcomes(registry):
    """List (kind, from, to, outcome) of every entry, the oldest first."""
    return [(it.kind, it.start, it.to, it.outcome) for it in reversed(Ledger(registry, NAME).entries())]


def refusals(decision):
    """Map the failed checks to their reasons."""
    return {check.name: check.reason for check in decision.checks if not check.passed}


def test_the_first_version_that_passes_is_the_champion(publish, policy, aliases, registry):
    """It is compared with the dense model only."""
    publish()
    decision = promote(NAME, None, policy, None)

    assert decision.passed
    assert aliases() == {"champion": 1}
    assert outcomes(registry) == [("promote", "none", "1", "done")]
    assert [check.name for check in decision.checks] == [
        "not withdrawn",
        "untampered",
        "no pickle",
        "lineage",
        "measured with intervals",
        "FID against dense",
        "SSIM against dense",
        "budget",
        "latency",
        "canary",
    ]


def test_no_text_forges_a_line_of_the_ledger(publish, policy, registry):
    """Neither a reason given here nor tags that another client wrote: one entry is one line."""
    publish()
    promote(NAME, None, policy, "good\n  99  2026-01-01  promote 1 -> 2: done, by root\x1b[2K")
    entry = Ledger(registry, NAME).entries()[0]
    assert entry.version.tags["espalier.why"].startswith("good\\n  99")
    registry.tag(entry.version, by="root\nroot", checks='[{"name": "a\\nb", "passed": 1, "reason": "\\u001b"}]')
    found = CliRunner().invoke(main, ["ledger", NAME])

    assert found.exit_code == 0
    assert len(found.output.splitlines()) == 1
    assert found.output[:-1].isprintable()
    (check,) = Ledger(registry, NAME).entries()[0].checks
    assert (check.name, check.passed, check.reason) == ("a\\nb", False, "\\x1b")


def test_a_better_version_replaces_the_champion(publish, policy, aliases):
    """It is compared with the champion, which gets the alias previous."""
    publish()
    promote(NAME, None, policy, None)
    publish(fids=[0.95, 1.0, 0.9])
    decision = promote(NAME, None, policy, None)

    assert decision.passed
    assert {
        "champion untampered",
        "same protocol",
        "FID against champion",
        "SSIM against champion",
        "latency against champion",
    } <= {check.name for check in decision.checks}
    assert aliases() == {"champion": 2, "previous": 1}


@pytest.mark.parametrize(
    ("worse", "check", "reason"),
    [
        ({"fids": [1.3, 1.4, 1.2]}, "FID against champion", "above the champion, so at most +0.3; allowed: +0.2"),
        ({"fids": [1.0, 1.4, 0.8]}, "FID against champion", "+0.0667 ± 0.52 above the champion"),
        ({"ssims": [0.92, 0.93, 0.91]}, "SSIM against champion", "so at least -0.03; allowed: -0.02"),
        ({"ssims": [0.80, 0.90, 0.70]}, "SSIM against dense", "above 1, so at least"),
        ({"fids": [1.6, 1.7, 1.5]}, "FID against dense", "above the dense model, so at most +0.7; allowed: +0.5"),
        ({"macs": 80}, "budget", "80.0% of the dense model's MACs; allowed: 70.0%"),
        ({"costs": {"speed_up": 1.04}}, "latency", "1.04 times as fast as dense, at least 0.99; allowed: 1.00 or more"),
        ({"costs": {"speed_up": 1.06}}, "latency against champion", "the champion 1.20; allowed: 1.08 or more"),
        ({"costs": {"device": "another"}}, "latency against champion", "measured on another, the champion's on cpu"),
        (
            {"costs": {"deterministic": True}},
            "latency against champion",
            "measured with deterministic kernels, the champion's with kernels chosen for speed; measure both",
        ),
        ({"changes": {"seed": 9}}, "same protocol", "seed is 3 and 9; measure both under one protocol"),
        ({"dense": "b"}, "same protocol", "different dense models"),
    ],
)
def test_a_worse_version_is_refused_with_its_reason(publish, policy, aliases, registry, worse, check, reason):
    """The worse end of the interval counts; no alias changes, and ledger and tags hold the reason."""
    publish()
    promote(NAME, None, policy, None)
    publish(**worse)
    decision = promote(NAME, None, policy, None)

    assert not decision.passed
    assert reason in refusals(decision)[check]
    assert aliases() == {"champion": 1, "challenger": 2}
    entry = Ledger(registry, NAME).entries()[0]
    assert (entry.outcome, entry.start, entry.to) == ("refused", "1", "2")
    assert reason in entry.why
    version = registry.find(f"models:/{NAME}/2")
    assert version.tags["espalier.gate"] == "refused"
    assert reason in refusal_reason(version)
    assert "canary" not in [check.name for check in decision.checks]


def run_gate(policy, candidate, champion, /, **tolerances):
    """Run the checks under a policy with these tolerances of FID to dense, champion or dense: name -> check."""
    blocks = {key: getattr(policy, key).model_copy(update={"fid_dense": it}) for key, it in tolerances.items()}
    files = [VersionFiles(it.name, Path(it.source), it.tags) for it in (candidate, champion)]
    return {check.name: check for check in run_checks(*files, policy.model_copy(update=blocks))}


def test_fid_to_dense_is_checked_where_the_policy_has_a_tolerance(publish, policy):
    """The upper end of its interval, and of the difference from the champion's, paired by set; null checks neither."""
    champion, candidate = publish(fids_dense=[0.04, 0.05, 0.06]), publish(fids_dense=[0.05, 0.06, 0.07])
    unchecked = run_gate(policy, candidate, champion, dense=None, champion=None)
    accepted = run_gate(policy, candidate, champion, dense=0.09, champion=0.011)
    refused = run_gate(policy, candidate, champion, dense=0.08, champion=0.009)
    names = ("FID to dense", "FID to dense against champion")

    assert unchecked["canary"].passed
    assert not set(names) & unchecked.keys()
    assert all(accepted[name].passed for name in (*names, "canary"))
    assert not any(refused[name].passed for name in names)
    assert refused[names[0]].reason == "+0.06 ± 0.025 above 0, so at most +0.0848; allowed: +0.08"
    assert refused[names[1]].reason.endswith("above the champion's, so at most +0.01; allowed: +0.009")


def with_fid(policy, dense):
    """Give a policy another tolerance of FID against the dense model."""
    given = {"dense": {"fid": dense, "ssim": 0.15}, "champion": {"fid": 0.2, "ssim": 0.02, "speed_up": 0.1}}
    return Policy.model_validate(policy.model_dump() | given)


@pytest.mark.parametrize(
    ("fid", "floor", "passed", "allowed"),
    [
        ("20%", 0.4, True, "+0.18, 20% of the dense model's FID (0.9)"),
        ("19.5 %", 0.4, True, "+0.176, 19.5% of the dense model's FID (0.9)"),
        ("10%", 0.4, False, "+0.09, 10% of the dense model's FID (0.9)"),
        ("10%", 2.0, True, "+0.2, 10% of the FID of one half of the real images against the other (2)"),
        (0.18, 0.4, True, "+0.18"),
        (1, 0.4, True, "+1, 111% of the dense model's FID (0.9)"),
    ],
)
def test_a_tolerance_of_fid_is_a_share_of_what_the_data_allow(publish, policy, fid, floor, passed, allowed):
    """The dense model's FID or the floor, the larger one; an absolute tolerance above both says so."""

    def change(folder):
        path = folder / EVIDENCE / "evaluation" / "evaluation.json"
        write_json(path, {**read_json(path), "floor_fid": floor})

    candidate = publish(change, fids=[1.07, 1.17, 0.97])
    files = VersionFiles(candidate.name, Path(candidate.source), candidate.tags)
    checks = {it.name: it for it in run_checks(files, None, with_fid(policy, fid))}

    assert checks["FID against dense"].passed == passed
    assert checks["FID against dense"].reason.endswith(f"allowed: {allowed}")


def test_a_tolerance_of_fid_to_dense_is_a_share_of_its_floor(publish, policy):
    """Without that floor, only a number can be given."""
    versions = [publish(fids_dense=[0.05] * 3) for _ in range(2)]
    failed = run_gate(policy, *versions, dense="10%", champion="10%")

    for name in ("FID to dense", "FID to dense against champion"):
        assert failed[name].reason == (
            "the policy allows 10% of the floor of FID to dense, which was not measured; give a FID as a number"
        )


@pytest.mark.parametrize("fid", ["much", "-5%", "%", -1, "inf", "50 % of it", True, None])
def test_a_tolerance_of_fid_is_a_share_or_a_number(policy, fid):
    """Anything else is refused, with what is allowed; a number in quotes is one, as before."""
    with pytest.raises(ValidationError, match=r"give a share such as 50%|number|string|switches"):
        with_fid(policy, fid)
    assert with_fid(policy, "0.5").dense.fid == 0.5


def test_the_policy_of_the_project_depends_on_the_dense_model():
    """More than half of the dense model's FID is too much, whatever data and extractor are."""
    policy = load_policy(ROOT / "mlflow" / "promotion.yaml")

    for scale in (0.37, 4.19, 60.0):
        assert resolve_tolerance(policy.dense.fid, scale) <= 0.5 * scale
        assert resolve_tolerance(policy.champion.fid, scale) < resolve_tolerance(policy.dense.fid, scale)


@pytest.mark.parametrize(
    ("key", "measured", "whose"),
    [("dense", [], "this version's"), ("champion", [], "this version's"), ("champion", [0], "the champion's")],
)
def test_a_tolerance_refuses_an_evaluation_from_before_fid_to_dense(publish, policy, key, measured, whose):
    """Nothing stands in for the missing number; the reason says what to do."""
    versions = [publish(fids_dense=[0.1] * 3 if index in measured else None) for index in range(2)]
    failed = [it for it in run_gate(policy, *versions, **{key: 10.0}).values() if not it.passed]

    assert [it.name for it in failed] == ["FID to dense" + " against champion" * (key == "champion")]
    assert failed[0].reason == (
        f"{whose} evaluation is from before fid_dense was measured; register it again from a new evaluation, "
        f"or set fid_dense to null in the policy"
    )


def test_a_refused_version_that_passes_later_is_not_refused(publish, policy, registry):
    """The tags hold the latest decision; before the first one there is none."""
    publish(macs=80)
    undecided = registry.find(f"models:/{NAME}/1")
    promote(NAME, None, policy, None)
    refused = registry.find(f"models:/{NAME}/1")
    relaxed = policy.model_copy(update={"budget": policy.budget.model_copy(update={"macs": 0.9})})
    promote(NAME, None, relaxed, None)
    passed = registry.find(f"models:/{NAME}/1")

    assert refusal_reason(undecided) is None
    assert refusal_reason(refused) == "budget: 80.0% of the dense model's MACs; allowed: 70.0%"
    assert refusal_reason(passed) is None
    assert passed.tags["espalier.gate"] == "passed"


def test_a_version_without_intervals_is_refused(publish, policy, edit):
    """One set has no interval."""

    def draw_one_set(folder):
        path = folder / EVIDENCE / "evaluation" / "evaluation.json"
        record = read_json(path)
        record["protocol"]["sets"] = 1
        record["protocol_id"] = Protocol.model_validate(record["protocol"]).id
        for model in record["models"].values():
            for metric in (it for it in model.values() if isinstance(it, dict) and "sets" in it):
                metric.update(sets=metric["sets"][:1], half_width=None)
        edit(path, **record)

    publish(draw_one_set)

    assert (
        "have no intervals: one set was drawn" in refusals(promote(NAME, None, policy, None))["measured with intervals"]
    )


@pytest.mark.parametrize("how", ["weights", "added", "removed", "list", "evaluation"])
def test_a_version_that_was_tampered_with_is_refused(publish, policy, how):
    """A file was changed, added or removed, or files.json was rewritten to match."""
    folder = Path(publish().source)
    if how in ("weights", "list"):
        tensors = read_tensors(folder / MODEL / WEIGHTS)
        write_tensors(folder / MODEL / WEIGHTS, {**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1})
    if how == "list":
        (folder / "files.json").unlink()
        write_json(folder / "files.json", list_files(folder).model_dump(mode="json"))
    if how == "added":
        (folder / MODEL / "more.pkl").write_bytes(b"\x80\x04.")
    if how == "removed":
        (folder / EVIDENCE / "sampler.json").unlink()
    if how == "evaluation":
        path = folder / EVIDENCE / "evaluation" / "evaluation.json"
        path.write_text(path.read_text().replace("0.95", "0.99"))

    decision = promote(NAME, None, policy, None)
    assert "tampered with" in refusals(decision)["untampered"]
    assert [check.name for check in decision.checks] == ["not withdrawn", "untampered", "no pickle"]


def test_the_same_compression_makes_the_same_version(package, package_again, content):
    """Byte for byte, without time, path or random id; a repeated upload therefore replaces an interrupted one."""
    assert content(package) == content(package_again)


def test_compiled_python_is_not_tampering(publish, policy):
    """A version in a local store is loaded in place, and Python writes __pycache__ beside its code."""
    folder = Path(publish().source)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "draw.cpython-311.pyc").write_bytes(b"compiled")

    assert promote(NAME, None, policy, None).passed


def test_a_version_without_lineage_is_refused(publish, policy, edit):
    """So is one whose lineage belongs to other weights or is damaged."""
    publish(lambda folder: (folder / EVIDENCE / "lineage.json").unlink())
    assert "no lineage" in refusals(promote(NAME, None, policy, None))["lineage"]

    outputs = {f"artifacts/finetuned/{name}": "0" * 64 for name in (WEIGHTS, "pruning_plan.json")}
    publish(lambda folder: edit(folder / EVIDENCE / "lineage.json", outputs=outputs))
    assert "another unet/" in refusals(promote(NAME, None, policy, None))["lineage"]

    publish(lambda folder: edit(folder / EVIDENCE / "lineage.json", git_commit="today"))
    assert "damaged (git_commit:" in refusals(promote(NAME, None, policy, None))["lineage"]


def test_a_version_registered_by_hand_is_refused(registry, publish, policy):
    """It has no files.json with hashes."""
    source = publish().source
    version = registry.create(NAME, source, None, {}, "")

    decision = promote(NAME, f"models:/{NAME}/{version.version}", policy, None)
    assert "not registered by Espalier" in refusals(decision)["untampered"]


@pytest.mark.usefixtures("real_canary")
@pytest.mark.e2e  # test_sandbox draws
def test_a_version_that_draws_other_images_is_refused(publish, policy):
    """The canary fails although every other check passes; so it does for code that raises an exception."""

    def repaint(folder):
        path = folder / "draw.py"
        path.write_text(path.read_text().replace("(images.cpu() + 1) * 127.5", "(images.cpu() + 1.5) * 127.5"))

    publish(repaint)
    assert "levels; allowed: 1" in refusals(promote(NAME, None, policy, None))["canary"]

    publish(lambda folder: (folder / "draw.py").write_text("raise RuntimeError('no GPU left')"))
    assert "Error: no GPU left" in refusals(promote(NAME, None, policy, None))["canary"]


def test_pictures_that_were_drawn_before_are_refused(publish, policy, registry):
    """Code cannot keep the right ones ready, since the seeds are drawn at each decision; the ledger holds them."""

    def keep_pictures(folder):
        (folder / "kept.txt").write_text("".join(sandboxed_draw.draw(str(folder), range(4))))
        kept = "Path(__file__).with_name('kept.txt').read_text().split()[1::2][seed % 4]"
        path = folder / "draw.py"
        path.write_text(path.read_text().replace("_to_base64(image)}", f"{kept}}}"))

    publish(keep_pictures)
    reason = refusals(promote(NAME, None, policy, None))["canary"]
    assert re.match(r"4 images from the seeds (\d+, ){3}\d+, off by [\d.]+ levels; allowed: 1$", reason)
    assert reason in Ledger(registry, NAME).entries()[0].why


def claim_size(png, side):
    """Write another width and height into the header of a PNG."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


@pytest.mark.parametrize("png", [b"no picture", b"\x89PNG\r\n\x1a\n", "blank", "wide", "huge"])
def test_an_invalid_picture_is_refused(publish, policy, monkeypatch, png):
    """It is never decoded to more than the size of the model's images."""
    if isinstance(png, str):
        buffer = io.BytesIO()
        Image.new("L", (16 if png == "wide" else 8, 8), 77).save(buffer, "PNG")
        png = claim_size(buffer.getvalue(), 60000) if png == "huge" else buffer.getvalue()
    publish()
    monkeypatch.setattr(canary, "draw_isolated", lambda _, seeds, __: dict.fromkeys(seeds, png))

    (reason,) = refusals(promote(NAME, None, policy, None)).values()
    assert re.search("image of the canary is invalid|gives a blank image|of another size or kind than 8 x 8", reason)


def copy_to_a_full_disk(*_):
    """Copy a program as the sandbox does, to a device that is always full."""
    shutil.copyfile(__file__, "/dev/full")


@contextmanager
def without_free_files():
    """Let this process open no more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_too_many_files(*_):
    """Open more files than this process may."""
    with without_free_files():
        write_json(Path("one-more.json"), {})


def read_too_many_weights(*_):
    """Open more files of weights than this process may, of which safetensors says that they do not exist."""
    write_tensors(Path("one-more.safetensors"), {"a": torch.zeros(1)})
    with without_free_files():
        read_tensors(Path("one-more.safetensors"))


def start_nothing(folder, seeds, *_):
    """Draw on a machine that allows no isolation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "ISOLATIONS", ())
        return REAL_DRAW(folder, seeds)


FAULTS = [
    (copy_to_a_full_disk, "this machine failed ([Errno 28] No space left on device"),
    (open_too_many_files, "this machine failed ([Errno 24] Too many open files"),
    (read_too_many_weights, "this machine failed ([Errno 24] Too many open files"),
    (start_nothing, "this machine cannot start the code of a version (no isolation is allowed)"),
]


@pytest.mark.parametrize(("fail", "message"), FAULTS)
def test_a_fault_of_the_machine_refuses_no_version(publish, policy, aliases, registry, monkeypatch, fail, message):
    """The promotion ends in one line and records nothing, so that it can be repeated once the fault is mended."""
    publish()
    with monkeypatch.context() as patch:
        patch.setattr(canary, "draw_isolated", fail)
        result = CliRunner().invoke(main, ["promote", NAME, "--policy", str(ROOT / "mlflow/promotion.yaml")])
        with pytest.raises(MachineError) as error:
            promote(NAME, None, policy, None)

    assert error.value.message.startswith(message)
    assert ", so nothing was decided or changed; " in error.value.message
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert aliases() == {"challenger": 1}
    assert outcomes(registry) == []
    assert "espalier.gate" not in registry.find(f"models:/{NAME}/1").tags
    assert promote(NAME, None, policy, None).passed


def test_a_fault_of_the_machine_rolls_nothing_back(publish, policy, aliases, monkeypatch):
    """It ends the rollback in one line, without a traceback."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    monkeypatch.setattr(canary, "draw_isolated", copy_to_a_full_disk)
    with pytest.raises(MachineError, match="No space left on device"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1}


def test_a_temporary_folder_that_cannot_be_made_is_one_line(publish, policy, monkeypatch, tmp_path):
    """The folder that the environment names has been deleted."""
    publish()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deleted"))
    with pytest.raises(MachineError, match=r"^this machine failed \(\[Errno 2\].*deleted"):
        promote(NAME, None, policy, None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOMEM])
def test_a_fault_of_the_machine_is_found_behind_the_error_that_replaced_it(number):
    """A reader turns what the system says into a line about its file."""

    def fail():
        raise OSError(number, os.strerror(number))

    def read():
        try:
            fail()
        except OSError as error:
            raise InputError(f"cannot read it: {error}") from None

    with pytest.raises(MachineError, match=re.escape(os.strerror(number))):
        run_check("lineage", read)


@pytest.mark.parametrize("name", ["missing", "file/below", ".", "x" * 300, "loop"])
def test_a_file_that_a_version_lacks_is_damaged_evidence(tmp_path, name):
    """Its evidence may name a file that cannot be one; that refuses the version."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    check = run_check("lineage", (tmp_path / name).read_text)

    assert not check.passed
    assert check.reason.startswith("the evidence is damaged ([Errno ")


def test_rollback_restores_the_previous_champion(publish, policy, aliases, registry):
    """The replaced one is withdrawn and refused from then on; rollbacks can be repeated up to the first champion."""
    for _ in range(3):
        publish()
        assert promote(NAME, None, policy, None).passed
    roll_back(NAME, policy, "it draws sevens as ones")
    assert aliases() == {"champion": 2, "previous": 1}
    assert "it draws sevens as ones" in registry.find(f"models:/{NAME}/3").tags["espalier.withdrawn"]

    decision = promote(NAME, f"models:/{NAME}/3", policy, None)
    assert "it draws sevens as ones; delete its tag" in refusals(decision)["not withdrawn"]

    roll_back(NAME, policy, "worse still")
    assert aliases() == {"champion": 1}
    with pytest.raises(InputError, match="has no version with the alias previous"):
        roll_back(NAME, policy, "once more")
    assert outcomes(registry) == [
        ("promote", "none", "1", "done"),
        ("promote", "1", "2", "done"),
        ("promote", "2", "3", "done"),
        ("rollback", "3", "2", "done"),
        ("promote", "2", "3", "refused"),
        ("rollback", "2", "1", "done"),
    ]


@pytest.mark.parametrize(
    ("promoted", "previous"), [([1, 2, 1], None), ([1, 2, 3, 2], 1), ([1, 2, 1, 2], None), ([1, 2, 3, 1, 3], 2)]
)
def test_no_rollback_leads_to_a_withdrawn_version(publish, policy, aliases, registry, promoted, previous):
    """The new previous champion is the latest before it that is neither withdrawn nor the champion itself."""
    for number in range(1, max(promoted) + 1):
        publish()
        assert int(registry.find(f"models:/{NAME}@challenger").version) == number
    for number in promoted:
        assert promote(NAME, f"models:/{NAME}/{number}", policy, None).passed
    roll_back(NAME, None, "bad")

    expected = {"champion": promoted[-2]} | ({"previous": previous} if previous else {})
    assert {name: number for name, number in aliases().items() if name != "challenger"} == expected
    if previous is None:
        with pytest.raises(InputError, match="has no version with the alias previous"):
            roll_back(NAME, None, "worse still")


def test_a_rollback_to_a_withdrawn_version_is_refused(publish, policy, aliases, registry):
    """The line names the tag, which somebody has to delete first; no alias is changed and no entry written."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    version = registry.find(f"models:/{NAME}/1")
    registry.tag(version, withdrawn="by me at noon: it draws sevens\nas ones")
    with pytest.raises(InputError) as refused:
        roll_back(NAME, policy, "bad")

    assert refused.value.message == (
        f"models:/{NAME}/1, the previous champion, was itself rolled back by me at noon: it draws sevens\\nas ones; "
        "promote another version, or delete its tag espalier.withdrawn to go back to it"
    )
    assert aliases() == {"champion": 2, "previous": 1}
    assert len(outcomes(registry)) == 2
    registry.client.delete_model_version_tag(NAME, version.version, WITHDRAWN)
    roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 1}


def test_a_version_that_is_withdrawn_during_a_rollback_stays_so(publish, policy, aliases, registry, monkeypatch):
    """The tag is read again once the entry is written."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    check_samples = promotion._check_samples

    def check_slowly(*arguments):
        registry.tag(registry.find(f"models:/{NAME}/1"), withdrawn="by another")
        return check_samples(*arguments)

    monkeypatch.setattr(promotion, "_check_samples", check_slowly)
    with pytest.raises(InputError, match="version 1 of tiny was rolled back meanwhile; nothing was changed"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1}


@pytest.mark.parametrize("registry", ["sqlite", "postgresql"], indirect=True)
def test_of_two_concurrent_promotions_one_yields(publish, policy, aliases, registry, monkeypatch):
    """Both passed the gate against the same champion; one yields in one line, and the ledger holds both."""
    publish()
    promote(NAME, None, policy, None)
    publish(fids=[0.95, 1.0, 0.9])
    publish(fids=[0.9, 1.0, 0.85])
    barrier, run_checks = threading.Barrier(2), promotion.run_checks

    def check_together(*arguments):
        checks = run_checks(*arguments)
        barrier.wait(60)
        return checks

    monkeypatch.setattr(promotion, "run_checks", check_together)
    results = {}

    def run(number):
        try:
            results[number] = "done" if promote(NAME, f"models:/{NAME}/{number}", policy, None).passed else "refused"
        except InputError as error:
            results[number] = error.message

    threads = [threading.Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [number for number, result in results.items() if result == "done"]
    loser = 5 - winner
    assert "nothing was changed" in results[loser]
    assert aliases()["champion"] == winner
    assert aliases()["previous"] == 1
    assert sorted(outcome for *_, outcome in outcomes(registry)[1:]) == ["done", "yielded"]


@pytest.fixture
def die_at(monkeypatch):
    """Interrupt the process before it sets the n-th alias, counted from 0."""

    @contextmanager
    def die(number):
        calls, set_alias = [], Registry.set_alias

        def count(self, *arguments):
            calls.append(arguments)
            if len(calls) > number:
                raise KeyboardInterrupt
            set_alias(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Registry, "set_alias", count)
            yield

    return die


@pytest.fixture
def leave_open(die_at, policy, registry, monkeypatch):
    """Interrupt a promotion before it sets the first alias, as if another process that still runs had begun it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def leave():
        with die_at(0), pytest.raises(KeyboardInterrupt):
            promote(NAME, None, policy, None)
        entry = Ledger(registry, NAME).entries()[0]
        registry.tag(entry.version, process=ledger_module._describe_process(process.pid))
        monkeypatch.setattr(ledger_module, "_left_open", set())

    yield leave
    process.communicate(b"")


def test_an_open_entry_makes_later_ones_yield(publish, policy, aliases, registry, leave_open, monkeypatch):
    """Once its process has ended or its lease is over, the next entry closes it and proceeds."""
    publish()
    leave_open()
    assert aliases() == {"challenger": 1}
    with pytest.raises(InputError, match=r"^entry 1 of tiny \(promote to version 1, by .*\) is in progress;"):
        promote(NAME, None, policy, None)

    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    assert promote(NAME, None, policy, None).passed
    assert [outcome for *_, outcome in outcomes(registry)] == ["broken off", "yielded", "done"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_promotion_is_finished_or_closed(publish, policy, aliases, registry, die_at, monkeypatch, moved):
    """The next entry finishes it if the champion had changed, and closes it otherwise."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    publish()
    with die_at(moved), pytest.raises(KeyboardInterrupt):
        promote(NAME, None, policy, None)
    assert aliases()["champion"] == (4 if moved else 3)

    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    publish()
    promote(NAME, None, policy, None)
    assert aliases() == {"champion": 5, "previous": 4 if moved else 3}
    assert outcomes(registry)[3] == ("promote", "3", "4", "done" if moved else "broken off")
    roll_back(NAME, policy, "to see")
    assert aliases() == {"champion": 4 if moved else 3, "previous": 3 if moved else 2}


@pytest.mark.parametrize("moved", [0, 1])
def test_a_repeated_rollback_goes_back_one_version_only(publish, policy, aliases, registry, die_at, monkeypatch, moved):
    """After an interruption it is done or finished, and no other version is withdrawn."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    with die_at(moved), pytest.raises(KeyboardInterrupt):
        roll_back(NAME, policy, "bad")
    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    if moved:
        with pytest.raises(InputError, match="was interrupted; it is finished now; check the ledger"):
            roll_back(NAME, policy, "bad")
    else:
        roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2, "previous": 1}
    withdrawn = [number for number in (1, 2, 3) if WITHDRAWN in registry.find(f"models:/{NAME}/{number}").tags]
    assert withdrawn == [3]


@pytest.mark.parametrize("uri", [None, f"models:/{NAME}/2"])
@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_promotion_is_repeated_in_the_same_process(publish, policy, aliases, registry, die_at, moved, uri):
    """A flow does so after an outage: it is finished if the champion had changed, and done anew otherwise."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    with die_at(moved), suppress(KeyboardInterrupt):
        promote(NAME, uri, policy, None)
    if moved == 3:  # the aliases were set, and the process ended before the tags
        reopen(registry)
    decision = promote(NAME, uri, policy, None)

    assert decision.passed
    assert decision.message() == f"models:/{NAME}/2 is the champion, replacing models:/{NAME}/1"
    assert "canary" in [check.name for check in decision.checks]
    assert aliases() == {"champion": 2, "previous": 1}
    assert registry.find(f"models:/{NAME}/2").tags["espalier.gate"] == "passed"
    assert [outcome for *_, outcome in outcomes(registry)[1:]] == (["done"] if moved else ["broken off", "done"])
    with pytest.raises(InputError, match="2 is the champion already"):
        promote(NAME, f"models:/{NAME}/2", policy, None)


def reopen(registry):
    """Take back the end of the latest change, as if it had been interrupted before its tags."""
    entry = Ledger(registry, NAME).entries()[0]
    registry.tag(entry.version, outcome="open")
    registry.client.delete_model_version_tag(NAME, entry.to, "espalier.gate")
    ledger_module._left_open.add(entry.nonce)


def test_an_outage_between_the_aliases_leaves_a_rollback_that_is_finished(publish, policy, aliases, registry, die_at):
    """The same process repeats it; no other version is withdrawn."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    with die_at(1), pytest.raises(KeyboardInterrupt):
        roll_back(NAME, policy, "bad")
    with pytest.raises(InputError, match="was interrupted; it is finished now; check the ledger"):
        roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2, "previous": 1}
    assert outcomes(registry)[-1] == ("rollback", "3", "2", "done")


def test_a_promotion_that_yielded_is_not_left_open(publish, policy, registry, leave_open):
    """It closes its entry itself, so that no other may take it for dead."""
    publish()
    leave_open()
    with pytest.raises(InputError, match="is in progress"):
        promote(NAME, None, policy, None)

    assert ledger_module._left_open == set()
    assert [outcome for *_, outcome in outcomes(registry)] == ["open", "yielded"]


def test_a_lease_is_measured_by_the_clock_of_the_server(publish, policy, aliases, registry, leave_open, monkeypatch):
    """A rollback from a machine whose clock is a day ahead closes no entry that is in progress."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    publish()
    leave_open()
    ahead = SimpleNamespace(time=lambda: time.time() + 86400, monotonic=time.monotonic)
    monkeypatch.setattr(ledger_module, "time", ahead)

    with pytest.raises(InputError, match="is in progress; nothing was changed"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    assert outcomes(registry)[2] == ("promote", "2", "3", "open")


def test_the_time_of_the_server_keeps_what_a_model_says(registry):
    """It is an update of the model, whose description stays."""
    registry.create_model(NAME)
    registry.client.update_registered_model(NAME, "ours")
    begin = time.time()
    now = registry.now_ms(NAME) / 1000

    assert begin - 1 < now < time.time() + 1
    assert registry.client.get_registered_model(NAME).description == "ours"


def test_entries_are_read_before_the_champion(publish, policy, aliases, monkeypatch):
    """An entry that is done between the two reads has changed the champion before the second."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    publish()
    entries, calls = Ledger.entries, []

    def be_overtaken(self):
        found = entries(self)
        calls.append(None)
        if len(calls) == 2:  # the first call settles dead entries, before the checks
            promote(NAME, f"models:/{NAME}/2", policy, None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "entries", be_overtaken)
        patch.setattr(ledger_module, "_has_ended", lambda _: True)
        with pytest.raises(InputError, match="became version 2, and the checks compared with 1"):
            promote(NAME, f"models:/{NAME}/3", policy, None)
    assert aliases()["champion"] == 2


def test_a_process_has_ended_by_id_and_start(registry):
    """A process of another host, PID namespace or user counts as running."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = ledger_module._describe_process(process.pid)
    assert not ledger_module._has_ended(name)
    host, namespace, user, pid, _ = name.split(" ")
    for place in (f"elsewhere {namespace} {user}", f"{host} 1 {user}", f"{host} {namespace} {int(user) + 1}"):
        assert not ledger_module._has_ended(f"{place} {pid} 0")
    process.communicate(b"")

    assert ledger_module._has_ended(name)
    assert ledger_module._has_ended(f"{name}1")
    assert Ledger(registry, NAME).entries() == []


def test_a_clock_that_is_set_ends_no_process(monkeypatch):
    """The time of the boot, which the system derives from its clock, has then changed."""
    name, boot, began = ledger_module._describe_process(os.getpid()), psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot + 1)
    assert psutil.Process().create_time() == began + 1
    assert not ledger_module._has_ended(name)


def test_an_entry_that_was_written_twice_does_not_block_itself(publish, policy, aliases, registry, monkeypatch):
    """The client repeats a request whose answer was lost; both entries have one nonce."""
    create = Registry.create

    def create_twice(self, *arguments):
        create(self, *arguments)
        return create(self, *arguments)

    publish()
    monkeypatch.setattr(Registry, "create", create_twice)
    assert promote(NAME, None, policy, None).passed
    assert aliases() == {"champion": 1}
    assert [outcome for *_, outcome in outcomes(registry)] == ["yielded", "done"]


def test_a_version_that_was_withdrawn_during_the_checks_is_refused(publish, policy, aliases, monkeypatch):
    """Another process promoted it and rolled it back meanwhile."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    run_checks = promotion.run_checks

    def check_slowly(*arguments):
        checks = run_checks(*arguments)
        monkeypatch.setattr(promotion, "run_checks", run_checks)
        promote(NAME, f"models:/{NAME}/2", policy, None)
        roll_back(NAME, policy, "bad")
        return checks

    monkeypatch.setattr(promotion, "run_checks", check_slowly)
    with pytest.raises(InputError, match="was rolled back meanwhile"):
        promote(NAME, f"models:/{NAME}/2", policy, None)
    assert aliases() == {"champion": 1}


def test_a_deleted_version_does_not_block_a_rollback(publish, policy, aliases, registry):
    """After it there is no previous champion, since the one before was deleted."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    registry.remove(registry.find(f"models:/{NAME}/1"))
    roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2}


def test_a_rollback_without_policy_runs_no_canary(publish, policy, aliases, registry):
    """In an emergency the previous champion may be one that this machine cannot load; a reason is still needed."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    (Path(registry.find(f"models:/{NAME}/1").source) / "draw.py").unlink()
    with pytest.raises(InputError, match="tampered with"):
        roll_back(NAME, policy, "on fire")
    roll_back(NAME, None, "on fire")

    assert aliases() == {"champion": 1}
    with pytest.raises(InputError, match="needs a reason"):
        roll_back(NAME, None, " ")


@pytest.mark.parametrize("evidence", ["nothing drawn", "a pickle", "a loader", "an empty lineage", "another file"])
def test_matching_hashes_do_not_replace_the_other_checks(publish, policy, edit, evidence):
    """A user who registers by hand can write a files.json that matches."""

    def change(folder):
        if evidence == "nothing drawn":
            text = (folder / "draw.py").read_text()
            (folder / "draw.py").write_text(
                text.replace('seeds = [int(seed) for seed in model_input["seed"]]', "seeds = []")
            )
        if evidence == "a pickle":
            (folder / MODEL / "more.pkl").write_bytes(b"\x80\x04.")
        if evidence == "a loader":
            text = (folder / "MLmodel").read_text()
            (folder / "MLmodel").write_text(text.replace("mlflow.pyfunc.loaders.code_model", "mlflow.sklearn"))
        if evidence == "an empty lineage":
            edit(folder / EVIDENCE / "lineage.json", files={})
        if evidence == "another file":
            files = read_json(folder / EVIDENCE / "lineage.json")["files"]
            edit(folder / EVIDENCE / "lineage.json", files={**files, "/etc/hostname": "0" * 64})

    publish(change)
    reasons = {
        "nothing drawn": "it drew images for the seeds none",
        "a pickle": "artifacts/model/more.pkl: the format may contain a pickle",
        "a loader": "MLmodel names another loader",
        "an empty lineage": "it lacks",
        "another file": "damaged",
    }
    (reason,) = refusals(promote(NAME, None, policy, None)).values()
    assert reasons[evidence] in reason


def test_a_champion_that_was_tampered_with_refuses_the_candidate(publish, policy):
    """Otherwise a worse version would pass against a champion made to look worse."""
    folder = Path(publish().source)
    promote(NAME, None, policy, None)
    path = folder / EVIDENCE / "evaluation" / "evaluation.json"
    path.write_text(path.read_text().replace("0.95", "0.5"))
    publish()

    assert list(refusals(promote(NAME, None, policy, None))) == ["champion untampered"]


def test_the_command_line_prints_reasons_and_history(publish, tmp_path, policy):
    """Promotion, refusal and rollback; the ledger prints user, time, reason and both versions of each."""
    YAML().dump(policy.model_dump(), tmp_path / "policy.yaml")

    def run(*arguments):
        return CliRunner().invoke(
            main, [*arguments, *(["--policy", "policy.yaml"] if arguments[0] != "ledger" else [])]
        )

    publish()
    first = run("promote", NAME)
    assert (first.exit_code, first.output.splitlines()[-1]) == (0, f"models:/{NAME}/1 is the champion")
    assert run("promote", NAME, "--version", f"models:/{NAME}/1").output == (
        f"Error: models:/{NAME}/1 is the champion already\n"
    )
    publish(macs=90)
    refused = run("promote", NAME, "--why", "please")
    assert refused.exit_code == 1
    assert "✗ budget: 90.0% of the dense model's MACs; allowed: 70.0%" in refused.output
    publish()
    assert run("promote", NAME, "--why", "monthly").exit_code == 0
    assert f"models:/{NAME}/1 is the champion again" in run("rollback", NAME, "--why", "bad sevens").output
    lines = run("ledger", NAME).output.splitlines()
    assert len(lines) == 4
    assert "rollback 3 -> 1: done, by " in lines[0]
    assert lines[0].endswith(": bad sevens")
    assert "promote 1 -> 3: done" in lines[1]
    assert ": please; budget: 90.0%" in lines[2]
    assert lines[1].endswith(": monthly")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("promote", "nobody"), "the registry has no models:/nobody@challenger; it has no model nobody"),
        (("promote", NAME, "--version", f"models:/{NAME}/7"), f"it has {NAME} in versions 1"),
        (("promote", NAME, "--version", "3"), "invalid version '3': expected models:/NAME/3 or models:/NAME@champion"),
        (("promote", "../../etc"), "invalid version"),
        (("promote", NAME, "--policy", "none.yaml"), "none.yaml: No such file or directory"),
        (
            ("rollback", NAME, "--why", "x"),
            f"{NAME} has no version with the alias champion, so there is nothing to roll back to",
        ),
        (("rollback", "no'body", "--why", "x"), "no'body"),
        (("ledger", "nobody"), "model nobody has no promotions yet"),
    ],
)
def test_bad_input_is_one_line(publish, root, arguments, message):
    """The command prints no traceback."""
    publish()
    policy = (
        [] if "--policy" in arguments or arguments[0] == "ledger" else ["--policy", str(root / "mlflow/promotion.yaml")]
    )
    result = CliRunner().invoke(main, [*arguments, *policy])

    assert message in result.output
    assert result.exit_code == (0 if arguments[0] == "ledger" else 1)
    assert len(result.output.splitlines()) == 1
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_an_unavailable_server_is_one_line(monkeypatch, root):
    """The line contains no password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{'hidden'}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["promote", NAME, "--policy", str(root / "mlflow/promotion.yaml")])

    assert result.exit_code == 75  # EX_TEMPFAIL: a retry may succeed
    assert result.output.startswith("Error: the MLflow registry ")
    assert len(result.output.splitlines()) == 1
    assert "hidden" not in result.output


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://[::1", "the host or port in MLFLOW_TRACKING_URI is invalid; "),
        ("nothing://h", "MLFLOW_TRACKING_URI does not begin with a scheme that is allowed: http:, "),
        ("mysql://h/x", "the MLflow registry "),
        ("sqlite:////dev/null/x", "MLFLOW_TRACKING_URI names a file in /dev/null, which is no folder"),
        ("sqlite:///no-such-folder/mlflow.db", "MLFLOW_TRACKING_URI names a file in "),
    ],
)
def test_an_invalid_address_is_one_line(monkeypatch, uri, message):
    """It names the variable, or what MLflow says of the address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["ledger", NAME])

    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith(f"Error: {message}")
    assert not Path("no-such-folder").exists()


def test_diffusers_and_mlflow_load_a_version(publish, policy, unet, scheduler, protocol):
    """load_pipeline gives the pipeline; pyfunc draws the image of a seed, independent of the rest of the batch."""
    publish()
    promote(NAME, None, policy, None)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    many, one = model.predict({"seed": [5, 6, 7]}), model.predict({"seed": [6]})
    pipeline = load_pipeline(f"models:/{NAME}@champion")

    ours = draw(unet, scheduler, [5, 6, 7], protocol.sampler, batch_size=3, label="ours")
    theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in many]
    np.testing.assert_array_equal(np.stack(theirs)[:, None], ours)
    assert many[1] == one[0]
    assert many[0]["png"] != many[1]["png"]
    sample = torch.zeros(1, 1, 8, 8)
    assert torch.equal(pipeline.unet(sample, 3).sample, unet(sample, 3).sample)
    assert MlflowClient().get_registered_model(NAME).aliases == {"champion": 1}
