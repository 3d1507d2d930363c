"""An adapter of the dense model, sliced by a pruning plan, is one of the pruned model."""

import pytest
import torch
from click.testing import CliRunner
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from stages.importance.measure import measure_importance
from stages.models.branches import find_branches, removable
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.shortcuts import without_branches
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut, slice_tensors
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_metadata, read_tensors
from stages.tools.__main__ import main
from stages.tools.lora.slicing import ADAPTED, slice_adapter
from tests.loras import LAYOUTS, PEFT, SCALE, make_lora, merge, product

MODELS = {
    "unet": st.fixed_dictionaries(
        {
            "block_out_channels": st.sampled_from([(8, 16), (16, 32)]),
            "attention_head_dim": st.sampled_from([None, 4]),
            "num_class_embeds": st.sampled_from([None, 3]),
        }
    ),
    "conditional": st.fixed_dictionaries(
        {"use_linear_projection": st.booleans(), "attention_head_dim": st.sampled_from([2, 4])}
    ),
    "dit": st.fixed_dictionaries(
        {"num_attention_heads": st.sampled_from([2, 4]), "num_layers": st.sampled_from([2, 3])}
    ),
}
PLANS = st.fixed_dictionaries(
    {
        "target": st.floats(0.1, 0.6).map(lambda ratio: {"ratio": ratio}),
        "ranking": st.sampled_from(["uniform", "global"]),
        "heads": st.sampled_from(["width", "whole"]),
        "order": st.just("upfront"),
    }
)
ANY = {"params": PLANS, "seed": st.integers(0, 99), "depth": st.booleans(), "layout": st.sampled_from(list(LAYOUTS))}


@pytest.fixture
def build(make_unet, make_dit):
    """Build a small dense model of a family."""

    def build_conditional(**changes):
        torch.manual_seed(0)
        widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
        blocks = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        channels = {"in_channels": 3, "out_channels": 3, "cross_attention_dim": 6}
        return UNet2DConditionModel(**widths, **blocks, **channels, **changes).eval()

    return {"unet": make_unet, "conditional": build_conditional, "dit": make_dit}


def make_plan(dense, seed=0, removed=(), **params):
    """Plan a cut by random scores."""
    importance = measure_importance(dense, DDPMScheduler(), [], [], criterion="random", formula="paper")
    return plan_pruning(dense, importance, PruneParams(**params), seed, removed=removed)


def adapted(model):
    """Name the layers that a LoRA can adapt."""
    return [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]


def check_equality(dense, plan, layout, *, exact):
    """Assert that W + s·B·A sliced is W sliced + s·(B sliced)·(A sliced), for every layer that is left.

    With integers as factors bit for bit; with others up to the rounding of sums of r products in any order.
    """
    layers = [
        name for name in adapted(dense) if layout == "peft" or not isinstance(dense.get_submodule(name), nn.Embedding)
    ]
    tensors, names = make_lora(dense, layers, layout, exact=exact)
    sliced = slice_adapter(tensors, dense, plan)
    merged = type(dense).from_config(dense.config)
    merged.load_state_dict(merge(dense, tensors, names))
    expected, weights = slice_tensors(merged, plan), slice_tensors(dense, plan)
    left = dict(without_branches(dense, [branch.name for branch in plan.removed]).named_modules())

    assert sliced.dropped == sorted(set(layers) - left.keys())
    for layer, (down, up, *bias) in names.items():
        if layer in sliced.dropped:
            assert not {down, up, *bias} & sliced.tensors.keys()
            continue
        module, factors = dense.get_submodule(layer), (sliced.tensors[down], sliced.tensors[up])
        found = weights[f"{layer}.weight"] + SCALE * product(module, *factors)
        bound = 8 * torch.finfo(torch.float32).eps * (1 + product(module, *(factor.abs() for factor in factors)))
        difference = (found - expected[f"{layer}.weight"]).abs()
        assert torch.equal(found, expected[f"{layer}.weight"]) if exact else (difference <= bound).all(), layer
        if bias:
            added = weights[f"{layer}.bias"] + SCALE * sliced.tensors[bias[0]]
            assert torch.equal(added, expected[f"{layer}.bias"])
    return sliced


CASES = {
    "unet": {"attention_head_dim": 4, "num_class_embeds": 3},
    "conditional": {"use_linear_projection": True, "attention_head_dim": 2},
    "dit": {"num_layers": 3},
}


@pytest.mark.parametrize("family", CASES)
def test_a_slice_of_the_sum_is_the_sum_of_the_slices(build, family):
    """For linear layers, convolutions, attentions without some heads, GEGLU and embeddings, and without a branch."""
    params = {"target": {"ratio": 0.5}, "heads": "whole", "ranking": "uniform", "order": "upfront"}
    dense = build[family](**CASES[family])
    plan = make_plan(dense, 0, [removable(find_branches(dense))[0].name], **params)
    for exact in (True, False):
        sliced = check_equality(dense, plan, "peft", exact=exact)

    assert sliced.narrowed
    assert sliced.dropped
    assert plan.heads


@pytest.mark.e2e
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking builds models for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("family", MODELS)
@given(data=st.data())
def test_a_slice_of_any_sum_is_the_sum_of_the_slices(build, family, data):
    """The same for any widths, heads, plans and layouts."""
    drawn = {name: data.draw(it) for name, it in ANY.items()}
    dense = build[family](**data.draw(MODELS[family]))
    branches = removable(find_branches(dense)) if drawn["depth"] else []
    removed = [branches[drawn["seed"] % len(branches)].name] if branches else []
    try:
        plan = make_plan(dense, drawn["seed"], removed, **drawn["params"])
    except InputError:  # the ratio leaves too little of so small a model
        return
    for exact in (True, False):
        check_equality(dense, plan, drawn["layout"], exact=exact)


@pytest.fixture(scope="module")
def shallow(make_unet):
    """A small dense model and a plan that removes an attention and channels; only read."""
    dense = make_unet(block_out_channels=(8, 16))
    return dense, make_plan(dense, 0, ["mid_block.attentions.0"], target={"ratio": 0.5}, order="upfront")


@pytest.fixture
def folder(tmp_path, shallow, scheduler):
    """The pruned model with its plan, and an adapter of it in the layout of peft."""
    dense, plan = shallow
    write_pipeline(tmp_path / "pruned", cut(dense, plan), scheduler)
    write_json(tmp_path / "pruned" / PLAN, plan.to_json())
    tensors, _ = make_lora(dense, LAYERS)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 3, "lora_alpha": 1.5})
    return tmp_path


ATTENTION = "mid_block.attentions.0.to_q"
LAYERS = ["conv_in", "conv_out", "mid_block.resnets.0.conv1", ATTENTION]


def run(folder, *options, adapter="lora", plan=f"pruned/{PLAN}"):
    """Type the command in a folder."""
    paths = {"adapter": folder / adapter, "plan": folder / plan, "out": folder / "out"}
    arguments = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    return CliRunner().invoke(main, ["lora", *arguments, *map(str, options)])


def test_the_command_writes_an_adapter_that_fits_the_pruned_model(folder, shallow):
    """Beside the weights go peft's config, the plan's hash and run.json; what was dropped is said."""
    result = run(folder)
    pruned, sliced = read_unet(folder / "pruned"), read_tensors(folder / "out" / "adapter_model.safetensors")

    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "3 layers narrowed, 0 as they were",
        f"dropped with the branches that the plan removes: {ATTENTION}",
    ]
    for layer in set(LAYERS) - {ATTENTION}:
        down, up = (sliced[name.format(layer)] for name in PEFT[:2])
        assert product(pruned.get_submodule(layer), down, up).shape == pruned.get_submodule(layer).weight.shape
    assert read_json(folder / "out/adapter_config.json") == read_json(folder / "lora/adapter_config.json")
    assert read_metadata(folder / "out/adapter_model.safetensors")["espalier.plan_sha256"] == shallow[1].sha256
    assert read_json(folder / "out/run.json")["params"]["lora"]["dropped"] == [ATTENTION]


def test_the_dense_shapes_come_from_any_model_of_the_plan(folder, shallow, scheduler):
    """From the pruned model beside the plan, or a dense one that --model names; without either the error says so."""
    write_pipeline(folder / "dense", shallow[0], scheduler)
    (folder / "alone.json").write_bytes((folder / "pruned" / PLAN).read_bytes())

    assert "give a dense or pruned model of this plan by --model" in run(folder, plan="alone.json").output
    assert run(folder, "--model", folder / "dense", plan="alone.json").exit_code == 0


def test_alphas_and_text_encoders_stay_as_they_are(shallow):
    """The factor s is alpha / rank, and the rank stays; a plan cuts no text encoder."""
    dense, plan = shallow
    tensors, _ = make_lora(dense, LAYERS, "kohya")
    text = {"lora_te_text_model_fc1.lora_down.weight": torch.ones(3, 5), "text_encoder.q.lora_A.weight": torch.ones(2)}
    sliced = slice_adapter({**tensors, **text}, dense, plan)
    kept = [name for name in tensors if name.endswith("alpha") and "attentions" not in name]

    assert len(kept) == 3
    for name in (*kept, *text):
        assert torch.equal(sliced.tensors[name], {**tensors, **text}[name])
    assert sliced.num_others == 2


DOWN, UP = (name.format("conv_in") for name in PEFT[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DOWN.replace("conv_in", "conv_on"): torch.ones(3, 1)}, "is for another base: .*conv_on.* adapts the layer"),
        (
            {DOWN: torch.ones(3, 4, 3, 3)},
            r"is for another base: .* has the shape \[3, 4, 3, 3\], .* takes \[r, 1, 3, 3\]",
        ),
        ({UP: torch.ones(9, 3, 1, 1)}, r"has the shape \[9, 3, 1, 1\], the dense layer takes \[8, r, 1, 1\]"),
        ({UP: None}, "has not one A and one B for the layer conv_in"),
        ({UP: torch.ones(8, 2, 1, 1)}, "has the rank 3, .* 2; both must have one rank, 1 or more"),
        ({DOWN: torch.ones(0, 1, 3, 3), UP: torch.ones(8, 0, 1, 1)}, "has the rank 0, .* 0; both must have one rank"),
        ({UP: torch.ones(8, 3, 1, 1, dtype=torch.int8)}, "holds torch.int8"),
        ({UP: torch.full((8, 3, 1, 1), torch.nan)}, "holds NaN or infinite numbers"),
        ({DOWN.replace("base_model.model.", "unet."): torch.ones(3, 1, 3, 3)}, "repeats"),
        ({"base_model.model.conv_in.lora_magnitude_vector.weight": torch.ones(8)}, "belongs to DoRA"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(8)}, "belongs to LoHa"),
        ({"base_model.model.conv_in.bias": torch.ones(8)}, "is no tensor of a LoRA; allowed: .*no trained biases"),
    ],
)
def test_what_is_no_lora_of_the_dense_model_is_refused(shallow, change, message):
    """One line names the first misfit."""
    dense, plan = shallow
    tensors = {**make_lora(dense, ["conv_in"], bias=False)[0], **change}
    with pytest.raises(InputError, match=message):
        slice_adapter({name: tensor for name, tensor in tensors.items() if tensor is not None}, dense, plan)


def test_an_adapter_of_removed_layers_alone_is_refused(shallow):
    """Nothing would be left of it."""
    with pytest.raises(InputError, match="the plan removes every layer that it adapts"):
        slice_adapter(make_lora(shallow[0], [ATTENTION])[0], *shallow)


def test_files_that_cannot_be_sliced_are_refused_and_nothing_is_written(folder):
    """Other formats, damaged files, other configs, and an adapter that was sliced before."""
    (folder / "lora.bin").touch()
    (folder / "damaged.safetensors").write_bytes(b"x")
    (folder / "empty").mkdir()
    found = {name: run(folder, adapter=name) for name in ("absent", "lora.bin", "damaged.safetensors", "empty")}
    for key, value in (
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("modules_to_save", ["conv_out"]),
    ):
        write_json(folder / "lora/adapter_config.json", {key: value})
        found[key] = run(folder)
    written = (folder / "out").exists()
    (folder / "lora/adapter_config.json").unlink()
    assert run(folder).exit_code == 0
    (folder / "out").rename(folder / "once")
    found["sliced"] = run(folder, adapter="once")
    expected = {
        "absent": "absent does not exist; give a safetensors file",
        "lora.bin": "lora.bin is no safetensors file",
        "damaged.safetensors": "is not a whole safetensors file",
        "empty": "has 0 safetensors files",
        "use_dora": "has use_dora; only LoRA can be sliced",
        "init_lora_weights": "has init_lora_weights 'pissa', which changes the weights of the base",
        "peft_type": "has peft_type 'LOHA'; supported: LORA",
        "modules_to_save": "has modules_to_save ['conv_out'], which hold whole weights",
        "sliced": "was sliced by a plan before",
    }

    assert not written
    assert not (folder / "out").exists()
    for name, message in expected.items():
        assert found[name].exit_code == 1
        assert message in found[name].output
        assert len(found[name].output.splitlines()) == 1
