"""Versions that hold variants: their files, the gate's checks of a variant, and drawing with a graph."""

import json
import re
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from stages.models.pipeline import write_pipeline
from stages.models.variants import folder as variant_folder
from stages.models.variants.kinds import Kind
from stages.protocol.variants import read_variants
from stages.register.canary import check_canary, compare
from stages.register.gate import VersionFiles, run_checks
from stages.register.package import check_formats, list_files
from stages.register.policy import Policy
from stages.register.registry import EVIDENCE, MODEL
from stages.register.variant_canary import check_variant_canary
from stages.register.variants import VARIANTS
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors
from tests.register.conftest import write
from tests.register.held_variants import measure, pictures, write_graph, write_variants

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GRAPH = f"{VARIANTS}/onnx/unet/model.onnx"
ASKED = {"kind": "onnx", "fid": "50%", "ssim": 0.1, "speed_up": 2.0}


@pytest.fixture
def silent(unet):
    """A UNet that predicts 0, as the graph does."""
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


@pytest.fixture
def package(registry, tmp_path, silent, scheduler, protocol, make_once, monkeypatch):  # noqa: ARG001
    """The folder of a version of the silent model with a graph and integers, from a run with those of dense, too."""
    monkeypatch.setattr(variant_folder, "export_graph", lambda _model, _kind, path: write_graph(path))

    def make(folder):
        write_pipeline(tmp_path / "released", silent, scheduler)
        models = dict.fromkeys(("dense", "finetuned"), tmp_path / "released")
        write_variants(tmp_path / "variants", models, [Kind("onnx"), Kind("int8")])
        measure(tmp_path / "variants", protocol, tmp_path / "reports" / "variants", tmp_path / "costs")
        write(folder, tmp_path, silent, scheduler, protocol)

    return make_once("package-with-variants", make)


def asking(policy, **changes):
    """Let a policy ask for the graph, with other limits."""
    return Policy.model_validate(policy.model_dump() | {"variant": ASKED | changes})


def gate(version, policy):
    """Run the checks of the gate: name -> check."""
    found = run_checks(VersionFiles("models:/tiny/1", Path(version.source), version.tags), None, policy)
    return {check.name: check for check in found}


def test_a_version_holds_the_variants_of_its_own_model(package):
    """As folders of their kinds with all measurements as evidence, listed with hashes; those of dense stay behind."""
    files = {entry["path"] for entry in read_json(package / "files.json")["files"]}
    signature = mlflow.models.Model.load(str(package)).signature

    assert {path.name for path in (package / VARIANTS).iterdir()} == {"onnx", "int8"}
    assert {GRAPH, f"{VARIANTS}/int8/unet/integers.safetensors", f"{VARIANTS}/int8/variant.json"} < files
    assert {f"{EVIDENCE}/variants/variants.json", f"{EVIDENCE}/costs/variants.json"} < files
    assert "dense+onnx" in read_variants(package / EVIDENCE / "variants").variants
    assert [(param.name, param.default) for param in signature.params] == [("variant", None)]
    assert "onnxruntime==" in (package / "requirements.txt").read_text()
    assert check_formats(package) == [package / GRAPH]


def test_a_version_without_variants_is_as_before(
    registry,  # noqa: ARG001
    tmp_path,
    silent,
    scheduler,
    protocol,
):
    """It has no folder, evidence or requirement of theirs, though dense has one; a request for one is refused."""
    write_pipeline(tmp_path / "released", silent, scheduler)
    write_variants(tmp_path / "variants", {"dense": tmp_path / "released"}, [Kind("int8")])
    write(tmp_path / "version", tmp_path, silent, scheduler, protocol)
    paths = [entry.path for entry in list_files(tmp_path / "version").files]

    assert not [path for path in paths if "variant" in path]
    assert "onnxruntime" not in (tmp_path / "version" / "requirements.txt").read_text()
    model = mlflow.pyfunc.load_model(str(tmp_path / "version"))
    assert len(model.predict({"seed": [1]})) == 1
    with pytest.raises(MlflowException, match="variant 'onnx': the version does not hold it; allowed: no variant"):
        model.predict({"seed": [1]}, params={"variant": "onnx"})


def test_the_gate_checks_the_variant_that_the_policy_asks_for(publish, policy, quick_canary):  # noqa: ARG001
    """One line each, after the checks of the model; a policy without the block checks none of it."""
    version = publish()
    checks = gate(version, asking(policy, fid_dense=0.1))

    assert all(check.passed for check in checks.values()), checks
    assert list(checks)[-9:] == [
        "variant onnx",
        "onnx measured",
        "FID of onnx against dense",
        "FID of onnx to dense",
        "SSIM of onnx against dense",
        "latency of onnx",
        "canary",
        "canary of int8",
        "canary of onnx",
    ]
    assert checks["variant onnx"].reason.startswith("finetuned+onnx, ")
    assert checks["latency of onnx"].reason == "2.20 times as fast as dense, at least 2.10; allowed: 2.00 or more"
    assert [name for name in gate(version, policy) if "onnx" in name] == ["canary of onnx"]


def test_every_variant_that_a_version_holds_has_a_canary(publish, policy, quick_canary):  # noqa: ARG001
    """Whether the policy asks for one or not: graphs by the code of the version, the others by Espalier."""
    checks = gate(publish(), policy)

    assert all(check.passed for check in checks.values()), checks
    assert list(checks)[-3:] == ["canary", "canary of int8", "canary of onnx"]
    assert checks["canary of int8"].reason.endswith("off by 0 levels; allowed: 1")


@pytest.mark.parametrize("kind", [Kind("int4", 2), Kind("float8"), Kind("float32", 2), Kind("int8-dynamic")])
def test_each_kind_draws_what_it_draws_when_it_is_made_anew(package, tmp_path, quick_canary, kind):  # noqa: ARG001
    """From the same seeds, integers and caches here, and graphs by the code of the version."""
    shutil.copytree(package, tmp_path / "version")
    folder = tmp_path / "version" / VARIANTS / kind.name
    folder.mkdir()
    variant_folder.write_variant("finetuned", tmp_path / "version" / MODEL, kind, folder)

    assert check_variant_canary(tmp_path / "version", kind.name, 1.0, [5, 6]).startswith("2 images from the seeds 5, 6")


@pytest.mark.parametrize(
    ("asked", "check", "reason"),
    [
        (
            {"kind": ["int8", "cache-2"]},
            "variant int8+cache-2",
            "the version holds int8, onnx; add int8+cache-2 to var",
        ),
        ({"fid": 0.05}, "FID of onnx against dense", "above the dense model, so at most +0.1; allowed: +0.05"),
        ({"fid_dense": 0.08}, "FID of onnx to dense", "+0.06 ± 0.025 above 0, so at most +0.0848; allowed: +0.08"),
        ({"ssim": 0.05}, "SSIM of onnx against dense", "-0.05 ± 0.025 above 1, so at least -0.0748; allowed: -0.05"),
        ({"speed_up": 2.15}, "latency of onnx", "at least 2.10; allowed: 2.15 or more"),
        ({"batch": 16}, "latency of onnx", "it was not timed at batch 16; add it to costs.batches or change"),
    ],
)
def test_a_variant_beyond_a_limit_refuses_the_version(publish, policy, asked, check, reason):
    """With the reason of that check alone, and without a canary."""
    checks = gate(publish(), asking(policy, **asked))

    assert [name for name, found in checks.items() if not found.passed] == [check]
    assert reason in checks[check].reason
    assert "canary" not in checks


def edit_json(path, change):
    """Change the tree of a JSON file in place."""
    tree = json.loads(path.read_text())
    change(tree)
    write_json(path, tree)


def of_other_weights(folder):
    """Replace the hash of the weights that the variant was made from."""
    edit_json(folder / VARIANTS / "onnx/variant.json", lambda it: it.update(weights_sha256="e" * 64))


def as_another_kind(folder):
    """Put the integers where the graph belongs."""
    (folder / VARIANTS / "onnx/variant.json").write_text((folder / VARIANTS / "int8/variant.json").read_text())


def with_another_graph(folder):
    """Replace the graph."""
    write_graph(folder / GRAPH, 0.1)


def with_another_graph_and_record(folder):
    """Replace the graph and its hash beside it."""
    with_another_graph(folder)
    hashes = {"unet/model.onnx": file_sha256(folder / GRAPH)}
    edit_json(folder / VARIANTS / "onnx/variant.json", lambda it: it["files"].update(hashes))


def with_another_lineage(folder):
    """Replace the graph, its hash beside it and that of the lineage."""
    with_another_graph_and_record(folder)
    hashes = {"artifacts/variants/finetuned+onnx/unet/model.onnx": file_sha256(folder / GRAPH)}
    edit_json(folder / EVIDENCE / "lineage.json", lambda it: it["outputs"].update(hashes))


def under_another_protocol(folder):
    """Let the variants be measured under another protocol."""
    edit_json(folder / EVIDENCE / "variants/variants.json", lambda it: it.update(protocol_id="other"))


def in_one_set(folder):
    """Leave one set of the graph's FID."""
    metrics = {"sets": [1.0], "mean": 1.0, "half_width": None}
    edit_json(
        folder / EVIDENCE / "variants/variants.json",
        lambda it: it["variants"]["finetuned+onnx"]["metrics"].update(fid=metrics),
    )


def timed_as_another_file(folder):
    """Let the costs be of another graph."""
    hashes = {"finetuned+onnx": "e" * 64}
    edit_json(folder / EVIDENCE / "costs/variants.json", lambda it: it["weights_sha256"].update(hashes))


def without_times(folder):
    """Remove the costs of variants."""
    (folder / EVIDENCE / "costs/variants.json").unlink()


def timed_without_the_graph(folder):
    """Leave the graph out of the costs."""

    def leave_out(tree):
        """Drop its hash and its rows."""
        del tree["weights_sha256"]["finetuned+onnx"]
        tree["costs"] = [row for row in tree["costs"] if row["model"] != "finetuned+onnx"]

    edit_json(folder / EVIDENCE / "costs/variants.json", leave_out)


@pytest.mark.parametrize(
    ("change", "check", "reason"),
    [
        (of_other_weights, "variant onnx", "variant.json says that it is finetuned+onnx of other weights"),
        (as_another_kind, "variant onnx", "variant.json says that it is finetuned+int8 of other weights, or another"),
        (with_another_graph, "variant onnx", "its files are not those that variant.json names"),
        (with_another_graph_and_record, "variant onnx", "the lineage holds the hash of another model.onnx"),
        (with_another_lineage, "variant onnx", "another model.onnx than the variant's was measured"),
        (under_another_protocol, "onnx measured", "it was measured under other, the model under"),
        (in_one_set, "onnx measured", "its fid was measured in 1 set, and the protocol has 3"),
        (timed_as_another_file, "latency of onnx", "another file than the one that was measured was timed"),
        (timed_without_the_graph, "latency of onnx", "it was not timed; run the costs stage again"),
        (without_times, "latency of onnx", "it was not timed; run the costs stage again"),
    ],
)
def test_evidence_of_another_variant_refuses_the_version(publish, policy, change, check, reason):
    """Though every file of the version has its registered hash."""
    checks = gate(publish(change), asking(policy))

    assert [name for name, found in checks.items() if not found.passed] == [check]
    assert reason in checks[check].reason


def of_other_integers(folder):
    """Replace the integers by those of a model that predicts 0.5, and every hash of theirs."""
    path = folder / VARIANTS / "int8/unet/integers.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, tensors | {"conv_out.bias": tensors["conv_out.bias"] + 0.5})
    hashes = {"unet/integers.safetensors": file_sha256(path)}
    edit_json(folder / VARIANTS / "int8/variant.json", lambda it: it["files"].update(hashes))


def without_a_scale(folder):
    """Leave out a scale, and replace the hash."""
    path = folder / VARIANTS / "int8/unet/integers.safetensors"
    write_tensors(path, {name: it for name, it in read_tensors(path).items() if name != "conv_out.weight.scales"})
    hashes = {"unet/integers.safetensors": file_sha256(path)}
    edit_json(folder / VARIANTS / "int8/variant.json", lambda it: it["files"].update(hashes))


def without_groups(folder):
    """Let the config of the integers divide by zero as soon as a model is built of it."""
    path = folder / VARIANTS / "int8/unet/config.json"
    edit_json(path, lambda it: it.update(norm_num_groups=0))
    edit_json(
        folder / VARIANTS / "int8/variant.json", lambda it: it["files"].update({"unet/config.json": file_sha256(path)})
    )


def under_another_name(folder):
    """Call the integers those with a cache."""
    (folder / VARIANTS / "int8").rename(folder / VARIANTS / "int8+cache-2")


@pytest.mark.parametrize(
    ("change", "check", "reason"),
    [
        (of_other_integers, "canary of int8", r"^4 images from the seeds .*, off by .* levels; allowed: 1$"),
        (without_a_scale, "canary of int8", "conv_out.weight has integers without a scale"),
        (without_groups, "canary of int8", "integers.safetensors: .*zero\\); run the variants stage again"),
        (under_another_name, "canary of int8\\+cache-2", "the variant in .*/int8\\+cache-2 is int8; register the run"),
        (with_another_graph, "canary of onnx", r"off by .* levels; allowed: 1$"),
    ],
)
def test_a_variant_that_draws_other_images_refuses_the_version(publish, policy, quick_canary, change, check, reason):  # noqa: ARG001
    """Though every file has its registered hash, and the policy asks for no variant; the reason is one line."""
    (failed,) = (found for found in gate(publish(change), policy).values() if not found.passed)

    assert re.fullmatch(check, failed.name)
    assert re.search(reason, failed.reason)
    assert "\n" not in failed.reason


@pytest.mark.parametrize(("absent", "kind"), [("onnxruntime", "onnx"), ("onnxscript", "int8-dynamic")])
def test_a_machine_without_the_runtime_judges_no_version(publish, policy, monkeypatch, absent, kind):
    """The line names the extra, and no check fails, since the version is not at fault."""
    version = publish(lambda folder: (folder / VARIANTS / "onnx").rename(folder / VARIANTS / kind))
    monkeypatch.setattr("stages.register.variant_canary.find_spec", lambda name: None if name == absent else name)
    with pytest.raises(InputError, match=rf"holds {kind}, and this machine lacks {absent}, so .* the extra deploy, or"):
        gate(version, policy)


def test_an_image_of_another_shape_is_refused():
    """Though NumPy would repeat one row until it fits a picture whose rows are all alike."""
    row = np.arange(8.0)[None]
    with pytest.raises(InputError, match=r"^seed 5 gives an image of 1 x 8; allowed: 8 x 8, as the weights draw$"):
        compare([5], [row], [row.repeat(8, axis=0)], 1.0)


def test_a_graph_that_draws_other_images_than_the_weights_is_refused(publish, quick_canary):  # noqa: ARG001
    """The images that are expected are those of the weights; the graph itself is never opened here."""
    folder = Path(publish(with_another_graph).source)

    assert "4 images" in check_canary(folder, 1.0)
    with pytest.raises(InputError, match=r"off by .* levels; allowed: 1"):
        check_canary(folder, 1.0, variant="onnx")


def test_a_version_draws_with_the_graph_that_a_request_names(package, monkeypatch):
    """The same seeds give the same images, within one level of 255; without a name the model draws."""
    model = mlflow.pyfunc.load_model(str(package))
    expected = pictures(model.predict({"seed": [1, 2]}))
    found = pictures(model.predict({"seed": [1, 2]}, params={"variant": "onnx"}))

    assert np.abs(np.stack(found).astype(int) - np.stack(expected)).max() <= 1
    assert np.stack(found).std() > 0
    for variant, message in (
        ("int8", "^variant 'int8': Espalier alone opens it; allowed: onnx, no variant for the model$"),
        ("cache-2", "^variant 'cache-2': the version does not hold it; allowed: onnx, no variant for the model$"),
        ("../model", "the version does not hold it"),
    ):
        with pytest.raises(MlflowException, match=message):
            model.predict({"seed": [1]}, params={"variant": variant})
    again = mlflow.pyfunc.load_model(str(package))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MlflowException, match=r"^a variant needs onnxruntime, which is not installed; install it, or"):
        again.predict({"seed": [1]}, params={"variant": "onnx"})


@pytest.mark.parametrize(
    "place", ["artifacts/model/unet/model.onnx", f"{VARIANTS}/onnx/other.onnx", f"{VARIANTS}/onnx/unet/other.onnx"]
)
def test_a_graph_is_allowed_as_that_of_a_variant_only(publish, policy, place):
    """Elsewhere it is an unknown format."""

    def misplace(folder):
        write_graph(folder / place)

    check = gate(publish(misplace), policy)["no pickle"]
    assert not check.passed
    assert check.reason.startswith(f"{place}: the format may contain a pickle")


def test_a_policy_names_a_kind_of_variant(policy):
    """Others are refused as in params.yaml."""
    with pytest.raises(ValueError, match="'fp8' is not a kind of variant; allowed: int8"):
        asking(policy, kind="fp8")
    assert asking(policy, kind=["cache-3", "int4"]).variant.parsed() == Kind("int4", 3)
