"""Plans of several cuts, one after the other, as one plan in the numbering of the dense model."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flows.workspaces.overrides import apply
from stages.finetune.distillation import read_teacher
from stages.models.composition import compose
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.plan import Plan, architecture_sha256, read_plan
from stages.models.saliency import write_importance
from stages.prune.__main__ import main as prune
from stages.prune.earlier import dense_model, read_earlier
from stages.prune.kept import check_plan
from stages.prune.params import PruneParams
from stages.prune.pruning import replay
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut, slice_tensors
from stages.runtime.errors import InputError
from stages.storage.files import write_json

CPU = torch.device("cpu")
PRUNES = st.fixed_dictionaries(
    {
        "target": st.floats(0.1, 0.5).map(lambda ratio: {"ratio": ratio}),
        "ranking": st.sampled_from(["uniform", "global"]),
        "heads": st.sampled_from(["width", "whole"]),
        "exclude": st.sampled_from([(), ("down_blocks.*",)]),
    }
)


@pytest.fixture
def prune_again(magnitude_of):
    """Prune a model with params; returns the plan of this cut alone and the result."""

    def prune_once(unet, chosen, earlier=None):
        plan = plan_pruning(unet, magnitude_of(unet), PruneParams(**chosen), earlier=earlier)
        return plan, cut(unet, plan)

    return prune_once


@pytest.fixture
def twice(unet, prune_again):
    """The tiny UNet pruned twice: both plans and both results."""
    first, once = prune_again(unet, {"target": {"ratio": 0.2}})
    second, both = prune_again(once, {"target": {"ratio": 0.5}}, first)
    return first, once, second, both


def check_slices(dense, cuts, prune_again):
    """Cut a model several times, and assert that the composed plan describes all cuts together.

    It fits the dense model, indexes its tensors to those of the last model, and can be cut anew.
    """
    current, total = dense, None
    for chosen in cuts:
        try:
            plan, current = prune_again(current, {**chosen, "order": "upfront"})
        except InputError:  # the model is too narrow for it by now
            continue
        total = compose(total, plan) if total else plan
    assert total
    check_plan(total, dense)
    sliced, again = slice_tensors(dense, total), cut(dense, total).state_dict()
    for name, tensor in current.state_dict().items():
        assert torch.equal(tensor, sliced[name]), name
        assert torch.equal(tensor, again[name]), name


def test_cuts_in_a_row_are_one_slice_of_the_dense_weights(conditional, prune_again):
    """Whole heads first, then narrower heads, from other layers."""
    first = {"target": {"ratio": 0.5}, "heads": "whole"}
    check_slices(conditional, [first, {"target": {"ratio": 0.5}, "exclude": ["down_blocks.*"]}], prune_again)


@pytest.mark.e2e
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking builds models for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("family", ["unet", "conditional"])
@given(cuts=st.lists(PRUNES, min_size=2, max_size=3))
def test_any_cuts_in_a_row_are_one_slice_of_the_dense_weights(family, cuts, request, prune_again):
    """Of both families, with any ratio, ranking, kind of heads and patterns."""
    check_slices(request.getfixturevalue(family), cuts, prune_again)


def test_composition_is_associative(unet, prune_again):
    """(A ∘ B) ∘ C is A ∘ (B ∘ C), to the hash."""
    plans, current = [], unet
    for _ in range(3):
        plan, current = prune_again(current, {"target": {"ratio": 0.25}})
        plans.append(plan)
    first, second, third = plans

    assert compose(compose(first, second), third) == compose(first, compose(second, third))


def test_a_composed_plan_has_the_heads_of_the_last_cut(make_unet, prune_again):
    """Four, then three, then two."""
    dense, common = make_unet(attention_head_dim=8), {"heads": "whole"}
    first, once = prune_again(dense, {"target": {"ratio": 0.25}, **common})
    second, _ = prune_again(once, {"target": {"ratio": 0.5}, **common}, first)
    total = compose(first, second)

    assert [set(plan.heads.values()) for plan in (first, second, total)] == [{3}, {2}, {2}]
    check_plan(total, dense)


def test_a_composed_plan_names_all_cuts(twice):
    """The last cut on top, the earlier ones in `earlier`, with the hash of the weights that the next was made in."""
    first, _, second, _ = twice
    total = compose(first, second)

    assert total.base == first.base
    assert (total.prune, total.budget) == (second.prune, second.budget)
    (earlier,) = total.earlier
    assert (earlier.prune, earlier.budget) == (first.prune, first.budget)
    assert earlier.result_sha256 == second.base.weights_sha256
    assert total.sha256 == total.content_sha256()
    assert Plan.model_validate(json.loads(json.dumps(total.to_json()))) == total


def test_a_layer_that_a_plan_does_not_name_is_whole(twice):
    """Composed with a plan that lists only what it cuts, or nothing, the other plan's channels stay."""
    first, _, second, _ = twice
    whole = second.model_copy(
        update={"layers": {}, "groups": [group.model_copy(update={"cut": []}) for group in second.groups]}
    )

    assert compose(first, whole).layers == first.layers
    assert compose(first, whole).groups == first.groups


def test_plans_that_do_not_follow_each_other_are_refused(twice):
    """The second must be of the widths that the first leaves, and of its family."""
    first, _, second, _ = twice
    base = second.base.model_copy(update={"family": "UNet2DConditionModel"})
    for one, other in ((second, first), (first, second.model_copy(update={"base": base}))):
        with pytest.raises(InputError, match="second plan is not for the result of the first"):
            compose(one, other)


@pytest.mark.parametrize(
    ("family", "between", "target", "heads"),
    [
        ("unet", {"ratio": 0.2}, {"ratio": 0.5}, "width"),
        ("unet", {"macs": "75%"}, {"macs": "50%"}, "width"),
        pytest.param("unet", {"params": 0.7}, {"params": 0.4}, "width", marks=pytest.mark.e2e),
        ("conditional", {"ratio": 0.5}, {"ratio": 0.6}, "whole"),
        pytest.param("conditional", {"macs": 0.7}, {"macs": 0.4}, "width", marks=pytest.mark.e2e),
    ],
)
def test_two_uniform_cuts_lead_to_the_widths_of_one(family, between, target, heads, request, prune_again):
    """A target is a share of the dense model, also for a model that was pruned before; floor and rounding likewise."""
    dense, common = request.getfixturevalue(family), {"heads": heads, "floor": 0.2}
    at_once, expected = prune_again(dense, {"target": target, **common})
    first, once = prune_again(dense, {"target": between, **common})
    second, found = prune_again(once, {"target": target, **common}, first)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (expected, found)]

    assert shapes[0] == shapes[1]
    assert second.budget == at_once.budget
    assert all(any(group.cut for group in plan.groups) for plan in (first, second))


def test_a_target_that_the_first_cut_passed_is_refused(unet, prune_again):
    """The message has the range that is left."""
    first, once = prune_again(unet, {"target": {"macs": "50%"}})
    with pytest.raises(InputError, match=r"out of reach: possible from .* to 2\.0"):
        prune_again(once, {"target": {"macs": "75%"}}, first)
    with pytest.raises(InputError, match=r"ratio 0\.1 cuts nothing"):
        prune_again(once, {"target": {"ratio": 0.1}}, first)


def test_halves_of_geglu_are_refused_for_a_pruned_model(conditional, prune_again):
    """How many pairs a ratio cuts depends on the scores, so there is no share of the dense model to reach."""
    first, once = prune_again(conditional, {"target": {"ratio": 0.2}})
    with pytest.raises(InputError, match=r"prune\.geglu is halves, and the model was pruned before.*set it to pairs"):
        prune_again(once, {"target": {"ratio": 0.5}, "geglu": "halves"}, first)


def test_a_composed_plan_is_replayed_on_another_checkpoint(twice, make_unet):
    """It fits every model of the dense architecture, like a plan of one cut."""
    first, _, second, _ = twice
    total, other = compose(first, second), make_unet(seed=1)
    again = replay(total, other)

    assert (again.layers, again.replayed_from, again.earlier) == (total.layers, total.sha256, total.earlier)
    assert torch.equal(cut(other, again).conv_in.weight, other.conv_in.weight[total.layers["conv_in"].outputs])


@pytest.fixture
def prune_folder(tmp_path, root, magnitude_of):
    """Run the stage prune on a model folder, by magnitude."""

    def run(model, out, ratio):
        importance = tmp_path / f"importance-{out.name}"
        importance.mkdir()
        write_importance(importance, magnitude_of(read_unet(model)))
        changes = {"prune.target.ratio": ratio, "prune.compensate": None}
        (tmp_path / "params.yaml").write_bytes(apply(changes, root / "params.yaml"))
        given = {"params": tmp_path / "params.yaml", "model": model, "importance": importance, "out": out}
        return CliRunner().invoke(prune, [text for key, value in given.items() for text in (f"--{key}", str(value))])

    return run


def test_the_stage_composes_with_the_plan_of_its_model(tmp_path, unet, model_folder, scheduler, prune_folder):
    """After training in between, the teacher of the twice pruned model is the dense one, with its kept channels."""
    assert prune_folder(model_folder, tmp_path / "once", 0.2).exit_code == 0
    trained = read_unet(tmp_path / "once")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    write_pipeline(tmp_path / "trained", trained, scheduler, tmp_path / "once")
    shutil.copy(tmp_path / "once" / PLAN, tmp_path / "trained" / PLAN)
    result = prune_folder(tmp_path / "trained", tmp_path / "twice", 0.5)
    assert result.exit_code == 0, result.output
    pruned, plan = read_unet(tmp_path / "twice"), read_plan(tmp_path / "twice" / PLAN)
    teacher, channels = read_teacher(model_folder, tmp_path / "twice", CPU)

    check_plan(plan, unet)
    for name, tensor in slice_tensors(unet, plan).items():
        assert tensor.shape == pruned.state_dict()[name].shape
    assert torch.equal(teacher.conv_in.weight, unet.conv_in.weight)
    for name, kept in channels.items():
        assert len(kept) == pruned.get_submodule(name).conv2.out_channels
    with pytest.raises(InputError, match="was cut from a model with sha256"):
        read_teacher(tmp_path / "trained", tmp_path / "twice", CPU)


def test_a_plan_of_another_model_beside_the_model_is_refused(tmp_path, model_folder, prune_folder, twice):
    """Of other widths, or of another dense model; nothing is written."""
    first, _, second, _ = twice
    for plan in (first, second):
        write_json(model_folder / PLAN, plan.to_json())
        result = prune_folder(model_folder, tmp_path / f"out-{plan.sha256[:6]}", 0.5)

        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {model_folder / PLAN} is not the plan of the model beside it (")
        assert result.output.endswith("); remove it to prune the model as a dense one\n")
        assert not (tmp_path / f"out-{plan.sha256[:6]}").exists()


def test_the_dense_model_of_a_pruned_one_has_its_architecture(conditional, prune_again):
    """It is built from the config alone."""
    _, once = prune_again(conditional, {"target": {"ratio": 0.3}})
    found = dense_model(once, CPU)

    assert architecture_sha256(found) == architecture_sha256(conditional) != architecture_sha256(once)
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())


def test_a_latency_is_a_share_of_the_dense_models(twice, magnitude_of):
    """It is measured on a model of the dense widths; the limits of what is left are those of the model given."""
    first, once, _, _ = twice
    params = PruneParams(target={"latency_ms": 1e9}, latency_repeats=3)
    with pytest.raises(InputError, match=r"prune\.target 1e\+09 ms is out of reach: possible from"):
        plan_pruning(once, magnitude_of(once), params, earlier=first)


def test_a_dense_folder_has_no_earlier_plan(model_folder, unet):
    """So its plan is that of its one cut."""
    assert read_earlier(model_folder, unet) is None
