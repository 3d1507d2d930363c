"""DiT: heads and hidden channels are cut, all else stays; the result is the sliced model, saved and loaded."""

import importlib.util

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from stages.models.complexity import count_macs, count_params
from stages.models.families import FAMILIES, example_inputs, forward
from stages.models.groups import find_groups
from stages.models.layer_order import in_run_order, module_name
from stages.models.layout import DENOISERS
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.stock import to_stock
from stages.models.trial import check_prunable, check_runs
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.prune.width_cost import WidthCost
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json


def inputs_of(model, seed=0):
    """Noise, two timesteps, and labels: a class, and no class."""
    draws = torch.Generator().manual_seed(seed)
    inputs = example_inputs(model, batch_size=2)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=draws)
    return {**inputs, "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 2])}


def load_file(path):
    """The pruned class as the file that travels with a model defines it."""
    spec = importlib.util.spec_from_file_location("travelled", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PrunedDiTTransformer2DModel


def test_groups_are_the_heads_and_hidden_channels_of_each_block(dit):
    """Nothing of the width between the blocks, the embeddings or the output is in a group."""
    found = [(group.producers(), group.width, group.blocks) for group in find_groups(dit)]

    assert [(sorted(producers), width, blocks) for producers, width, blocks in found] == [
        part
        for block in ("transformer_blocks.0", "transformer_blocks.1")
        for part in (
            ([f"{block}.attn1.to_k", f"{block}.attn1.to_q", f"{block}.attn1.to_v"], 24, 4),
            ([f"{block}.ff.net.0.proj"], 96, 1),
        )
    ]


@pytest.mark.parametrize("heads", ["width", "whole"])
def test_a_cut_channel_is_one_whose_weights_are_zero(dit, magnitude_of, heads):
    """The dense model without what reads the cut channels computes the same; of narrower heads the scale differs."""
    params = PruneParams(target={"ratio": 0.5}, heads=heads, exclude=("*attn1*",) if heads == "width" else ())
    plan = plan_pruning(dit, magnitude_of(dit), params)
    pruned, inputs = cut(dit, plan), inputs_of(dit)
    with torch.no_grad():
        for name, kept in plan.layers.items():
            if kept.inputs is not None:
                weight = dit.get_submodule(name).weight
                weight[:, [channel for channel in range(weight.shape[1]) if channel not in set(kept.inputs)]] = 0

        assert count_params(pruned) < count_params(dit)
        torch.testing.assert_close(forward(pruned, inputs), forward(dit, inputs))


@pytest.mark.parametrize("chosen", [{}, {"heads": "whole"}, {"ranking": "global", "heads": "whole"}], ids=str)
def test_a_pruned_dit_is_the_same_after_save_and_load(dit, magnitude_of, scheduler, tmp_path, chosen):
    """Bit for bit, the variance too, also by the file beside it and diffusers alone; with any processor."""
    pruned = cut(dit, plan_pruning(dit, magnitude_of(dit), PruneParams(target={"ratio": 0.5}, **chosen)))
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    loaded = read_unet(tmp_path / "pruned")
    plain = load_file(tmp_path / "pruned" / "transformer" / "pruned_dit.py").from_pretrained(
        tmp_path / "pruned" / "transformer"
    )
    noise, *rest = inputs_of(dit).values()

    assert type(plain).__name__ == type(loaded).__name__ == "PrunedDiTTransformer2DModel"
    index = read_json(tmp_path / "pruned" / "model_index.json")
    assert (index["_class_name"], index["transformer"]) == ("DiTPipeline", ["pruned_dit", type(loaded).__name__])
    output = pruned(noise, *rest).sample
    assert output.shape == (2, 2, 8, 8)
    assert torch.equal(loaded(noise, *rest).sample, output)
    assert torch.equal(plain.eval()(noise, *rest).sample, output)
    plain.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "pruned_dit.py").from_pretrained(tmp_path / "again")
    assert torch.equal(again.eval()(noise, *rest).sample, output)
    for block in loaded.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    torch.testing.assert_close(loaded(noise, *rest).sample, output)


@pytest.mark.parametrize("heads", ["width", "whole"])
def test_the_cost_by_formula_is_that_of_the_cut_model(dit, magnitude_of, heads):
    """Parameters and MACs of the plan are counted without building the model; a candidate can be timed."""
    params = PruneParams(target={"ratio": 0.5}, heads=heads)
    pruned = cut(dit, plan_pruning(dit, magnitude_of(dit), params))
    groups = find_groups(dit)
    costs = WidthCost(dit, groups, heads=heads, latency_repeats=3)
    cuts = [group.width // 2 for group in groups]

    assert (costs.params(cuts), costs.macs(cuts)) == (count_params(pruned), count_macs(pruned))
    assert costs.latency_ms(cuts) > 0


def test_labels_are_never_dropped_by_the_model_itself(make_dit, scheduler, tmp_path):
    """finetune.label_dropout decides; diffusers' embedding would draw for each block anew, from the global seed."""
    write_pipeline(tmp_path / "model", make_dit(), scheduler)
    model = read_unet(tmp_path / "model").train()
    inputs = inputs_of(model)

    assert all(torch.equal(forward(model, inputs), forward(model, inputs)) for _ in range(8))


def test_layers_are_named_by_block_and_ordered_as_they_run(dit):
    """For tables and figures; every family's folder in a pipeline is one that is looked for."""
    layers = [name for name, module in dit.named_modules() if isinstance(module, torch.nn.Linear)]
    ordered = in_run_order(["proj_out_2", "proj_out_1", *layers[:3], "pos_embed.proj"])

    assert ordered == ["pos_embed.proj", *layers[:3], "proj_out_1", "proj_out_2"]
    assert module_name("transformer_blocks.1.attn1.to_q") == "block 1 · attention"
    assert module_name("transformer_blocks.0.ff.net.0.proj") == "block 0 · feed-forward"
    assert module_name("proj_out_1") == "proj out 1"
    assert {family.component for family in FAMILIES.values()} == set(DENOISERS)


def test_a_pruned_dit_has_no_stock_config(dit, magnitude_of):
    """Which the export says in one line."""
    pruned = cut(dit, plan_pruning(dit, magnitude_of(dit), PruneParams(target={"ratio": 0.5})))

    with pytest.raises(InputError, match="only a UNet2DModel with a sinusoidal timestep embedding can be converted"):
        to_stock(pruned, 1000)


def test_a_dit_passes_the_trial(dit):
    """It runs at its timesteps, and a copy without weights is scored and cut."""
    check_runs(dit, 1000, "here")
    check_prunable(dit, "here")


def test_the_first_configs_on_the_hub_are_read(make_dit, scheduler, tmp_path):
    """They name the class Transformer2DModel."""
    model = make_dit()
    write_pipeline(tmp_path / "model", model, scheduler)
    path = tmp_path / "model" / "transformer" / "config.json"
    others = {"attention_type": "default", "cross_attention_dim": None, "only_cross_attention": False}
    write_json(path, {**read_json(path), **others, "_class_name": "Transformer2DModel"})
    loaded = read_unet(tmp_path / "model")

    assert torch.equal(forward(loaded, inputs_of(model)), forward(model, inputs_of(model)))
    assert torch.equal(loaded.pos_embed.pos_embed, model.pos_embed.pos_embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single'; supported: ada_norm_zero"),
        ({"activation_fn": "geglu"}, "activation_fn 'geglu'; supported: gelu and gelu-approximate"),
        ({"out_channels": 3}, "in_channels 1 and out_channels 3; supported: equal numbers, or twice"),
        ({"sample_size": 9}, "sample_size 9 and patch_size 2; supported: square samples"),
        ({"sample_size": [8, 4]}, r"sample_size \[8, 4\] and patch_size 2"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm None; supported: a positive integer"),
        ({"num_layers": 300}, "num_layers 300; supported: at most 256"),
        ({"num_layers": 250}, "the config describes 250 layers or more, the weights"),
        ({"caption_channels": 16, "_class_name": "Transformer2DModel"}, "caption_channels 16; supported"),
    ],
    ids=str,
)
def test_what_no_dit_has_is_refused(dit, scheduler, tmp_path, change, message):
    """In one line with the key, before anything is built."""
    write_pipeline(tmp_path / "model", dit, scheduler)
    path = tmp_path / "model" / "transformer" / "config.json"
    write_json(path, {**read_json(path), **change})

    with pytest.raises(InputError, match=message) as caught:
        read_unet(tmp_path / "model")
    assert "\n" not in caught.value.message
