"""The gate, the aliases and the ledger."""

import base64
import io
import subprocess
import sys
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

from flows.__main__ import main
from stages.models.sampling import draw
from stages.protocol.protocol import Protocol
from stages.register import gate, promotion
from stages.register import ledger as ledger_module
from stages.register.canary import draw_here
from stages.register.ledger import Ledger
from stages.register.package import list_files
from stages.register.pipeline import load_pipeline
from stages.register.promotion import promote, roll_back
from stages.register.registry import EVIDENCE, MODEL, WITHDRAWN, Registry
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors

NAME, WEIGHTS = "tiny", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def real_canary():
    """Ask for the canary as it is, in a process of its own."""


@pytest.fixture(autouse=True)
def quick_canary(request, monkeypatch, tmp_path):
    """Let the canary draw in this process where a test does not ask for it as it is: it is the same function."""

    def draw_quickly(folder, seeds):
        out = tmp_path / f"drawn-{uuid.uuid4().hex}"
        out.mkdir()
        draw_here(folder, out, seeds)
        return {int(path.stem): path.read_bytes() for path in out.iterdir()}

    if "real_canary" not in request.fixturenames:
        monkeypatch.setattr(gate, "draw", draw_quickly)


def outcomes(registry):
    """(what, from, to, outcome) of every act, the oldest first."""
    return [(act.kind, act.start, act.to, act.outcome) for act in reversed(Ledger(registry, NAME).acts())]


def refusals(decision):
    """Check -> reason, of those that failed."""
    return {check.name: check.reason for check in decision.checks if not check.passed}


def test_the_first_version_that_passes_is_the_champion(publish, policy, aliases, registry):
    """There is nobody to compare with but the dense model."""
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


def test_the_next_one_is_compared_with_the_champion(publish, policy, aliases):
    """Better ones replace it, and it becomes the previous one."""
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
        ({"macs": 80}, "budget", "80.0% of the MACs; allowed: 70.0%"),
        ({"costs": {"speed_up": 1.04}}, "latency", "1.04 times as fast as dense, at least 0.99; allowed: 1.00 or more"),
        ({"costs": {"speed_up": 1.06}}, "latency against champion", "the champion 1.20; allowed: 1.08 or more"),
        ({"costs": {"device": "another"}}, "latency against champion", "measured on another, the champion's on cpu"),
        ({"changes": {"seed": 9}}, "same protocol", "seed is 3 and 9; measure both under one protocol"),
        ({"dense": "b"}, "same protocol", "different dense models"),
    ],
)
def test_a_worse_version_is_refused_with_its_reason(publish, policy, aliases, registry, worse, check, reason):
    """At the worse end of the interval; no alias moves, and the ledger says why."""
    publish()
    promote(NAME, None, policy, None)
    publish(**worse)
    decision = promote(NAME, None, policy, None)

    assert not decision.passed
    assert reason in refusals(decision)[check]
    assert aliases() == {"champion": 1, "challenger": 2}
    act = Ledger(registry, NAME).acts()[0]
    assert (act.outcome, act.start, act.to) == ("refused", "1", "2")
    assert reason in act.why
    assert registry.find(f"models:/{NAME}/2").tags["espalier.gate"].startswith("refused: ")
    assert "canary" not in [check.name for check in decision.checks]


def test_a_version_without_intervals_is_refused(publish, policy, edit):
    """One set has none."""

    def draw_one_set(folder):
        path = folder / EVIDENCE / "evaluation" / "evaluation.json"
        told = read_json(path)
        told["protocol"]["sets"] = 1
        told["protocol_id"] = Protocol.model_validate(told["protocol"]).id
        for model in told["models"].values():
            for metric in (it for it in model.values() if isinstance(it, dict) and "sets" in it):
                metric.update(sets=metric["sets"][:1], half_width=None)
        edit(path, **told)

    publish(draw_one_set)

    assert (
        "have no intervals: one set was drawn" in refusals(promote(NAME, None, policy, None))["measured with intervals"]
    )


@pytest.mark.parametrize("how", ["weights", "added", "removed", "list", "evaluation"])
def test_a_version_that_was_tampered_with_is_refused(publish, policy, how):
    """A changed, added or removed file, or a list of files made to fit."""
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
        (folder / EVIDENCE / "canary" / "0.png").unlink()
    if how == "evaluation":
        path = folder / EVIDENCE / "evaluation" / "evaluation.json"
        path.write_text(path.read_text().replace("0.95", "0.99"))

    decision = promote(NAME, None, policy, None)
    assert "tampered with" in refusals(decision)["untampered"]
    assert [check.name for check in decision.checks] == ["not withdrawn", "untampered", "no pickle"]


def test_the_same_compression_makes_the_same_version(package, package_again, content):
    """Byte for byte: neither time nor place nor a random name is in it, so an upload that broke off is not doubled."""
    assert content(package) == content(package_again)


def test_python_leaves_no_trace_that_looks_like_tampering(publish, policy):
    """A version on this disk is opened where it lies, and what Python compiles stays beside it."""
    folder = Path(publish().source)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "draw.cpython-311.pyc").write_bytes(b"compiled")

    assert promote(NAME, None, policy, None).passed


def test_a_version_without_lineage_is_refused(publish, policy, edit):
    """Or with one that tells of other weights, or is damaged."""
    publish(lambda folder: (folder / EVIDENCE / "lineage.json").unlink())
    assert "no lineage" in refusals(promote(NAME, None, policy, None))["lineage"]

    outputs = {f"artifacts/finetuned/{name}": "0" * 64 for name in (WEIGHTS, "pruning_plan.json")}
    publish(lambda folder: edit(folder / EVIDENCE / "lineage.json", outputs=outputs))
    assert "another unet/" in refusals(promote(NAME, None, policy, None))["lineage"]

    publish(lambda folder: edit(folder / EVIDENCE / "lineage.json", git_commit="today"))
    assert "damaged (git_commit:" in refusals(promote(NAME, None, policy, None))["lineage"]


def test_a_version_registered_by_hand_is_refused(registry, publish, policy):
    """It has no list of files with hashes."""
    source = publish().source
    version = registry.create(NAME, source, None, {}, "")

    decision = promote(NAME, f"models:/{NAME}/{version.version}", policy, None)
    assert "not registered by Espalier" in refusals(decision)["untampered"]


@pytest.mark.usefixtures("real_canary")
def test_the_canary_sees_a_version_that_draws_something_else(publish, policy):
    """Everything else about it is in order."""

    def repaint(folder):
        for path in (folder / EVIDENCE / "canary").glob("*.png"):
            Image.new("L", (8, 8), 77).save(path)

    publish(repaint)
    assert "levels; allowed: 1" in refusals(promote(NAME, None, policy, None))["canary"]

    publish(lambda folder: (folder / "draw.py").write_text("raise RuntimeError('no GPU left')"))
    assert "Error: no GPU left" in refusals(promote(NAME, None, policy, None))["canary"]


def test_rollback_is_one_command(publish, policy, aliases, registry):
    """The champion of before is back, the other is withdrawn and cannot come back unnoticed; it can be done again."""
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
    with pytest.raises(InputError, match="has no previous"):
        roll_back(NAME, policy, "once more")
    assert outcomes(registry) == [
        ("promote", "none", "1", "done"),
        ("promote", "1", "2", "done"),
        ("promote", "2", "3", "done"),
        ("rollback", "3", "2", "done"),
        ("promote", "2", "3", "refused"),
        ("rollback", "2", "1", "done"),
    ]


@pytest.mark.parametrize("registry", ["sqlite", "postgresql"], indirect=True)
def test_of_two_at_once_one_wins(publish, policy, aliases, registry, monkeypatch):
    """Both passed the gate against the same champion; the other yields, in one line, and the ledger shows both."""
    publish()
    promote(NAME, None, policy, None)
    publish(fids=[0.95, 1.0, 0.9])
    publish(fids=[0.9, 1.0, 0.85])
    barrier, decide = threading.Barrier(2), promotion.decide

    def decide_together(*arguments):
        found = decide(*arguments)
        barrier.wait(60)
        return found

    monkeypatch.setattr(promotion, "decide", decide_together)
    ends = {}

    def run(number):
        try:
            promote(NAME, f"models:/{NAME}/{number}", policy, None)
            ends[number] = "won"
        except InputError as error:
            ends[number] = error.message

    threads = [threading.Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [number for number, end in ends.items() if end == "won"]
    loser = 5 - winner
    assert "nothing was changed" in ends[loser]
    assert aliases()["champion"] == winner
    assert aliases()["previous"] == 1
    assert sorted(outcome for *_, outcome in outcomes(registry)[1:]) == ["done", "yielded"]


@pytest.fixture
def die_at(monkeypatch):
    """Die as the n-th alias is about to be moved, counted from 0."""

    @contextmanager
    def die(number):
        calls, point = [], Registry.point

        def count(self, *arguments):
            calls.append(arguments)
            if len(calls) > number:
                raise KeyboardInterrupt
            point(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Registry, "point", count)
            yield

    return die


def test_an_act_at_work_is_not_disturbed(publish, policy, aliases, registry, die_at, monkeypatch):
    """Others yield, until its process has ended or its lease is over; then it is closed, and they go on."""
    publish()
    with die_at(0), pytest.raises(KeyboardInterrupt):
        promote(NAME, None, policy, None)
    assert aliases() == {"challenger": 1}
    with pytest.raises(InputError, match="is at work on tiny since"):
        promote(NAME, None, policy, None)

    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    assert promote(NAME, None, policy, None).passed
    assert [outcome for *_, outcome in outcomes(registry)] == ["broken off", "yielded", "done"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_promotion_that_died_is_finished_or_closed(publish, policy, aliases, registry, die_at, monkeypatch, moved):
    """Before the champion moved, nothing was changed; after it, the next act does what was left to do."""
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
def test_a_rollback_that_died_goes_not_one_version_further(
    publish, policy, aliases, registry, die_at, monkeypatch, moved
):
    """Asked for again it is done or finished; a version that nobody meant is not withdrawn."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    with die_at(moved), pytest.raises(KeyboardInterrupt):
        roll_back(NAME, policy, "bad")
    monkeypatch.setattr(ledger_module, "LEASE_S", 0)
    if moved:
        with pytest.raises(InputError, match="had not ended; it was finished now; look at the ledger"):
            roll_back(NAME, policy, "bad")
    else:
        roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2, "previous": 1}
    withdrawn = [number for number in (1, 2, 3) if WITHDRAWN in registry.find(f"models:/{NAME}/{number}").tags]
    assert withdrawn == [3]


def test_who_looks_late_sees_what_was_moved(publish, policy, aliases, monkeypatch):
    """Another act that is done between two looks has moved the champion before the second."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    publish()
    acts, once = Ledger.acts, []

    def be_overtaken(self):
        found = acts(self)
        if not once:
            once.append(None)
            promote(NAME, f"models:/{NAME}/2", policy, None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "acts", be_overtaken)
        patch.setattr(ledger_module, "_has_ended", lambda _: True)
        with pytest.raises(InputError, match="became version 2 while this was decided against 1"):
            promote(NAME, f"models:/{NAME}/3", policy, None)
    assert aliases()["champion"] == 2


def test_a_process_that_has_ended_is_known(registry):
    """By host, number and start; of another host nobody can tell."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = ledger_module._describe_process(process.pid)
    assert not ledger_module._has_ended(name)
    assert not ledger_module._has_ended("elsewhere 1 0.00")
    process.communicate(b"")

    assert ledger_module._has_ended(name)
    assert ledger_module._has_ended(f"{name}1")
    assert Ledger(registry, NAME).acts() == []


def test_an_act_that_the_server_wrote_twice_does_not_wait_for_itself(publish, policy, aliases, registry, monkeypatch):
    """An answer was lost and the call repeated."""
    create = Registry.create

    def create_twice(self, *arguments):
        create(self, *arguments)
        return create(self, *arguments)

    publish()
    monkeypatch.setattr(Registry, "create", create_twice)
    assert promote(NAME, None, policy, None).passed
    assert aliases() == {"champion": 1}
    assert [outcome for *_, outcome in outcomes(registry)] == ["yielded", "done"]


def test_a_version_that_was_withdrawn_meanwhile_stays_so(publish, policy, aliases, monkeypatch):
    """It was promoted and rolled back while this promotion was decided."""
    publish()
    promote(NAME, None, policy, None)
    publish()
    decide = promotion.decide

    def decide_slowly(*arguments):
        found = decide(*arguments)
        monkeypatch.setattr(promotion, "decide", decide)
        promote(NAME, f"models:/{NAME}/2", policy, None)
        roll_back(NAME, policy, "bad")
        return found

    monkeypatch.setattr(promotion, "decide", decide_slowly)
    with pytest.raises(InputError, match="was rolled back meanwhile"):
        promote(NAME, f"models:/{NAME}/2", policy, None)
    assert aliases() == {"champion": 1}


def test_a_rollback_needs_no_version_that_is_gone(publish, policy, aliases, registry):
    """The one before the previous was deleted: there is nowhere further to go back to."""
    for _ in range(3):
        publish()
        promote(NAME, None, policy, None)
    registry.remove(registry.find(f"models:/{NAME}/1"))
    roll_back(NAME, policy, "bad")

    assert aliases() == {"champion": 2}


def test_an_emergency_needs_no_canary(publish, policy, aliases, registry):
    """The previous champion cannot be had here at the moment, but whoever asks for the champion can have it."""
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
def test_what_fits_its_hashes_is_still_looked_at(publish, policy, edit, evidence):
    """Whoever registers by hand can make the list of files fit, too."""

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
        "nothing drawn": "it drew none",
        "a pickle": "artifacts/model/more.pkl: a version holds no such format",
        "a loader": "to be opened in another way",
        "an empty lineage": "it lacks",
        "another file": "damaged",
    }
    (reason,) = refusals(promote(NAME, None, policy, None)).values()
    assert reasons[evidence] in reason


def test_a_champion_that_was_tampered_with_is_no_measure(publish, policy):
    """Or a worse version would pass by making the champion look worse."""
    folder = Path(publish().source)
    promote(NAME, None, policy, None)
    path = folder / EVIDENCE / "evaluation" / "evaluation.json"
    path.write_text(path.read_text().replace("0.95", "0.5"))
    publish()

    assert list(refusals(promote(NAME, None, policy, None))) == ["champion untampered"]


def test_the_command_line_tells_reasons_and_history(publish, tmp_path, policy):
    """Promote, refuse, roll back, and who did what when, why, from what, to what."""
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
    assert "✗ budget: 90.0% of the MACs; allowed: 70.0%" in refused.output
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
        (("promote", NAME, "--version", "3"), "'3' names no version; give models:/NAME/3 or models:/NAME@champion"),
        (("promote", "../../etc"), "names no version"),
        (("promote", NAME, "--policy", "none.yaml"), "none.yaml: No such file or directory"),
        (("rollback", NAME, "--why", "x"), f"{NAME} has no champion, so there is nothing to go back to"),
        (("rollback", "no'body", "--why", "x"), "no'body"),
        (("ledger", "nobody"), "nothing was promoted yet under the name nobody"),
    ],
)
def test_bad_input_is_one_line(publish, root, arguments, message):
    """And no traceback."""
    publish()
    policy = (
        [] if "--policy" in arguments or arguments[0] == "ledger" else ["--policy", str(root / "mlflow/promotion.yaml")]
    )
    result = CliRunner().invoke(main, [*arguments, *policy])

    assert message in result.output
    assert result.exit_code == (0 if arguments[0] == "ledger" else 1)
    assert len(result.output.splitlines()) == 1
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_a_server_that_is_away_is_one_line(monkeypatch, root):
    """And it names no password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{'hidden'}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["promote", NAME, "--policy", str(root / "mlflow/promotion.yaml")])

    assert result.exit_code == 75  # EX_TEMPFAIL: another try makes sense
    assert result.output.startswith("Error: the MLflow registry ")
    assert len(result.output.splitlines()) == 1
    assert "hidden" not in result.output


@pytest.mark.parametrize("uri", ["http://[::1", "mysql://h/x", "nothing://h", "sqlite:////dev/null/x"])
def test_an_address_that_is_none_is_one_line(monkeypatch, uri):
    """Whatever MLflow makes of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["ledger", NAME])

    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith("Error: the MLflow registry ")


def test_plain_diffusers_and_mlflow_open_a_version(publish, policy, unet, scheduler, protocol):
    """One function gives the pipeline; pyfunc draws the same image from a seed, whatever else is in the batch."""
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
