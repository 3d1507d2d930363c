"""Every family can be planned, cut, run, saved and loaded."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stages.importance.measure import CalibrationBatch, measure_importance
from stages.models.families import example_inputs, skeleton
from stages.models.groups import find_groups
from stages.models.pipeline import read_unet, write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.tools.one_shot import plan_one_shot

STEPS = range(0, 1000, 250)


def inputs_of(unet, seed=0):
    """Noise, a timestep and, for a conditional model, a condition."""
    draws = torch.Generator().manual_seed(seed)
    inputs = example_inputs(unet, batch_size=2)
    return {name: torch.randn(t.shape, generator=draws) if t.is_floating_point() else t for name, t in inputs.items()}


def test_a_conditional_unet_is_scored_cut_saved_and_loaded(conditional, scheduler, tmp_path):
    """With Taylor importance, as in the original for ImageNet; the loaded model is bit-identical."""
    inputs = inputs_of(conditional)
    images, condition = inputs["sample"], {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    plan = plan_one_shot(
        conditional, scheduler, images, torch.randn_like(images), STEPS, formula="diffusers", condition=condition
    )
    pruned = cut(conditional, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    loaded = read_unet(tmp_path / "pruned")

    assert type(loaded).__name__ == "PrunedUNet2DConditionModel"
    assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)


def test_the_importance_depends_on_the_condition(conditional, scheduler):
    """Other conditions give other losses."""
    inputs = inputs_of(conditional)
    images, condition = inputs["sample"], inputs["encoder_hidden_states"]
    found = [
        measure_importance(
            conditional,
            scheduler,
            [CalibrationBatch(images, images, {"encoder_hidden_states": scale * condition})],
            STEPS,
            criterion="taylor",
            formula="paper",
        ).losses
        for scale in (1.0, 5.0)
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_halves_of_geglu_are_cut_as_pairs(conditional, magnitude_of, ratio):
    """Channel c of the gate is cut with channel c of the value and input c of the next layer; the ratio is exact."""
    plan = plan_pruning(conditional, magnitude_of(conditional), PruneParams(target={"ratio": ratio}))
    pruned = cut(conditional, plan)
    groups = [group for group in plan.groups if group.root.endswith("ff.net.0.proj")]

    assert groups
    for group in groups:
        inner = conditional.get_submodule(group.root).out_features // 2
        width = int(inner * (1 - ratio))
        kept = plan.layers[group.root].outputs
        assert group.width == inner
        assert [channel + inner for channel in kept[:width]] == kept[width:]
        assert pruned.get_submodule(group.root).out_features == 2 * width
        assert pruned.get_submodule(group.root.replace("0.proj", "2")).in_features == width


def test_scale_and_shift_are_cut_as_pairs(make_unet, magnitude_of):
    """The two halves of the layer that scales and shifts a norm keep the width of the norm."""
    unet = make_unet(resnet_time_scale_shift="scale_shift")
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5})))
    block = pruned.down_blocks[0].resnets[0]

    assert block.time_emb_proj.out_features == 2 * block.norm2.num_channels == 16


@pytest.mark.parametrize("chosen", [{}, {"heads": "whole"}, {"round_to": 4}], ids=str)
def test_pruned_attention_is_the_same_in_every_processor(make_unet, magnitude_of, scheduler, tmp_path, chosen):
    """Eager and fused attention scale by 1/√(current head width), in memory and after loading."""
    unet = make_unet(attention_head_dim=8)
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}, **chosen))
    pruned = cut(unet, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    inputs = inputs_of(unet)
    for model in (pruned, read_unet(tmp_path / "pruned")):
        fused = model(**inputs).sample
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
        torch.testing.assert_close(model(**inputs).sample, fused)


def test_the_autoencoder_is_copied(unet, scheduler, magnitude, tmp_path):
    """A latent pipeline keeps its VQModel and its pipeline class."""
    source, out = tmp_path / "source", tmp_path / "pruned"
    write_pipeline(source, unet, scheduler)
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(source / "vqvae")
    index = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    write_json(source / "model_index.json", {**read_json(source / "model_index.json"), **index})
    write_pipeline(out, cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}))), scheduler, source)

    found = read_json(out / "model_index.json")
    assert {key: found[key] for key in index} == index
    assert found["unet"] == ["pruned_unet", "PrunedUNet2DModel"]
    assert VQModel.from_pretrained(out / "vqvae").config["block_out_channels"] == [8]


def test_groups_need_no_weights(conditional, unet):
    """A skeleton on the meta device has the same groups, in the same order."""
    for model in (conditional, unet):
        found = [
            [(g.root, g.width, g.blocks, [(m.layer, m.dim, m.channels.tolist()) for m in g.members]) for g in groups]
            for groups in (find_groups(model), find_groups(skeleton(model)))
        ]
        assert found[0] == found[1]


def test_a_pruned_model_can_be_pruned_again(make_unet, magnitude_of, scheduler, tmp_path):
    """After it was saved and loaded."""
    first = make_unet()
    for name in ("once", "twice"):
        plan = plan_pruning(first, magnitude_of(first), PruneParams(target={"ratio": 0.3}))
        write_pipeline(tmp_path / name, cut(first, plan), scheduler)
        first = read_unet(tmp_path / name)
    inputs = inputs_of(first)

    assert first.conv_in.out_channels == 8
    assert first(**inputs).sample.isfinite().all()
    assert read_json(tmp_path / "twice/unet/config.json")["block_out_channels"] == [16, 32]


CONFIGS = st.fixed_dictionaries(
    {
        "widths": st.lists(st.sampled_from([8, 12, 16, 24]), min_size=1, max_size=3),
        "attention": st.lists(st.booleans(), min_size=3, max_size=3),
        "layers_per_block": st.integers(1, 2),
        "norm_num_groups": st.sampled_from([1, 2, 4]),
        "attention_head_dim": st.sampled_from([None, 4]),
        "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift"]),
        "downsample_type": st.sampled_from(["conv", "resnet"]),
        "add_attention": st.booleans(),
    }
)
PRUNES = st.fixed_dictionaries(
    {
        "target": st.floats(0.05, 0.6).map(lambda ratio: {"ratio": ratio}),
        "ranking": st.sampled_from(["uniform", "global"]),
        "order": st.sampled_from(["interleaved", "upfront"]),
        "round_to": st.sampled_from([1, 2, 4]),
        "heads": st.sampled_from(["width", "whole"]),
    }
)


def any_unet(num_models):
    """Call a test with small UNets and params of prune, the same ones in each run."""
    chosen = settings(
        max_examples=num_models,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking builds models for minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    return lambda test: chosen(given(config=CONFIGS, chosen=PRUNES)(test))


@any_unet(8)
def test_any_small_unet_is_the_same_after_prune_save_and_load(
    config, chosen, make_unet, magnitude_of, scheduler, tmp_path_factory
):
    """Every tensor shape and every output is the same; targets out of reach are refused."""
    check_any_unet(config, chosen, make_unet, magnitude_of, scheduler, tmp_path_factory)


@pytest.mark.e2e
@any_unet(100)
def test_many_small_unets_are_the_same_after_prune_save_and_load(
    config, chosen, make_unet, magnitude_of, scheduler, tmp_path_factory
):
    """The same rule for many more models."""
    check_any_unet(config, chosen, make_unet, magnitude_of, scheduler, tmp_path_factory)


def check_any_unet(config, chosen, make_unet, magnitude_of, scheduler, tmp_path_factory):
    """Prune a UNet, save and load it, and compare."""
    widths = tuple(config.pop("widths"))
    attention = config.pop("attention")[: len(widths)]
    unet = make_unet(
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if has_attention else "DownBlock2D" for has_attention in attention),
        up_block_types=tuple(
            "AttnUpBlock2D" if has_attention else "UpBlock2D" for has_attention in reversed(attention)
        ),
        **config,
    )
    try:
        plan = plan_pruning(unet, magnitude_of(unet), PruneParams(**chosen))
    except InputError as refusal:
        assert str(refusal.message).startswith(("prune.target", "no group can be cut"))  # noqa: PT017
        return
    pruned = cut(unet, plan)
    folder = tmp_path_factory.mktemp("model") / "pruned"
    write_pipeline(folder, pruned, scheduler)
    loaded, inputs = read_unet(folder), inputs_of(unet)

    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in pruned.state_dict().items()}
    assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)
