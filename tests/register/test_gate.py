"""The checks of a version against a policy, the dense model and the champion."""

import io
import re
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from stages.models.layout import PLAN
from stages.protocol.protocol import Protocol
from stages.register import canary, sandboxed_draw
from stages.register.gate import VersionFiles, run_checks
from stages.register.ledger import Ledger
from stages.register.package import list_files
from stages.register.policy import Policy, load_policy, resolve_tolerance
from stages.register.promotion import promote
from stages.register.registry import EVIDENCE, MODEL, refusal_reason
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors
from tests.register.conftest import NAME, WEIGHTS, claim_size, outcomes, refusals
from tests.servers import ROOT

pytestmark = pytest.mark.usefixtures("quick_canary")


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
        ({"costs": {"speed_up": 1.1}}, "latency against champion", "at least 1.05; the champion 1.20; allowed: 1.08"),
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


def test_what_the_policy_names_may_be_reached(publish, policy):
    """A share of MACs at its limit passes, and a tolerance of 0 is one."""
    checks = run_gate(policy, publish(macs=70), publish())

    assert checks["budget"].reason == "70.0% of the dense model's MACs; allowed: 70.0%"
    assert checks["budget"].passed
    assert with_fid(policy, 0).dense.fid == 0


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"mode": "compiled"}], ids=str)
def test_a_latency_of_another_setting_is_none(publish, policy, change):
    """The check names the setting of the policy, which was not measured."""
    setting = policy.latency.model_copy(update=change)
    checks = run_gate(policy.model_copy(update={"latency": setting}), publish(), publish())

    assert f"no latency was measured at batch 1, {setting.precision}, {setting.mode}; " in checks["latency"].reason


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


@pytest.mark.parametrize(
    ("path", "keys", "check", "reason"),
    [
        (
            "evaluation/evaluation.json",
            ("models", "finetuned", "weights_sha256"),
            "measured with intervals",
            "measured other weights than the version's",
        ),
        (
            "costs/costs.json",
            ("weights_sha256", "finetuned"),
            "latency",
            "were measured on other weights than the version's",
        ),
        ("lineage.json", ("outputs", f"artifacts/finetuned/{PLAN}"), "lineage", f"another {PLAN} than the version's"),
        ("lineage.json", ("files", "params.yaml"), "lineage", "another params.yaml than the version's"),
    ],
    ids=["evaluation", "costs", "plan", "params"],
)
def test_evidence_of_another_model_is_refused(publish, policy, path, keys, check, reason):
    """Evaluation, costs and lineage name the files that they belong to."""

    def change(folder):
        content = read_json(folder / EVIDENCE / path)
        reduce(getitem, keys[:-1], content)[keys[-1]] = "0" * 64
        write_json(folder / EVIDENCE / path, content)

    publish(change)
    assert reason in refusals(promote(NAME, None, policy, None))[check]


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


@pytest.mark.parametrize(
    ("png", "message"),
    [
        (b"no picture", "image of the canary is invalid"),
        (b"\x89PNG\r\n\x1a\n", "image of the canary is invalid"),
        ("blank", "gives a blank image"),
        ("wide", "of another size or kind than 8 x 8"),
        ("9000", "of another size or kind than 8 x 8"),  # pillow would decode it
        ("60000", "image of the canary is invalid"),
    ],
)
def test_an_invalid_picture_is_refused(publish, policy, monkeypatch, png, message):
    """It is never decoded to more than the size of the model's images."""
    if isinstance(png, str):
        buffer = io.BytesIO()
        Image.new("L", (16 if png == "wide" else 8, 8), 77).save(buffer, "PNG")
        png = claim_size(buffer.getvalue(), int(png)) if png.isdecimal() else buffer.getvalue()
    publish()
    monkeypatch.setattr(canary, "draw_isolated", lambda _, seeds, __: dict.fromkeys(seeds, png))

    (reason,) = refusals(promote(NAME, None, policy, None)).values()
    assert message in reason


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
