"""UNets with class labels, learned variance, and scale and shift: scores, cuts, compensation and what is distilled."""

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stages.data.images import Conditions, Images, label_table
from stages.finetune.distillation import kept_channels
from stages.finetune.params import FinetuneParams
from stages.finetune.trainer import Trainer
from stages.importance.calibration import calibration_draws
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.importance.params import ImportanceParams
from stages.models.complexity import count_macs, count_params
from stages.models.families import example_inputs, forward, sample_shape
from stages.models.groups import find_groups
from stages.models.pipeline import read_unet, write_pipeline
from stages.prune.compensate import NoisyBatches, compensate, difference
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.prune.width_cost import WidthCost

ADM = {
    "in_channels": 1,
    "out_channels": 2,
    "num_class_embeds": 5,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 8,
}
"""What ADM's UNets have beside the usual: classes, learned variance, scale and shift, resampling in resnets."""
TIMESTEPS = [0, 300, 600]


@pytest.fixture
def adm(make_unet):
    """A small class-conditional UNet as in Dhariwal and Nichol (2021)."""
    return make_unet(**ADM)


def noisy_inputs(unet, seed=0):
    """Noise for every class."""
    inputs = example_inputs(unet, 5)
    noise = torch.randn(5, *sample_shape(unet), generator=torch.Generator().manual_seed(seed))
    return {**inputs, "sample": noise, "timestep": torch.tensor([0, 10, 300, 700, 999])}


def sliced(dense, kept):
    """Slice the tensors of a UNet by hand: what follows from the kept outputs of conv1, conv2, …, layer by layer.

    Of the plan only the kept outputs of layers are read, not their inputs.
    """
    outputs = {name: torch.tensor(layer.outputs) for name, layer in kept.items() if layer.outputs is not None}
    time = outputs["time_embedding.linear_2"]
    found = {}
    for name, module in dense.named_modules():
        if isinstance(module, ResnetBlock2D):
            own, width = outputs[f"{name}.conv1"], module.conv1.out_channels
            pair = torch.cat([own, own + width]) if module.time_embedding_norm == "scale_shift" else own
            found[f"{name}.time_emb_proj.weight"] = module.time_emb_proj.weight[pair][:, time]
            found[f"{name}.time_emb_proj.bias"] = module.time_emb_proj.bias[pair]
            found[f"{name}.norm2.weight"] = module.norm2.weight[own]
            found[f"{name}.norm2.bias"] = module.norm2.bias[own]
            found[f"{name}.conv2.weight"] = module.conv2.weight[outputs[f"{name}.conv2"]][:, own]
    if isinstance(dense.class_embedding, torch.nn.Embedding):
        found["class_embedding.weight"] = dense.class_embedding.weight[:, time]
    elif dense.class_embedding is not None:
        inner = outputs["class_embedding.linear_1"]
        found["class_embedding.linear_1.weight"] = dense.class_embedding.linear_1.weight[inner]
        found["class_embedding.linear_2.weight"] = dense.class_embedding.linear_2.weight[time][:, inner]
    found["conv_out.weight"] = dense.conv_out.weight[:, outputs["up_blocks.1.resnets.1.conv2"]]
    found["conv_out.bias"] = dense.conv_out.bias
    return found


CONFIGS = st.fixed_dictionaries(
    {
        "num_class_embeds": st.sampled_from([None, 1, 3]),
        "class_embed_type": st.sampled_from([None, "timestep"]),
        "out_channels": st.sampled_from([1, 2]),
        "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift"]),
        "downsample_type": st.sampled_from(["conv", "resnet"]),
        "upsample_type": st.sampled_from(["conv", "resnet"]),
        "attention_head_dim": st.sampled_from([None, 4]),
        "norm_num_groups": st.sampled_from([2, 4]),
        "block_out_channels": st.sampled_from([(8, 16), (12, 16), (16, 8)]),
    }
)


def check_cut(unet, plan, pruned, scheduler, folder):
    """Compare every tensor with one that was sliced by hand, the loaded model with the cut one, and counted costs."""
    tensors, inputs = pruned.state_dict(), noisy_inputs(unet)
    for name, expected in sliced(unet, plan.layers).items():
        assert torch.equal(tensors[name], expected), name
    write_pipeline(folder, pruned, scheduler)
    loaded = read_unet(folder)

    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)
    assert pruned(**inputs).sample.shape[1] == unet.config["out_channels"]
    costs = WidthCost(unet, find_groups(unet), heads="width", latency_repeats=1)
    counts = [len(group.cut) for group in plan.groups]
    assert (costs.macs(counts), costs.params(counts)) == (count_macs(pruned), count_params(pruned))


@pytest.mark.parametrize("kind", [None, "timestep"])
def test_a_cut_is_a_slice_and_loads_bit_identical(kind, make_unet, magnitude_of, scheduler, tmp_path):
    """Classes lose the columns that the time embedding loses, scale and shift their pairs, the output nothing."""
    unet = make_unet(**ADM, class_embed_type=kind)
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}))
    pruned = cut(unet, plan)

    check_cut(unet, plan, pruned, scheduler, tmp_path / "pruned")
    assert pruned.conv_in.out_channels == 8


@pytest.mark.e2e
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=CONFIGS, ratio=st.floats(0.2, 0.6), order=st.sampled_from(["interleaved", "upfront"]))
def test_any_cut_is_a_slice_and_loads_bit_identical(
    config, ratio, order, make_unet, magnitude_of, scheduler, tmp_path_factory
):
    """With or without classes, learned variance, scale and shift, and resampling in resnets."""
    if config["num_class_embeds"] is None:
        config = {**config, "class_embed_type": None}
    unet = make_unet(**config)
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": ratio}, order=order))
    check_cut(unet, plan, cut(unet, plan), scheduler, tmp_path_factory.mktemp("model") / "pruned")


def test_plain_diffusers_loads_it_with_its_labels(adm, magnitude_of, scheduler, tmp_path):
    """By the class that travels with the model."""
    from diffusers import AutoModel

    pruned = cut(adm, plan_pruning(adm, magnitude_of(adm), PruneParams(target={"ratio": 0.5})))
    write_pipeline(tmp_path, pruned, scheduler)
    loaded = AutoModel.from_pretrained(f"{tmp_path}/unet", trust_remote_code=True, low_cpu_mem_usage=False)
    inputs = noisy_inputs(adm)

    assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)


def losses(unet, scheduler, images, noise, labels, timesteps):
    """Squared error of the first channels, summed over pixels: one loss for each timestep."""
    for timestep in timesteps:
        alpha = scheduler.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
        output = unet(noisy, torch.tensor(timestep), class_labels=labels).sample
        yield ((output[:, : images.shape[1]] - noise) ** 2).sum(dim=(1, 2, 3)).mean()


@pytest.mark.parametrize("criterion", ["taylor", "diff-pruning", "no-cancel-taylor", "fisher", "snr-taylor"])
def test_saliencies_equal_a_plain_loop(adm, scheduler, criterion):
    """Of every criterion with gradients: ε alone counts, under the labels of the images, and no row of the variance."""
    draws = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 3, 1, 8, 8, generator=draws)
    labels = torch.tensor([0, 2, 4])
    batch = CalibrationBatch(images, noise, {"class_labels": labels})
    found = measure_importance(adm, scheduler, [batch], TIMESTEPS, criterion=criterion, formula="paper", label=None)
    layer, norm = adm.mid_block.resnets[0].time_emb_proj, adm.conv_norm_out
    sums, each = {it: torch.zeros_like(it.weight) for it in (layer, norm, adm.conv_out)}, []
    for timestep, loss in zip(TIMESTEPS, losses(adm, scheduler, images, noise, labels, TIMESTEPS), strict=True):
        weight = scheduler.alphas_cumprod[timestep] if criterion == "snr-taylor" else 1.0
        gradients = torch.autograd.grad(weight * loss, [it.weight for it in sums])
        each.append(float(loss.detach()))
        for it, gradient in zip(sums, gradients, strict=True):
            product = it.weight.detach() * gradient
            terms = {"no-cancel-taylor": product.abs(), "fisher": product**2}
            sums[it] += terms.get(criterion, gradient)
    for name, it in (("mid_block.resnets.0.time_emb_proj", layer), ("conv_out", adm.conv_out)):
        total = sums[it] if criterion in ("no-cancel-taylor", "fisher") else (it.weight.detach() * sums[it]) ** 2
        torch.testing.assert_close(found.saliency[name], total, rtol=1e-4, atol=1e-9)

    assert found.losses[0] == pytest.approx(each, rel=1e-5)
    assert not found.saliency["conv_out"][1].any()
    assert found.saliency["conv_out"][0].any()
    assert "class_embedding" not in found.saliency


def test_images_that_the_model_draws_have_labels(adm, scheduler):
    """Distinct classes for the images of a timestep; they are drawn and scored under the same labels."""
    params = ImportanceParams(num_images=3, draw={"steps": 2, "guidance": 2.0})
    (drawn,) = calibration_draws(adm, scheduler, labelled_images(), params, 0)
    batch = drawn.at(500)

    assert batch.condition["class_labels"].tolist() == drawn.labels(500)
    assert len({*drawn.labels(500)}) == 3
    assert batch.images.shape == batch.noise.shape == (3, 1, 8, 8)


def labelled_images():
    """Constant images whose grey level is their class, one of four."""
    labels = np.arange(32) % 4
    pixels = np.repeat(labels * 60, 64).reshape(32, 1, 8, 8).astype(np.uint8)
    return Images(pixels[:24], pixels[24:], Conditions(label_table(4, 4), labels[:24], labels[24:]))


def test_compensation_lowers_the_difference_under_labels(adm, magnitude_of, scheduler):
    """The embedding of the classes reads no channels, so it keeps its values; only ε is compared."""
    plan = plan_pruning(adm, magnitude_of(adm), PruneParams(target={"ratio": 0.3}))
    pruned, params = cut(adm, plan), CompensateParams(num_images=8, num_timesteps=4)
    batches = NoisyBatches(adm, scheduler, labelled_images(), params, 0)
    before, embedding = difference(adm, pruned, batches), pruned.class_embedding.weight.detach().clone()
    compensate(adm, pruned, plan, batches, params)
    after = difference(adm, pruned, batches)
    with torch.no_grad():
        pruned.conv_out.weight[1] += 1

    assert after < 0.8 * before
    assert torch.equal(pruned.class_embedding.weight, embedding)
    assert difference(adm, pruned, batches) == after


def short_training(**changes):
    """Params of a short recovery with every loss."""
    usual = {"steps": 2, "batch_size": 8, "ema_decays": (0.5,), "heldout_images": 8, "heldout_every": 2}
    loss = {"noise": 1, "output": 1, "feature": 0.1, "jacobian": {"weight": 0.1}}
    return FinetuneParams(**{**usual, "loss": loss, "learning_rate": 1e-3, **changes})


def test_recovery_sees_the_prediction_alone(adm, magnitude_of, scheduler):
    """No loss has a gradient to the variance's rows of the last layer; all weights that make ε have one."""
    plan = plan_pruning(adm, magnitude_of(adm), PruneParams(target={"ratio": 0.3}))
    pruned = cut(adm, plan)
    teacher = adm.requires_grad_(requires_grad=False), kept_channels(adm, plan)
    trainer = Trainer(pruned, scheduler, labelled_images(), short_training(), 0, teacher)
    batch = trainer.batches.at(0, trainer.rows)
    found = trainer.distillation.forward(batch)
    trainer._accumulate(0)

    noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
    with torch.no_grad():
        expected = adm(noisy, batch.timesteps, class_labels=batch.labels).sample
    torch.testing.assert_close(found.teacher, expected[:, :1])
    assert found.student.shape == found.target.shape == batch.images.shape
    assert not pruned.conv_out.weight.grad[1].any()
    assert pruned.conv_out.weight.grad[0].any()
    assert pruned.class_embedding.weight.grad.any()


def test_the_cut_forward_pass_is_the_first_half(adm):
    """`forward` returns ε, whose channels are those of the input."""
    inputs = noisy_inputs(adm)
    with torch.no_grad():
        assert torch.equal(forward(adm, inputs), adm(**inputs).sample[:, :1])
