"""Params and sizes -> counted passes: closed forms of what each stage computes."""

from dataclasses import replace

import pytest

from flows.workspaces.overrides import apply
from stages.grid.settings import make_settings
from stages.params import Params
from stages.runtime.bounded import parse_yaml
from stages.tools.planning.costs_seconds import costs_seconds
from stages.tools.planning.forecast import Rates, forecast_stages, rates_at
from stages.tools.planning.grid_workload import count_grid
from stages.tools.planning.workload import ModelSize, count_work, pass_macs, training_bytes

SIZE = ModelSize(1000, 600, 64e6, 36e6, num_timesteps=1000, sample_numbers=256, image_bytes=256)


@pytest.fixture
def works(root):
    """Count the work of params.yaml with some overrides, for 1797 images and 50 predictions an image."""

    def count(**overrides):
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        params = Params.model_validate(parse_yaml(apply(keys, root / "params.yaml").decode(), "params"))
        return params, count_work(params, SIZE, 1797, 50)

    return count


def test_the_default_run_draws_five_sets_with_three_models(works):
    """5 × 500 images of 50 steps each, the dense ones once; and of each model three images with all steps."""
    _, found = works()

    assert found["reference"].passes["dense"] == 5 * 500 * 50
    assert found["reference"].passes["features"] == 5 * 500 + 1797
    assert found["evaluate"].passes["pruned"] == 2 * (5 * 500 + 3) * 50
    assert (found["evaluate"].passes["dense"], found["evaluate"].passes["decode"]) == (3 * 50, 0)
    assert found["evaluate"].passes["similarity"] == 2 * 5 * 500
    assert found["finetune"].passes["step"] == 450 * 64


def test_steps_of_sampling_that_are_shown_are_decoded(works):
    """Of three images ten steps each, by all three models, beside the images themselves of the two that draw."""
    params, _ = works()
    found = count_work(params, replace(SIZE, is_latent=True), 1797, 50)

    assert found["evaluate"].passes["decode"] == 2 * 5 * 500 + 3 * 3 * 10


def test_guidance_doubles_the_predictions_and_snapshots_are_models_of_their_own(works):
    """The conditional and the empty prediction; and two snapshots beside the pruned and the finetuned model."""
    _, found = works(reference__guidance=1.5, finetune__snapshots=[100, 200])

    assert found["reference"].passes["dense"] == 2 * 5 * 500 * 50
    assert found["evaluate"].passes["pruned"] == 4 * 2 * (5 * 500 + 3) * 50
    assert found["finetune"].disk_bytes > works()[1]["finetune"].disk_bytes


@pytest.mark.parametrize(("rounds", "parts"), [(None, 5), (2, 2), (100, 5)])
def test_compensation_passes_once_for_each_part_and_twice_to_be_judged(works, rounds, parts):
    """Five layers, one a part or divided: 16 images at 3 timesteps a part, half of a pass on average; twice at 4."""
    compensate = {"num_images": 16, "num_timesteps": 3, "rounds": rounds}
    params, _ = works(prune__compensate=compensate)
    found = count_work(params, replace(SIZE, num_readers=5), 1797, 50)["prune"].passes

    assert found["dense"] == found["pruned"] == 16 * (3 * (parts + 1) / 2 + 2 * 4)


@pytest.mark.parametrize(
    ("depth", "dense", "pruned", "cuts"),
    [
        ({"remove": 2, "order": "greedy"}, 6 + 5, 0, 1),
        ({"remove": 2, "order": "similarity"}, 1, 0, 1),
        ({"remove": 2, "order": "score"}, 0, 0, 1),
        ({"remove": ["mid_block.resnets.0"]}, 0, 0, 1),
        ({"remove": "search", "candidates": 3}, 6 + 5 + 4 + 3 + 2 + 3, 3, 4),
    ],
    ids=str,
)
def test_the_order_of_branches_costs_passes(works, depth, dense, pruned, cuts):
    """Greedy compares the dense model with one less for each that can still go; a search compares each candidate."""
    target = {"macs": "50%"}
    params, _ = works(prune__depth={**depth, "num_images": 8, "num_timesteps": 3}, prune__target=target)
    params = params.model_copy(update={"prune": params.prune.model_copy(update={"compensate": None})})
    passes = count_work(params, replace(SIZE, num_branches=5, num_removed=2), 1797, 50)["prune"].passes

    assert passes.get("dense", 0) == 8 * 3 * dense
    assert passes.get("pruned", 0) == 8 * 3 * pruned
    assert passes["cut"] == cuts


@pytest.mark.parametrize(("every", "images", "expected"), [(1, None, 3.1), (2, None, 2.05), (1, 16, 1.525)])
def test_the_jacobian_loss_costs_in_proportion_to_its_images_and_steps(works, every, images, expected):
    """3.1 times a step where it is computed on all images of every step."""
    jacobian = {"weight": 0.1, "every": every, "images": images}
    params, found = works(finetune__loss__jacobian=jacobian, finetune__heldout_every=450, finetune__samples=None)
    passes, macs = found["finetune"].passes, pass_macs(params, SIZE)
    with_loss = sum(passes[kind] * macs[kind] for kind in ("step", "jacobian step"))

    assert with_loss == pytest.approx(expected * 450 * 64 * macs["step"])


def test_variants_draw_as_many_images_as_their_models(works):
    """Each of two kinds of two models those of the protocol, and once the pruned model; none without the block."""
    _, found = works(variants={"models": ["dense", "finetuned"], "kinds": ["int8", "cache-2"]})

    assert found["variants"].passes["dense"] == 2 * 5 * 500 * 50
    assert found["variants"].passes["pruned"] == 3 * 5 * 500 * 50
    assert found["variants"].passes["similarity"] == (5 + 2) * 5 * 500
    assert not works()[1]["variants"].passes


def test_rounds_share_the_steps_and_measure_the_importance_again(works):
    """Three rounds: two short recoveries and two importances before the last round, whose recovery has the rest."""
    _, found = works(rounds__count=3, rounds__steps=50)
    once = works(importance__report=None)[1]["importance"].passes["gradient"]

    assert found["rounds"].passes["step"] == 2 * 50 * 64
    assert found["finetune"].passes["step"] == (450 - 100) * 64
    assert found["rounds"].passes["gradient"] == pytest.approx(2 * once)
    assert not works()[1]["rounds"].passes


def test_magnitude_needs_no_gradient_and_taylor_all_timesteps(works):
    """A criterion without threshold sums over every timestep; the threshold ends the sum early."""
    gradients = {
        name: works(importance__criterion=name, importance__report=None)[1]["importance"].passes.get("gradient", 0)
        for name in ("magnitude", "taylor", "diff-pruning")
    }

    assert gradients["magnitude"] == 0
    assert gradients["taylor"] == 1000 * 16
    assert 0 < gradients["diff-pruning"] < gradients["taylor"]


def test_an_assumed_end_of_the_importance_is_named_with_the_most_that_it_can_be(works):
    """Only where a threshold can end the sum; else the number is known, and said without about."""
    texts = {threshold: works(importance__threshold=threshold)[1]["importance"].text for threshold in (0.0, 0.05)}

    assert texts[0.05] == "about 350 timesteps, at most 1000, × 16 images"
    assert texts[0.0] == "1000 timesteps × 16 images"


def test_weights_are_read_and_written_by_every_stage_that_has_a_model(works):
    """1000 dense and 600 pruned parameters: models, saliency, and checkpoints as large as on disk."""
    _, found = works(finetune__snapshots=[100], finetune__muon=None, prune__compensate=None)

    assert found["prune"].passes == {"read": 2 * 1000, "write": 600, "cut": 1}
    assert found["evaluate"].passes["read"] == 1000 + 3 * 600
    assert found["finetune"].passes["read"] == 1000 + 600
    assert found["finetune"].passes["write"] == 600 * (2 + 450 // 50 * (1 + 2 + 3 + 1))
    assert found["importance"].passes["write"] == 1000
    assert works(finetune__loss={"noise": 1.0})[1]["finetune"].passes["read"] == 600


def test_a_grid_draws_every_model_at_every_setting_but_dense_at_the_protocols_own(works, scheduler):
    """Two samplers, 20 and 50 steps; the reference has the dense images of one of the four. SSIM counts twice."""
    grid = {"steps": [20, 50], "samplers": [{}, {"spacing": "trailing"}], "num_images": 100, "sets": 2}
    params, _ = works(grid=grid)
    settings = make_settings(params.grid, params.reference, scheduler, None, "model")
    work = count_grid(params, params.grid, SIZE, settings)

    assert work.passes["dense"] == 200 * (20 + 20 + 50)
    assert work.passes["pruned"] == 200 * (20 + 50 + 20 + 50)
    assert work.passes["features"] == 200 * (3 + 4)
    assert work.passes["similarity"] == 200 * 4 * 3
    assert work.text == "8 cells × 200 images"
    unguided = [replace(setting, guidance=1.0) for setting in settings]
    assert count_grid(params, params.grid, SIZE, unguided) == work, "guidance 1 is none"
    assert works()[0].grid is None


def test_a_forecast_is_passes_times_seconds(works):
    """Twice as fast a device halves it, as do two GPUs; passes of unknown duration are named and left out."""
    params, found = works()
    one, fast, two = (
        {stage.name: stage for stage in forecast_stages(params, found, rates_at(tflops, params, SIZE), gpus)}
        for tflops, gpus in ((1, 1), (2, 1), (1, 2))
    )

    assert one["reference"].seconds == pytest.approx(2 * 125_000 * 64e6 / 1e12)
    alone = 2 * 3 * 50 * (64e6 + 2 * 36e6) / 1e12  # the steps of sampling that are shown, which one process draws
    assert fast["evaluate"].seconds == pytest.approx(one["evaluate"].seconds / 2)
    assert two["evaluate"].seconds == pytest.approx((one["evaluate"].seconds + alone) / 2)
    assert two["reference"].seconds == pytest.approx(one["reference"].seconds / 2)
    assert one["reference"].unmeasured == ("features",)
    assert {stage.seconds for stage in forecast_stages(params, found, Rates({}, startup_s=10))} == {10, 4, 18}


def test_costs_time_the_models_and_then_all_that_has_variants_in_turn(works):
    """What is alike is timed once: weights of 8 bits as their model, both caches of a model; each graph is one."""
    costs = {"batches": [1], "repeats": 100, "seconds": 1.0}
    rates = {"dense": 0.02, "pruned": 0.01}
    plain, _ = works(costs=costs)
    kinds = ["int8", "cache-2", ["int8", "cache-2"], "onnx"]
    varied, _ = works(costs=costs, variants={"models": ["dense", "pruned", "finetuned"], "kinds": kinds})
    models = (1 / 0.03 + 3) * 0.03
    cycle = 0.02 * (1 + 2 + 1) + 0.01 * (1 + 2 + 2)

    assert costs_seconds(plain, rates) == pytest.approx(models)
    assert costs_seconds(varied, rates) == pytest.approx(models + (7 / cycle + 3) * cycle)
    assert costs_seconds(plain, {"dense": 1.0}) == 0, "six passes do not fit"


def test_recorded_passes_forecast_the_recorded_stages(works):
    """The default run on two cores (docs/log.md): from the speed of its passes every stage comes out within a half."""
    params, found = works()
    rates = {"dense": 0.00134, "pruned": 0.00097, "gradient": 0.0052, "step": 0.0029, "heldout": 0.00097}
    took = {"reference": 138.5, "importance": 50.2, "finetune": 114.6, "evaluate": 325.9, "costs": 23.9, "prune": 5.1}
    forecast = {it.name: it.seconds for it in forecast_stages(params, found, Rates(rates, startup_s=5))}

    for name, seconds in took.items():
        assert 1 / 1.5 < forecast[name] / seconds < 1.5, name


@pytest.mark.parametrize(("muon", "moments"), [(None, 2), ({"learning_rate": 0.001}, 1)])
def test_training_holds_weights_gradients_moments_averages_and_the_teacher(works, muon, moments):
    """Adam's two moments or Muon's one, and three averages of the pruned model, and the dense one, in float32."""
    params, _ = works(finetune__muon=muon)

    assert training_bytes(params, SIZE) == 4 * ((2 + moments + 3) * 600 + 1000)
