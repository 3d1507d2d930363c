"""Heads and hidden channels of a DiT are scored as a plain loop over timesteps, layers and channels scores them."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stages.importance.criteria import CRITERIA
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.runtime.errors import InputError

STEPS = (0, 300, 900)
CONFIGS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 2),
        "num_attention_heads": st.integers(2, 4),
        "attention_head_dim": st.sampled_from([4, 8]),
        "patch_size": st.sampled_from([1, 2, 4]),
        "num_embeds_ada_norm": st.integers(1, 3),
        "out_channels": st.sampled_from([None, 2]),
        "attention_bias": st.booleans(),
        "activation_fn": st.sampled_from(["gelu-approximate", "gelu"]),
    }
)
SALIENCY = {
    ("magnitude", "paper"): lambda w, _: w**2,
    ("magnitude", "diffusers"): lambda w, _: w**2,
    ("taylor", "paper"): lambda w, g: (w * sum(g)) ** 2,
    ("taylor", "diffusers"): lambda w, g: w * sum(g),
    ("diff-pruning", "paper"): lambda w, g: (w * sum(g)) ** 2,
    ("diff-pruning", "diffusers"): lambda w, g: abs(w * sum(g)),
    ("snr-taylor", "paper"): lambda w, g: (w * sum(g)) ** 2,
    ("snr-taylor", "diffusers"): lambda w, g: abs(w * sum(g)),
    ("no-cancel-taylor", "paper"): lambda w, g: sum(abs(w * each) for each in g),
    ("no-cancel-taylor", "diffusers"): lambda w, g: sum(abs(w * each) for each in g),
    ("fisher", "paper"): lambda w, g: sum((w * each) ** 2 for each in g),
    ("fisher", "diffusers"): lambda w, g: sum((w * each) ** 2 for each in g),
}
"""(criterion, formula) -> saliency of a weight w with the gradients g of each timestep."""


def batch_of(model):
    """Images, noise and labels, that of no class among them."""
    draws = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(3, 1, 8, 8, generator=draws) for _ in range(2))
    last = model.config["num_embeds_ada_norm"]
    return CalibrationBatch(images, noise, {"class_labels": torch.tensor([0, last - 1, last])})


def gradients(model, scheduler, batch, criterion, formula):
    """The gradient of every weight at each timestep, of the error of ε alone: name -> [g_0, g_1, …]."""
    found = {name: [] for name, _ in model.named_parameters()}
    for step in STEPS:
        timesteps = torch.full((len(batch.images),), step)
        noisy = scheduler.add_noise(batch.images, batch.noise, timesteps)
        predicted = model(noisy, timesteps, **batch.condition).sample[:, :1]
        errors = (predicted - batch.noise) ** 2
        loss = errors.sum() / len(errors) if formula == "paper" else errors.mean()
        weight = scheduler.alphas_cumprod[step] if criterion == "snr-taylor" else 1
        model.zero_grad()
        (weight * loss).backward()
        for name, parameter in model.named_parameters():
            found[name].append(parameter.grad.clone())
    return found


def loop(model, scheduler, batch, criterion, formula):
    """Score each channel of each block: layer whose outputs they are -> scores."""
    found = gradients(model, scheduler, batch, criterion, formula)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def channel(layer, index, *, is_input):
        name = f"{layer}.weight"
        saliency = SALIENCY[criterion, formula](weights[name], found[name])
        return abs(float((saliency[:, index] if is_input else saliency[index]).sum()))

    scores = {}
    for block in range(model.config["num_layers"]):
        attention, hidden = f"transformer_blocks.{block}.attn1", f"transformer_blocks.{block}.ff.net"
        scores[f"{attention}.to_v"] = [
            sum(channel(f"{attention}.{side}", index, is_input=False) for side in ("to_q", "to_k", "to_v"))
            + channel(f"{attention}.to_out.0", index, is_input=True)
            for index in range(model.inner_dim)
        ]
        scores[f"{hidden}.0.proj"] = [
            channel(f"{hidden}.0.proj", index, is_input=False) + channel(f"{hidden}.2", index, is_input=True)
            for index in range(4 * model.inner_dim)
        ]
    return scores


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=CONFIGS, kind=st.sampled_from(sorted(SALIENCY)), timesteps_per_pass=st.sampled_from([1, 3]))
def test_the_cut_equals_that_of_a_plain_loop(config, kind, timesteps_per_pass, make_dit, scheduler):
    """Half of the heads, those of the lowest sums, and half of the hidden channels, on any small config (reference)."""
    criterion, formula = kind
    model = make_dit(**config)
    width = config["attention_head_dim"]
    importance = measure_importance(
        model,
        scheduler,
        [batch_of(model)],
        STEPS,
        criterion=criterion,
        formula=formula,
        timesteps_per_pass=timesteps_per_pass,
        label=None,
    )
    plan = plan_pruning(model, importance, PruneParams(target={"ratio": 0.5}, heads="whole"))
    scores = loop(model, scheduler, batch_of(model), criterion, formula)
    for group in plan.groups:
        step = width if "attn1" in group.root else 1
        sums = torch.tensor(scores[group.root]).view(-1, step).sum(dim=1)
        chosen = sums.argsort()[: len(sums) // 2].tolist()
        gaps = sums.sort().values.diff()[max(0, len(chosen) - 1)] / sums.mean()
        expected = sorted(block * step + offset for block in chosen for offset in range(step))
        assert group.cut == expected or gaps < 1e-4, (group.root, gaps)


def test_every_criterion_is_in_the_loop():
    """Or draws its scores."""
    assert {name for name, _ in SALIENCY} == set(CRITERIA) - {"random"}


def test_the_learned_variance_has_no_say(make_dit, scheduler):
    """Other weights of its channels in the last layer change neither losses nor saliencies elsewhere."""
    found = []
    for scale in (1, 100):
        model = make_dit()
        with torch.no_grad():
            last = model.proj_out_2.weight.view(2, 2, 2, -1)  # rows are patch by patch, the channels inside
            last[..., 1, :] *= scale
        found.append(
            measure_importance(
                model, scheduler, [batch_of(model)], STEPS, criterion="fisher", formula="paper", label=None
            )
        )
    one, other = found

    assert one.losses == other.losses
    for name, values in one.saliency.items():
        assert name == "proj_out_2" or torch.equal(values, other.saliency[name]), name
    assert not one.saliency["proj_out_2"].view(2, 2, 2, -1)[..., 1, :].any()


def test_whole_heads_under_the_formula_ldm_are_refused(dit, scheduler):
    """It gives all heads the scores of the first."""
    found = measure_importance(dit, scheduler, [batch_of(dit)], STEPS, criterion="taylor", formula="ldm", label=None)

    with pytest.raises(InputError, match="scores all heads alike"):
        plan_pruning(dit, found, PruneParams(target={"ratio": 0.5}, heads="whole"))
