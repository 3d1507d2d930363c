"""Variants go through the stages that build, measure, time and show them."""

import pytest
from ruamel.yaml import YAML

from stages.storage.files import read_json
from tests.all_stages import run_all_stages
from tests.pipeline.test_depth import CHANGES

KINDS = ["onnx", "int8", ["int4", "cache-2"]]
NAMES = [f"{model}+{kind}" for model in ("dense", "finetuned") for kind in ("onnx", "int8", "int4+cache-2")]


@pytest.mark.e2e
def test_variants_are_built_measured_timed_and_shown(tmp_path, root, monkeypatch):
    """Each has a folder, quality under the protocol of the models, times in its own runtime, and a row of one table."""
    pytest.importorskip("onnxruntime")
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    for block, changes in CHANGES.items():
        params[block].update(changes)
    params["prune"]["depth"] = None
    params["variants"] = {"models": ["dense", "finetuned"], "kinds": KINDS}
    yaml.dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    run_all_stages()

    record = read_json(tmp_path / "reports/variants/variants.json")
    costs = read_json(tmp_path / "reports/costs/variants.json")
    evaluation = read_json(tmp_path / "reports/evaluate/evaluation.json")
    assert list(record["variants"]) == sorted(NAMES)
    assert record["protocol_id"] == evaluation["protocol_id"]
    assert record["variants"]["dense+onnx"]["metrics"]["ssim"]["mean"] > 0.99
    assert record["variants"]["dense+int8"]["size_bytes"] < 0.3 * evaluation["models"]["dense"]["size_bytes"]
    to_model = {name: it["ssim_to_model"]["mean"] for name, it in record["variants"].items()}
    assert to_model["dense+int8"] == record["variants"]["dense+int8"]["metrics"]["ssim"]["mean"]
    assert to_model["finetuned+onnx"] > 0.99 > evaluation["models"]["finetuned"]["ssim"]["mean"]
    assert 1 > to_model["finetuned+int8"] > to_model["finetuned+int4+cache-2"]
    metrics = read_json(tmp_path / "reports/variants/metrics.json")
    assert metrics["finetuned"]["int8"]["ssim_to_model"] == to_model["finetuned+int8"]
    assert metrics["dense"]["int4_cache-2"]["fid"] == record["variants"]["dense+int4+cache-2"]["metrics"]["fid"]["mean"]
    rows = {row["model"]: row for row in costs["costs"]}
    assert set(rows) == {"dense", "pruned", "finetuned", *NAMES}
    assert {name: row["mode"] for name, row in rows.items() if row["mode"] != "eager"} == {
        "dense+onnx": "onnxruntime",
        "finetuned+onnx": "onnxruntime",
    }
    assert all(row["median_ms"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert rows["dense+int8"]["median_ms"] == rows["dense"]["median_ms"]  # float32 as soon as it is read
    table = (tmp_path / "reports/summary/variants.md").read_text()
    page = (tmp_path / "reports/index.html").read_text()
    for name in NAMES:
        assert f"| {name.replace('+', ' + ')} |" in table
        assert f"<td>{name.replace('+', ' + ')}</td>" in page
    assert (tmp_path / "reports/summary/variants-time.svg").is_file()
