"""Versions whose graphs the exporter made: served by MLflow, drawn with in the sandbox and under conditions."""

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest
import torch

from stages.models.params import SamplerParams
from stages.models.pipeline import write_pipeline
from stages.models.variants.kinds import Kind
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.register.canary import check_canary
from stages.register.variant_canary import check_variant_canary
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.storage.tensors import write_tensors
from tests.register.conftest import NAME, write
from tests.register.held_variants import measure, pictures, write_variants
from tests.servers import await_ping, own_environment
from tests.swift import free_ports

pytest.importorskip("onnxruntime")


@contextmanager
def serving(tmp_path):
    """Serve version 1 as MLflow does; yields a function from seeds and params to the answer, or the refusal's text."""
    (port,) = free_ports(1)
    command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}/1", "--env-manager", "local", "--port", str(port)]
    environment = own_environment(MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        await_ping(f"http://127.0.0.1:{port}", process)

        def ask(seeds, **params):
            body = json.dumps({"dataframe_records": [{"seed": seed} for seed in seeds], "params": params}).encode()
            sent = Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
            try:
                with urlopen(sent, timeout=60) as answer:
                    return json.load(answer)["predictions"]
            except HTTPError as refusal:
                return json.load(refusal)["message"]

        yield ask
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_package(folder, tmp_path, unet, scheduler, protocol):
    """Write a version with the graphs of a pipeline in `released`, as the exporter makes them."""
    kinds = [Kind("onnx"), Kind("int8-dynamic"), Kind("int8")]
    write_variants(tmp_path / "variants", {"finetuned": tmp_path / "released"}, kinds)
    measure(tmp_path / "variants", protocol, tmp_path / "reports" / "variants", tmp_path / "costs")
    write(folder, tmp_path, unet, scheduler, protocol, tmp_path / "released")


@pytest.mark.e2e
def test_mlflow_serves_the_graph(registry, tmp_path, unet, scheduler, magnitude, protocol):
    """Within one level of 255 of the model, at odd widths; the sandbox draws with it, too; a refusal is one line."""
    pruned = cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, round_to=1, ranking="global")))
    write_pipeline(tmp_path / "released", pruned, scheduler)
    write_package(tmp_path / "version", tmp_path, pruned, scheduler, protocol)
    registry.create(NAME, str(tmp_path / "version"), None, {}, "")

    assert "4 images" in check_canary(tmp_path / "version", 1.0, variant="onnx")
    assert "off by 0 levels" in check_variant_canary(tmp_path / "version", "int8-dynamic", 0.0, [5, 6])
    with pytest.raises(InputError, match="off by"):
        check_canary(tmp_path / "version", 0.0, [5, 6], variant="int8-dynamic")
    with serving(tmp_path) as ask:
        expected, found, integers = (
            np.stack(pictures(ask(range(20), **params))).astype(int)
            for params in ({}, {"variant": "onnx"}, {"variant": "int8-dynamic"})
        )
        refusal = ask([1], variant="int8")
    assert np.abs(found - expected).max() <= 1
    assert 0 < np.abs(integers - expected).mean() < 30
    assert refusal.splitlines()[-1].startswith("Error: variant 'int8': Espalier alone opens it; allowed: int8-dynamic,")


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["labels", "embeddings"])
def test_a_graph_draws_classes_as_the_model_does(
    registry,  # noqa: ARG001
    tmp_path,
    make_unet,
    conditional,
    scheduler,
    protocol,
    name,
):
    """Guided, from labels and from embeddings of classes, with a label that is given or derived."""
    unet = conditional if name == "embeddings" else make_unet(num_class_embeds=5)
    sampler = SamplerParams(steps=2, clip=False)
    guided = protocol.model_copy(update={"sampler": sampler, "guidance": 2.0})
    write_pipeline(tmp_path / "dense", unet, scheduler)
    config = {"num_classes": 4, "unconditional": 4} | ({"width": 12} if name == "embeddings" else {})
    write_json(tmp_path / "dense" / "class_embedding" / "config.json", config)
    if name == "embeddings":
        table = {"weight": torch.randn(5, 12)}
        write_tensors(tmp_path / "dense" / "class_embedding" / "diffusion_pytorch_model.safetensors", table)
    write_pipeline(tmp_path / "released", unet, scheduler, tmp_path / "dense")
    write_package(tmp_path / "version", tmp_path, unet, scheduler, guided)
    model = mlflow.pyfunc.load_model(str(tmp_path / "version"))

    for given in ({"seed": [5, 6]}, {"seed": [5, 6], "label": [3, 0]}):
        expected, found = (
            np.stack(pictures(model.predict(given, params={"variant": variant}))).astype(int)
            for variant in (None, "onnx")
        )
        assert np.abs(found - expected).max() <= 1
    assert np.abs(found[0] - found[1]).max() > 1
