"""Forms of a model: ONNX graphs, integer weights, reuse of deep features, and the folders that hold them."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stages.costs import variants
from stages.costs.params import CostsParams
from stages.costs.variants import Candidate, measure_variants, read_candidates
from stages.drawing.labels import Labels
from stages.drawing.loaded import load_model
from stages.drawing.source import WEIGHT_FILES, Settings
from stages.models.families import example_inputs, family_of
from stages.models.params import SamplerParams
from stages.models.pipeline import CPU, read_scheduler, read_unet, write_pipeline
from stages.models.sampling import SamplingContext, draw, image_seeds
from stages.models.variants.cache import cache, interval_of
from stages.models.variants.folder import (
    ROUNDED_FILES,
    check_variant,
    read_model,
    read_variant,
    read_variant_record,
    variant_file,
    variant_folders,
    write_variant,
)
from stages.models.variants.graph import OPSET, export_graph, graph_model
from stages.models.variants.kinds import Kind, parse_kind
from stages.models.variants.rounding import (
    GROUP,
    dequantize,
    dequantize_tensors,
    quantize,
    quantize_tensors,
    to_float8,
)
from stages.prune.params import PruneParams, Target
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.bounded import MAX_JSON_BYTES
from stages.runtime.errors import InputError

SAMPLER = SamplerParams(steps=5)
SESSION = """
import sys
import numpy, onnxruntime
assert not [name for name in sys.modules if name.startswith(("stages", "torch", "diffusers"))]
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(output,) = session.run(None, dict(numpy.load("inputs.npz")))
numpy.save("output.npy", output)
"""
TOLERANCE = 1e-4
"""Largest difference of a graph's prediction from PyTorch's, in units of its largest value."""


def noisy_inputs(model, batch, seed=0, timestep=37):
    """Inputs of a model from a seeded generator."""
    inputs, draws = example_inputs(model, batch), torch.Generator().manual_seed(seed)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=draws)
    inputs["timestep"] = torch.full((batch,), timestep)
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = torch.randn(batch, 3, inputs["encoder_hidden_states"].shape[2])
    return inputs


@torch.inference_mode()
def predict(model, inputs):
    """Predict, without changing the inputs."""
    rest = {name: value for name, value in inputs.items() if name != "sample"}
    return model(inputs["sample"], **rest).sample


@pytest.fixture
def pruned(unet, magnitude):
    """The tiny UNet at odd widths."""
    params = PruneParams(target=Target(ratio=0.3), round_to=1, ranking="global")
    return cut(unet, plan_pruning(unet, magnitude, params, 0)).eval()


@pytest.mark.parametrize(
    ("parts", "kind", "name"),
    [
        ("int8", Kind("int8"), "int8"),
        (["cache-3", "int4"], Kind("int4", 3), "int4+cache-3"),
        ("int8-dynamic", Kind("int8-dynamic"), "int8-dynamic"),
        (("cache-12",), Kind(interval=12), "cache-12"),
    ],
)
def test_parts_combine_in_any_order(parts, kind, name):
    """At most one form and one cache; the name does not depend on their order."""
    assert parse_kind(parts) == kind
    assert kind.name == name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("fp8", "'fp8' is not a kind of variant; allowed: int8, int4, float8, onnx, int8-dynamic, cache-N"),
        ("torch-export", "puts a pickle of the example inputs into its file; use onnx"),
        ("cache-1", "cache-1 reuses nothing"),
        (["int8", "int4"], r"\[int8, int4\] is not one variant"),
        (["int8", "float8"], r"combine at most one of each: int8, int4 or float8; cache-N"),
        (["cache-2", "cache-3"], "is not one variant"),
        ([], "is not one variant"),
        (["onnx", "cache-2"], "an ONNX graph is one whole pass; combine cache-N with int8, int4 or float8"),
    ],
)
def test_what_is_no_variant_is_refused(parts, message):
    """Unknown parts, and parts that exclude each other; the line says what is allowed."""
    with pytest.raises(ValueError, match=message):
        parse_kind(parts)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 150)),
    scale=st.floats(1e-20, 1e20),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**32),
)
def test_the_error_of_an_integer_weight_is_half_a_step(shape, scale, bits, seed):
    """|w - s q| ≤ s / 2, with the scale s of its channel or group; integers fit their bits."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    integers, scales = quantize(weight, bits)

    error = (dequantize(integers, scales, weight.shape) - weight).abs()

    group = GROUP if bits == 4 else shape[1]
    steps = scales.repeat_interleave(group, dim=1)[:, : shape[1]]
    assert bool((error <= 0.5 * steps * (1 + 1e-5)).all())
    assert integers.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert integers.nbytes == shape[0] * (shape[1] if bits == 8 else -(-shape[1] // 2))


def test_integers_times_scales_are_exact():
    """Weights that are multiples of a step stay as they are, also zeros and an odd number of them."""
    weight = torch.arange(-7, 8).float().repeat(3, 9) * torch.tensor([[0.25], [2.0], [0.0]])
    for bits in (4, 8):
        integers, scales = quantize(weight * (127 / 7 if bits == 8 else 1), bits)
        found = dequantize(integers, scales, weight.shape) / (127 / 7 if bits == 8 else 1)
        torch.testing.assert_close(found, weight, rtol=0.02 if bits == 8 else 1e-6, atol=0.02)
    assert not dequantize(*quantize(torch.zeros(2, 3), 8), torch.Size((2, 3))).any()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 150)),
    scale=st.floats(1e-20, 1e20),
    seed=st.integers(0, 2**32),
)
def test_the_error_of_a_float8_weight_is_a_sixteenth(shape, scale, seed):
    """|w - s q| ≤ |w| / 16, or s / 1024 where e4m3 has no more exponents; the largest of a channel stays."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values, scales = to_float8(weight)
    again = dequantize(values, scales, weight.shape)

    allowed = torch.maximum(weight.abs() / 16, scales / 1024)
    assert bool(((again - weight).abs() <= allowed * (1 + 1e-5)).all())
    torch.testing.assert_close(again.abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0)
    assert (values.dtype, values.nbytes) == (torch.float8_e4m3fn, weight.numel())
    assert not dequantize(*to_float8(torch.zeros(2, 3)), torch.Size((2, 3))).any()


@pytest.mark.parametrize(("form", "end"), [("int8", "integers"), ("float8", "float8")])
def test_rounded_weights_that_do_not_fit_are_refused(unet, form, end):
    """Without their scales, of another shape, or of an unknown weight."""
    tensors, shapes = quantize_tensors(unet.state_dict(), form), {k: v.shape for k, v in unet.state_dict().items()}
    name = "conv_in.weight"

    for wrong in (
        {key: value for key, value in tensors.items() if key != f"{name}.scales"},
        {**tensors, f"{name}.{end}": torch.zeros(1, 2, dtype=torch.int8)},
        {**tensors, f"other.weight.{end}": torch.zeros(1, 2, dtype=torch.int8)},
    ):
        with pytest.raises(ValueError, match="weight"):
            dequantize_tensors(wrong, shapes, form)


@pytest.mark.parametrize(
    ("bits", "values", "scales", "shape"),
    [
        (8, (1, 4000), (1, 50_000), (1, 4000)),
        (4, (2, 32), (2, 40), (2, 64)),
        (4, (2, 4000), (2, 1), (2, 64)),
        (8, (6,), (2, 1), (2, 3)),
        (8, (2, 3), (2,), (2, 3)),
        (8, (2, 3), (2, 1), (2,)),
    ],
)
def test_the_shapes_of_rounded_weights_are_checked_before_they_are_used(bits, values, scales, shape):
    """Scales that are too many would be repeated for every column, and one dimension has no columns."""
    kind = torch.int8 if bits == 8 else torch.uint8
    with pytest.raises(ValueError, match=r"have the shape .*, expected |has no rounded values"):
        dequantize(torch.zeros(values, dtype=kind), torch.zeros(scales), torch.Size(shape))


def test_rounded_weights_have_the_type_of_their_form(unet):
    """Bytes would be taken for two integers of 4 bits, and other scales for more than was measured."""
    tensors, shapes = quantize_tensors(unet.state_dict(), "int8"), {k: v.shape for k, v in unet.state_dict().items()}
    integers, scales = (f"conv_in.weight.{end}" for end in ("integers", "scales"))
    for wrong in ({integers: tensors[integers].to(torch.uint8)}, {scales: tensors[scales].double()}):
        with pytest.raises(ValueError, match=r"conv_in\.weight .*are torch\..*, expected torch\."):
            dequantize_tensors(tensors | wrong, shapes, "int8")


def break_integers(folder, end, change):
    """Replace a tensor of the integers of conv_in and their hash."""
    path = folder / "unet/integers.safetensors"
    tensors = load_file(path)
    name = f"conv_in.weight.{end}"
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)
    note_hash(folder, "unet/integers.safetensors")


def note_hash(folder, name):
    """Write the hash of a changed file into the record of a variant."""
    record = json.loads((folder / "variant.json").read_text())
    record["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "variant.json").write_text(json.dumps(record))


def test_a_damaged_folder_of_integers_is_refused(unet, scheduler, tmp_path):
    """In one line, whatever its config or tensors hold; the gate opens it outside of the sandbox."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    (tmp_path / "int8").mkdir()
    write_variant("dense", tmp_path / "model", Kind("int8"), tmp_path / "int8")
    config = json.loads((tmp_path / "int8/unet/config.json").read_text())
    for change, reason in (
        ({"norm_num_groups": 0}, "zero"),
        ({"attention_head_dim": 0}, "zero|heads"),
        ({"layers_per_block": 200}, "the config describes .* layers or more"),
    ):
        (tmp_path / "int8/unet/config.json").write_text(json.dumps(config | change))
        note_hash(tmp_path / "int8", "unet/config.json")
        with pytest.raises(InputError, match=rf"integers\.safetensors: .*({reason})"):
            read_variant(tmp_path / "int8")
    (tmp_path / "int8/unet/config.json").write_text(json.dumps(config))
    note_hash(tmp_path / "int8", "unet/config.json")
    for end in ("integers", "scales"):
        shutil.copytree(tmp_path / "int8", tmp_path / end)
        break_integers(tmp_path / end, end, torch.flatten)
        with pytest.raises(InputError, match=r"integers\.safetensors: .*conv_in\.weight .*; run the variants stage"):
            read_variant(tmp_path / end)


@pytest.mark.parametrize("name", ["unet", "conditional", "dit4"])
def test_a_cache_of_one_is_no_cache(request, make_dit, name):
    """Every pass is full, and every image is the same to the bit; so are the weights and the config."""
    model = make_dit(num_layers=4) if name == "dit4" else request.getfixturevalue(name)
    cached = cache(copy.deepcopy(model), 1)

    for timestep in (900, 500, 500, 20):
        inputs = noisy_inputs(model, 2, timestep, timestep)
        assert torch.equal(predict(cached, inputs), predict(model, inputs))
    assert cached.state_dict().keys() == model.state_dict().keys()


def test_between_full_passes_the_deep_blocks_do_not_run(unet):
    """They run in every third pass, and again as soon as the timestep does not fall or the batch changes."""
    cached, ran = cache(copy.deepcopy(unet), 3), []
    cached.mid_block.resnets[0].register_forward_hook(lambda *_: ran.append(len(ran)))
    counts = []
    for timestep, batch in [(9, 2), (8, 2), (7, 2), (6, 2), (5, 2), (5, 2), (4, 2), (3, 1), (9, 1)]:
        predict(cached, noisy_inputs(unet, batch, 0, timestep))
        counts.append(len(ran))

    assert np.diff([0, *counts]).tolist() == [1, 0, 0, 1, 0, 1, 0, 1, 1]
    assert interval_of(cached) == 3
    assert interval_of(unet) == 1


@pytest.mark.parametrize("name", ["unet", "conditional", "dit4"])
def test_what_is_reused_is_that_of_the_full_pass(request, make_dit, name):
    """To the bit: the plain model, whose deep blocks put out, or add, what they did in the full pass."""
    model = make_dit(num_layers=4) if name == "dit4" else request.getfixturevalue(name)
    cached = cache(copy.deepcopy(model), 2)
    full, later = noisy_inputs(model, 2, 0, 50), noisy_inputs(model, 2, 1, 49)
    predict(cached, full)
    reused, plain = predict(cached, later), predict(model, later)
    deep, inputs, outputs = family_of(model).deep_blocks(model), [], []

    def reuse(_module, _inputs, output):
        outputs.append(output)
        if len(outputs) == 2:
            return inputs[1][0] + (outputs[0] - inputs[0][0]) if name == "dit4" else outputs[0]
        return None

    model.get_submodule(deep[0]).register_forward_pre_hook(lambda _module, found: inputs.append(found))
    model.get_submodule(deep[-1]).register_forward_hook(reuse)
    predict(model, full)

    assert torch.equal(reused, predict(model, later))
    assert not torch.equal(reused, plain)


def test_images_do_not_depend_on_the_batch_size_of_a_cache(unet, scheduler):
    """Each image's trajectory begins with a full pass, and a copy of the model has a state of its own."""
    cached, seeds = cache(copy.deepcopy(unet), 2), image_seeds(0, 6)
    drawn = [draw(cached, scheduler, seeds, SAMPLER, batch_size=size, label="cached") for size in (2, 6)]

    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1  # sums over another batch are rounded otherwise
    assert np.abs(drawn[0].astype(int) - draw(unet, scheduler, seeds, SAMPLER, batch_size=6, label="plain")).max() > 0


@pytest.mark.parametrize(("changes", "family"), [({"block_out_channels": (16,)}, "UNet2DModel")])
def test_a_model_without_deep_blocks_has_no_cache(make_unet, make_dit, changes, family):
    """A UNet of one resolution, a DiT of three blocks."""
    flat = make_unet(**changes, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    for model, name in ((flat, family), (make_dit(num_layers=3), "DiTTransformer2DModel")):
        with pytest.raises(InputError, match=f"cache-N reuses the blocks .* this {name} has none"):
            check_variant(model, Kind(interval=2))


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["pruned", "conditional", "dit"])
def test_a_graph_predicts_and_draws_what_pytorch_does(request, tmp_path, scheduler, latents, name):
    """Odd widths, a condition, a transformer: batches of any size within 1e-4, and pixels within one of 255 levels."""
    pytest.importorskip("onnxruntime")
    model = request.getfixturevalue(name)
    write_pipeline(tmp_path / "model", model, scheduler)
    (tmp_path / "variant").mkdir()
    write_variant("pruned", tmp_path / "model", Kind("onnx"), tmp_path / "variant")
    graph = read_variant(tmp_path / "variant")

    assert type(graph) is type(read_unet(tmp_path / "model"))
    assert not list(graph.parameters())
    for batch in (1, 2, 70):
        inputs = noisy_inputs(model, batch, batch)
        expected = predict(model, inputs)
        assert (predict(graph, inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    table = {"conditional": latents.conditions.table if latents.conditions else None, "dit": np.arange(3)}.get(name)
    context, labels = SamplingContext(table=table), [] if table is None else [0, 1, 1]
    drawn = [
        draw(it, scheduler, [3, 4, 5], SAMPLER, batch_size=3, label=name, context=context, labels=labels)
        for it in (model, graph)
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_a_graph_draws_in_float32_alone(tmp_path, unet, scheduler):
    """In another precision its inputs would be rounded, and nothing else."""
    pytest.importorskip("onnxruntime")
    write_pipeline(tmp_path / "model", unet, scheduler)
    (tmp_path / "variant").mkdir()
    write_variant("pruned", tmp_path / "model", Kind("onnx"), tmp_path / "variant")
    settings = Settings(SamplerParams(steps=4), None, "bfloat16", 2)

    with pytest.raises(InputError, match="mine is a graph, which computes in float32, and its precision is bfloat16"):
        load_model(tmp_path / "variant", settings, Labels(), "mine")


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SamplerParams(steps=2), r"mine has cache-4, and reference\.sampler\.steps is 2: .* at most cache-2, or more"),
        (
            SamplerParams(steps=4, scheduler="HeunDiscrete", spacing="linspace"),
            "mine has cache-4, and HeunDiscrete calls the model twice at some timesteps, .* choose cache-2, or another",
        ),
    ],
)
def test_a_cache_draws_under_the_settings_of_params_alone(tmp_path, model_folder, sampler, message):
    """Otherwise images come from one full pass, or from the passes of another cache."""
    (tmp_path / "variant").mkdir()
    write_variant("pruned", model_folder, Kind(interval=4), tmp_path / "variant")

    load_model(tmp_path / "variant", Settings(SamplerParams(steps=4), None, "float32", 2), Labels(), "mine")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "variant", Settings(sampler, None, "float32", 2), Labels(), "mine")


FORMS = {"int8": (".integers", torch.int8), "float8": (".float8", torch.float8_e4m3fn)}


@pytest.mark.parametrize("form", FORMS)
def test_a_rounded_folder_holds_values_of_8_bits_and_no_pickle(tmp_path, model_folder, unet, form):
    """Safetensors of them, a quarter of the bytes, as near to the weights as they can be; card and hashes are there."""
    (tmp_path / "variant").mkdir()
    write_variant("dense", model_folder, Kind(form, 2), tmp_path / "variant")
    end, kind = FORMS[form]
    record, file = read_variant_record(tmp_path / "variant"), variant_file(tmp_path / "variant")
    tensors = load_file(file)

    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(end)} == {kind}
    assert file.name == ROUNDED_FILES[form]
    assert file.name in WEIGHT_FILES
    assert record.name == f"dense+{form}+cache-2"
    assert f"{form} + cache-2" in (tmp_path / "variant/README.md").read_text()
    found = {path.relative_to(tmp_path / "variant").as_posix() for path in file.parents[1].rglob("*") if path.is_file()}
    assert found == {*record.files, "variant.json"}
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pkl"))]
    again, weights = read_variant(tmp_path / "variant"), unet.state_dict()
    assert interval_of(again) == 2
    for name, tensor in again.state_dict().items():
        scales = tensors.get(f"{name}.scales")
        steps = torch.zeros(()) if scales is None else scales.reshape(-1, *[1] * (tensor.ndim - 1))
        allowed = 0.5001 * steps if form == "int8" else torch.maximum(weights[name].abs() / 15.99, steps / 1023)
        assert bool(((tensor - weights[name]).abs() <= allowed).all())


EXPORTED = [pytest.param(Kind(form), marks=pytest.mark.e2e, id=form) for form in ("onnx", "int8-dynamic")]


@pytest.mark.parametrize("kind", [Kind("int4"), Kind("float8"), Kind(interval=3), *EXPORTED])
def test_equal_models_give_equal_folders(tmp_path, model_folder, kind):
    """Also graphs, which name neither a file nor a line of the program that exported them."""
    if kind.is_graph:
        pytest.importorskip("onnxruntime")
    records = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_variant("dense", model_folder, kind, tmp_path / name)
        records.append(read_variant_record(tmp_path / name))

    assert records[0] == records[1]
    assert b".py" not in variant_file(tmp_path / "one").read_bytes()
    assert variant_folders(tmp_path) == [tmp_path / "one", tmp_path / "two"]
    assert draw(
        read_model(tmp_path / "one"), read_scheduler(tmp_path / "one"), [1], SAMPLER, batch_size=1, label="x"
    ).any()


def test_a_damaged_variant_is_refused(tmp_path, model_folder):
    """Other bytes than those whose hash was written, or a record of another version."""
    (tmp_path / "variant").mkdir()
    write_variant("dense", model_folder, Kind("int8"), tmp_path / "variant")
    file = variant_file(tmp_path / "variant")
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    with pytest.raises(InputError, match=r"is not the file that .*variant\.json names; run the variants stage"):
        read_variant(tmp_path / "variant")

    record = json.loads((tmp_path / "variant/variant.json").read_text())
    (tmp_path / "variant/variant.json").write_text(json.dumps({**record, "form": "int3"}))
    with pytest.raises(InputError, match=r"variant\.json"):
        read_variant(tmp_path / "variant")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_another_config_than_that_of_the_variant_is_refused(tmp_path, model_folder, name):
    """It would draw other images; its card may be edited."""
    (tmp_path / "variant").mkdir()
    write_variant("dense", model_folder, Kind("int8"), tmp_path / "variant")
    (tmp_path / "variant/README.md").write_text("mine")
    read_variant(tmp_path / "variant")
    (tmp_path / "variant" / name).write_text((tmp_path / "variant" / name).read_text() + " ")

    with pytest.raises(InputError, match=rf"{name} is not the file that .*variant\.json names"):
        read_variant(tmp_path / "variant")


@pytest.fixture
def doubling(tmp_path, unet):
    """A model of the tiny UNet's class whose graph doubles the sample and adds the timestep."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    shape, number = ["batch", 1, 8, 8], TensorProto.FLOAT
    nodes = [
        helper.make_node("Add", ["sample", "sample"], ["twice"]),
        helper.make_node("Reshape", ["timestep", "column"], ["added"]),
        helper.make_node("Add", ["twice", "added"], ["prediction"]),
    ]
    inputs = [helper.make_tensor_value_info(*it) for it in (("sample", number, shape), ("timestep", number, ["batch"]))]
    outputs = [helper.make_tensor_value_info("prediction", number, shape)]
    column = [helper.make_tensor("column", TensorProto.INT64, [4], [-1, 1, 1, 1])]
    graph = helper.make_graph(nodes, "doubling", inputs, outputs, column)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, tmp_path / "doubling.onnx")
    return graph_model(copy.deepcopy(unet), tmp_path / "doubling.onnx")


def test_a_graph_stands_in_for_a_model(doubling, unet):
    """It has the class, config, type and device of the model and none of its layers; one timestep counts for all."""
    sample = torch.randn(3, 1, 8, 8)

    assert torch.equal(doubling(sample, torch.tensor(7)).sample, 2 * sample + 7)
    assert torch.equal(copy.deepcopy(doubling)(sample, timestep=torch.arange(3)).sample[2], 2 * sample[2] + 2)
    assert (doubling.dtype, doubling.device) == (unet.dtype, unet.device)
    assert type(doubling) is type(unet)
    assert not [*doubling.parameters(), *doubling.children()]


def test_a_graph_may_be_larger_than_a_json_file(doubling, unet, tmp_path):
    """Those of CIFAR-10 and all larger systems are; ONNX itself ends at 2 GB."""
    import onnx

    graph = onnx.load(tmp_path / "doubling.onnx")
    weights = np.zeros(MAX_JSON_BYTES // 4, np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    onnx.save(graph, tmp_path / "large.onnx")
    sample = torch.randn(1, 1, 8, 8)

    assert (tmp_path / "large.onnx").stat().st_size > MAX_JSON_BYTES
    large = graph_model(copy.deepcopy(unet), tmp_path / "large.onnx")
    assert torch.equal(large(sample, 7).sample, doubling(sample, 7).sample)


def test_a_graph_is_timed_in_its_own_runtime(doubling, unet, tmp_path):
    """Its rows name ONNX Runtime and have memory; a cache has the mean of a cycle; equal architectures share rows."""
    cached = cache(copy.deepcopy(unet), 2)
    candidates = {
        "dense": Candidate(unet, "a" * 64),
        "dense+onnx": Candidate(doubling, "b" * 64, graph=tmp_path / "doubling.onnx"),
        "dense+int8": Candidate(copy.deepcopy(unet), "c" * 64),
        "dense+cache-2": Candidate(cached, "d" * 64, interval=2),
    }
    rows = {row.model: row for row in measure_variants(candidates, CostsParams(batches=(2,), repeats=6, seconds=0.2))}

    assert {name: row.mode for name, row in rows.items() if row.mode != "eager"} == {"dense+onnx": "onnxruntime"}
    assert all(row.median_ms and row.peak_bytes and row.passes == 6 for row in rows.values())
    assert rows["dense+onnx"].peak_bytes < 100 * 2**20  # not the memory of this process, which started it
    assert rows["dense+int8"].median_ms == rows["dense"].median_ms
    assert rows["dense+cache-2"].median_ms != rows["dense"].median_ms


def test_the_limit_of_time_counts_whole_cycles(unet, monkeypatch):
    """Three cycles of five passes are what must fit, and not three of their means."""
    seen = []

    def measure(candidates, batch, pace_ms, params):
        seen.append(pace_ms)
        rows = [variants._row(name, it, batch, params) for name, it in candidates.items()]
        return [row.model_copy(update={"median_ms": 2.0}) for row in rows]

    monkeypatch.setattr(variants, "_measure", measure)
    cached = Candidate(cache(copy.deepcopy(unet), 5), "b" * 64, interval=5)
    candidates = {"dense": Candidate(unet, "a" * 64), "dense+cache-5": cached}
    measure_variants(candidates, CostsParams(batches=(1, 2)))

    assert seen == [0, 2.0 + 5 * 2.0]


def test_what_is_timed_once_is_in_memory_once(unet, scheduler, tmp_path):
    """Integers of any number of bits are their model in float32; each interval of a cache is a model of its own."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    for kind in (Kind("int8"), Kind("int4"), Kind("float32", 2), Kind("int8", 2), Kind("float32", 3)):
        (tmp_path / "variants" / kind.name).mkdir(parents=True)
        write_variant("dense", tmp_path / "model", kind, tmp_path / "variants" / kind.name)
    candidates = read_candidates({"dense": unet}, {"dense": "a" * 64}, tmp_path / "variants", CPU)

    held = {name: id(candidate.unet) for name, candidate in candidates.items()}
    assert held["dense"] == held["dense+int8"] == held["dense+int4"]
    assert held["dense+cache-2"] == held["dense+int8+cache-2"]
    assert (len(candidates), len(set(held.values()))) == (6, 3)
    assert candidates["dense"].sha256 != candidates["dense+int8"].sha256 != candidates["dense+int4"].sha256
    assert read_candidates({"dense": unet}, {"dense": "a" * 64}, tmp_path / "none", CPU) == {}


def test_a_damaged_graph_is_refused(tmp_path, unet):
    """In one line with the path."""
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(b"no graph")

    with pytest.raises(InputError, match=r"ONNX Runtime cannot open .*x\.onnx"):
        graph_model(unet, tmp_path / "x.onnx")


def test_a_config_beside_a_graph_that_cannot_be_built_is_refused(tmp_path, unet, scheduler):
    """In one line, although the graph needs no layer of it."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    (tmp_path / "onnx").mkdir()
    write_variant("dense", tmp_path / "model", Kind("onnx"), tmp_path / "onnx")
    path = tmp_path / "onnx" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_num_groups": 0}))
    note_hash(tmp_path / "onnx", "unet/config.json")
    with pytest.raises(InputError, match=r"model\.onnx: the config beside it cannot be built .*zero"):
        read_variant(tmp_path / "onnx")


@pytest.mark.network
def test_a_graph_runs_where_there_is_only_onnx_runtime(pruned, tmp_path):
    """An environment with onnxruntime and numpy and nothing of this project predicts what PyTorch does."""
    from importlib.metadata import version

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    packages = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "pip", "install", "--python", python, *packages], check=True, capture_output=True)
    check_plain_session(str(python), pruned, tmp_path)


@pytest.mark.e2e
def test_a_graph_runs_without_this_project(pruned, tmp_path):
    """So does a process that imports nothing of it."""
    pytest.importorskip("onnxruntime")
    check_plain_session(sys.executable, pruned, tmp_path)


def check_plain_session(python, model, folder):
    """Run a graph in a process of its own with inputs from a file, and compare the prediction."""
    inputs = noisy_inputs(model, 3)
    arrays = {"sample": inputs["sample"].numpy(), "timestep": inputs["timestep"].float().numpy()}
    np.savez(folder / "inputs.npz", **arrays)
    export_graph(model, Kind("onnx"), folder / "model.onnx")
    subprocess.run([python, "-I", "-c", SESSION], check=True, cwd=folder, capture_output=True)
    expected = predict(model, inputs)

    assert np.abs(np.load(folder / "output.npy") - expected.numpy()).max() <= TOLERANCE * float(expected.abs().max())


def test_a_graph_needs_its_packages(unet, monkeypatch, tmp_path):
    """The line names the extra; a model that the exporter cannot take is one line, too."""
    monkeypatch.setattr("stages.models.variants.graph.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"onnx needs onnx, onnxruntime, onnxscript, which are not installed; install"):
        check_variant(unet, Kind("onnx"))
    monkeypatch.undo()

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"PyTorch cannot export this model to ONNX \(division by zero\); leave onnx"):
        export_graph(unet, Kind("onnx"), tmp_path / "x.onnx")


def test_torch_export_saves_a_pickle(tmp_path):
    """Why torch-export is refused: its archive holds the example inputs as torch.save writes them."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "model.pt2")

    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        (inputs,) = (name for name in archive.namelist() if name.endswith(".pt"))
        with archive.open(inputs) as file, zipfile.ZipFile(file) as inner:
            assert [name for name in inner.namelist() if name.endswith("data.pkl")]


def test_families_name_modules_of_theirs(unet, conditional, make_dit):
    """In the order in which they run; without the outermost blocks."""
    for model in (unet, conditional, make_dit(num_layers=5)):
        names = family_of(model).deep_blocks(model)
        assert all(model.get_submodule(name) for name in names)
        assert not {"down_blocks.0", "up_blocks.1", "transformer_blocks.0", "transformer_blocks.4"} & {*names}
        assert len(names) == 3
