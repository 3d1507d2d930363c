"""The training loop."""

import copy
import itertools
import math
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.resnet import ResnetBlock2D
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from pydantic import ValidationError

from stages.data.images import Images
from stages.finetune import engine
from stages.finetune.batches import Batches, Prefetcher, draw_timesteps, heldout_batch
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.interrupt import StoppedError
from stages.finetune.params import EngineParams, FinetuneParams, JacobianParams, LossParams, MuonParams, SamplesParams
from stages.finetune.recovery import with_fresh_weights
from stages.finetune.trainer import Trainer
from stages.prune.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.runtime.device import REFUSAL
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator
from stages.storage.tensors import tensors_sha256

PARAMS = FinetuneParams(
    steps=7,
    batch_size=8,
    learning_rate=1e-3,
    ema_decays=(0.5, 0.9),
    clip_norm=1.0,
    flip=True,
    heldout_images=8,
    heldout_every=3,
    checkpoint_every=2,
    samples=SamplesParams(every=5, num_images=2, steps=2),
)
BATCHES = {"batch_size": 8, "flip": True, "antithetic": True, "label_dropout": 0.1}


@pytest.fixture
def trainer(unet, scheduler, images):
    """Return a function that builds the same trainer at every call; keywords change its params."""

    def start(seed=0, teacher=None, **changes):
        params = FinetuneParams(**{**dict(PARAMS), **changes})
        AcceleratorState._reset_state()  # accelerate sets the precision once per process
        return Trainer(copy.deepcopy(unet), scheduler, images, params, seed, teacher)

    return start


class KilledError(Exception):
    """Stands for the end of the process."""


def test_training_lowers_the_heldout_loss(trainer, tmp_path):
    """The curve has a row for each measurement, the first before any step."""
    run = trainer(steps=30, heldout_every=10, samples=None)
    run.run(Checkpoints(tmp_path, "run"))

    assert [point.step for point in run.curve] == [0, 10, 20, 30]
    assert run.curve[0].train_loss is None
    assert run.cost["steps"] == 30
    assert run.curve[-1].heldout_loss < 0.8 * run.curve[0].heldout_loss


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("min_snr", [5, None])
def test_the_heldout_loss_is_that_of_the_models_own_target(unet, images, tmp_path, kind, min_snr):
    """By the definition, with min-SNR weights, or with a last timestep of SNR 0; training lowers it."""
    scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=min_snr is None)
    params = PARAMS.model_copy(update={"steps": 30, "heldout_every": 30, "loss": LossParams(min_snr=min_snr)})
    params = params.model_copy(update={"samples": SamplesParams(every=30, num_images=1, steps=2)})
    run = Trainer(copy.deepcopy(unet), scheduler, images, params, 0)
    (part, _), *_ = run.heldout_loss.parts
    signal = scheduler.alphas_cumprod[part.timesteps]
    snr = signal / (1 - signal)
    is_v = kind == "v_prediction"
    target = scheduler.get_velocity(part.images, part.noise, part.timesteps) if is_v else part.images
    with torch.no_grad():
        output = unet(scheduler.add_noise(part.images, part.noise, part.timesteps), part.timesteps).sample
    weights = snr.clamp(max=min_snr) / (snr + 1 if is_v else 1) if min_snr else 1
    losses = weights * (output - target).square().mean((1, 2, 3))
    run.run(Checkpoints(tmp_path, "run"))

    assert len(run.heldout_loss.parts) == 1
    assert run.curve[0].heldout_loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert run.curve[-1].heldout_loss < 0.8 * run.curve[0].heldout_loss
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.samples[30].std() > 1


@pytest.mark.parametrize("batch_size", [6, 3])
def test_the_heldout_loss_does_not_depend_on_the_parts(trainer, unet, batch_size):
    """Eight images in parts of 6 and 2, or of 3, 3 and 2, count as they do at once."""
    whole, parts = (trainer(batch_size=size).heldout_loss for size in (8, batch_size))

    assert len(parts.parts) > len(whole.parts) == 1
    assert parts(unet) == pytest.approx(whole(unet), rel=1e-5)


CHOICES = {
    "killed_at": [1, 4, 5],
    "schedule": ["constant", "linear", "cosine"],
    "muon": [None, MuonParams(learning_rate=1e-3)],
    "loss": [
        LossParams(),
        LossParams(output=1, min_snr=5, jacobian=JacobianParams(weight=0.1, every=2, images=4, ramp_steps=3)),
        LossParams(noise=0, output=1, feature=0.1),
    ],
    "channels_last": [False, True],
    "accumulate": [1, 2],
    "gradient_checkpointing": [False, True],
    "precision": ["float32", "bfloat16"],
    "compile": [False, True],
    "ema_decays": [(0.5, 0.9), (0.9,)],
    "flip": [True, False],
    "antithetic": [True, False],
    "dropout": [None, 0.1],
}
"""The options of a training, and the step at which it is killed."""


def pairwise(choices):
    """List combinations in which each pair of values of two keys occurs; each takes what has the most new pairs."""
    left = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(choices, 2)
        for i, j in itertools.product(range(len(choices[a])), range(len(choices[b])))
    }
    while left:
        row = dict(min(left, key=sorted))
        for key in [key for key in choices if key not in row]:
            gains = [
                sum(frozenset([(key, index), other]) in left for other in row.items())
                for index in range(len(choices[key]))
            ]
            row[key] = gains.index(max(gains))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        yield {key: choices[key][row[key]] for key in choices}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(it, id="-".join(map(str, it.values())), marks=[pytest.mark.e2e] * it["compile"])  # tracing is slow
        for it in pairwise(CHOICES)
    ],
)
def test_a_killed_training_resumes_bit_for_bit(trainer, unet, tmp_path, monkeypatch, chosen):
    """Weights, EMA, curve and samples equal those of an uninterrupted run, under every pair of options."""
    plugin = engine.TorchDynamoPlugin
    without_code = {"inductor": "eager", "no": "no"}  # traces the model, and generates no code
    monkeypatch.setattr(engine, "TorchDynamoPlugin", lambda backend: plugin(backend=without_code[backend]))
    options = {key: value for key, value in chosen.items() if key in EngineParams.model_fields}
    changes = {key: value for key, value in chosen.items() if key in FinetuneParams.model_fields}
    killed_at = chosen["killed_at"]
    channels = {name: None for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)}

    def make():
        return trainer(teacher=(copy.deepcopy(unet), channels), engine=EngineParams(**options), **changes)

    uninterrupted = make()
    uninterrupted.run(Checkpoints(tmp_path / "uninterrupted", "run"))
    killed = make()
    step = killed.step

    def step_or_die():
        if killed.steps_done == killed_at:
            raise KilledError
        step()

    killed.step = step_or_die
    with pytest.raises(KilledError):
        killed.run(Checkpoints(tmp_path / "killed", "run"))
    resumed, steps = make(), []
    step_again = resumed.step
    resumed.step = lambda: (steps.append(resumed.steps_done), step_again())
    resumed.run(Checkpoints(tmp_path / "killed", "run"))

    assert steps == list(range(killed_at // 2 * 2, 7))  # from the last checkpoint
    states = [
        [tensors_sha256(model.state_dict()) for model in (run.unet, *run.ema_models.models.values())]
        for run in (uninterrupted, resumed)
    ]
    assert states[0] == states[1]
    assert resumed.curve == uninterrupted.curve
    samples = [{step: drawn.tolist() for step, drawn in run.samples.items()} for run in (uninterrupted, resumed)]
    assert samples[0] == samples[1]


def test_another_seed_is_another_training(trainer, tmp_path):
    """Order, noise and timesteps all come from the seed."""
    runs = [trainer(seed) for seed in (0, 0, 1)]
    for index, run in enumerate(runs):
        run.run(Checkpoints(tmp_path / str(index), "run"))
    hashes = [tensors_sha256(run.best_ema.state_dict()) for run in runs]

    assert hashes[0] == hashes[1] != hashes[2]


def test_an_epoch_uses_every_image_once(trainer, images):
    """Three batches of eight are the 24 training images; the second epoch has another order."""
    run = trainer(flip=False)
    epochs = []
    for _ in range(2):
        batches = []
        for _ in range(3):
            batches.append(run.batches.at(run.steps_done, run.rows).images)
            run.steps_done += 1
        epochs.append(torch.cat(batches))

    expected = torch.from_numpy(images.train).float() / 127.5 - 1
    for epoch in epochs:
        assert sorted(map(str, epoch.flatten(1).tolist())) == sorted(map(str, expected.flatten(1).tolist()))
    assert not torch.equal(*epochs)


def test_half_of_the_images_are_flipped(trainer, images):
    """The seed of the step decides which ones; the images in memory do not change."""
    run, before = trainer(), images.train.copy()
    batch = run.batches.at(0, run.rows)
    plain = torch.from_numpy(images.train[run.batches.choose(0)]).float() / 127.5 - 1
    flipped = torch.rand(len(batch), generator=generator(run.seed, "finetune", 0)) < 0.5

    assert 0 < int(flipped.sum()) < len(batch)
    assert torch.equal(batch.images, torch.where(flipped[:, None, None, None], plain.flip(-1), plain))
    assert np.array_equal(images.train, before)


def test_the_ema_follows_its_formula(trainer):
    """After one step with ramp (1 + 1) / (10 + 1): ema = d·before + (1 − d)·after."""
    run = trainer()
    before = run.unet.conv_in.weight.clone()
    run.step()

    decay = 2 / 11
    expected = decay * before + (1 - decay) * run.unet.conv_in.weight
    for ema in run.ema_models.models.values():  # both decays are above the ramp
        torch.testing.assert_close(ema.conv_in.weight.data, expected.data)
    decays = [0.5, 0.9]
    for _ in range(10):
        run.step()
    before = [ema.conv_in.weight.clone() for ema in run.ema_models.models.values()]
    run.step()
    ramped = [min(decay, 13 / 22) for decay in decays]
    for ema, previous, decay in zip(run.ema_models.models.values(), before, ramped, strict=True):
        expected = decay * previous + (1 - decay) * run.unet.conv_in.weight
        torch.testing.assert_close(ema.conv_in.weight.data, expected.data)


def test_the_gradient_is_clipped_to_the_norm(trainer):
    """That of all weights together."""
    run = trainer(clip_norm=1e-3)
    run.step()
    norms = torch.stack([parameter.grad.norm() for parameter in run.unet.parameters()])

    assert float(norms.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_damaged_checkpoint_is_skipped(trainer, tmp_path, capsys):
    """The previous one is read, and a warning is printed."""
    checkpoints = Checkpoints(tmp_path, "run")
    run = trainer()
    for _ in range(4):
        run.step()
        checkpoints.save(run.checkpoint())
    newest = max(checkpoints.folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])

    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]
    assert checkpoints.newest().step == 3
    assert "this checkpoint is skipped" in capsys.readouterr().err


def test_runs_have_separate_checkpoints(trainer, tmp_path):
    """Reading and clearing one run does not affect another."""
    run = trainer()
    run.step()
    Checkpoints(tmp_path, "a" * 64).save(run.checkpoint())

    assert Checkpoints(tmp_path, "b" * 64).newest() is None
    Checkpoints(tmp_path, "b" * 64).clear()
    assert Checkpoints(tmp_path, "a" * 64).newest().step == 1


def test_the_gate_and_the_checkpoints_change_no_weight():
    """So a training goes on from its checkpoints with others; with another norm to clip to it does not."""
    params = PARAMS.model_copy(update={"gate": 0.1, "checkpoint_every": 3, "keep_checkpoints": 5})

    assert params.of_weights() == PARAMS.of_weights()
    assert PARAMS.model_copy(update={"clip_norm": 2.0}).of_weights() != PARAMS.of_weights()


def test_a_loss_that_is_not_finite_ends_the_training(images, scheduler, unet, tmp_path):
    """The message has the step and the key to change."""
    with torch.no_grad():
        unet.conv_in.weight.fill_(math.nan)
    run = Trainer(unet, scheduler, images, PARAMS.model_copy(update={"samples": None}), 0)

    with pytest.raises(InputError, match=r"the loss is nan and its .* nan at step 1; lower finetune\.learning_rate"):
        run.run(Checkpoints(tmp_path, "run"))


def test_a_batch_larger_than_the_data_is_refused(trainer, images):
    """The message has both numbers and the key."""
    assert isinstance(images, Images)
    with pytest.raises(InputError, match=r"finetune\.batch_size 25 is more than the 24 training images"):
        trainer(batch_size=25)


def test_half_of_the_timesteps_mirror_the_others():
    """The mirror of t is T − 1 − t; in an odd batch one timestep has none."""
    for size in (1, 7, 8):
        timesteps = draw_timesteps(size, 1000, torch.Generator().manual_seed(0), antithetic=True)
        half = size // 2 + 1
        assert len(timesteps) == size
        assert timesteps[half:].tolist() == (999 - timesteps[: size - half]).tolist()
    evenly_spaced = draw_timesteps(4000, 10, torch.Generator().manual_seed(0), antithetic=True)
    assert evenly_spaced.bincount().tolist() == pytest.approx([400] * 10, rel=0.2)


def test_no_timestep_of_the_heldout_loss_mirrors_another(images):
    """They are drawn independently, unlike those of a training batch."""
    timesteps = heldout_batch(images, 8, 1000).timesteps

    assert timesteps[5:].tolist() != (999 - timesteps[:3]).tolist()


def test_parts_of_a_batch_equal_the_whole(images):
    """Images, flips, noise and timesteps do not depend on how processes divide the batch."""
    batches = Batches(images, 1000, 3, **BATCHES)
    whole = batches.at(5, slice(0, 8))
    parts = [Batches(images, 1000, 3, **BATCHES).at(5, part) for part in (slice(0, 2), slice(2, 8))]

    for name in ("images", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_the_prefetcher_returns_the_batch_of_each_step(images):
    """Steps may come in any order, and twice."""
    prefetcher = Prefetcher(Batches(images, 1000, 3, **BATCHES), slice(2, 8))
    for step in (0, 1, 2, 7, 7, 8, 3):
        found, expected = prefetcher.get(step), Batches(images, 1000, 3, **BATCHES).at(step, slice(2, 8))
        assert all(torch.equal(vars(found)[name], vars(expected)[name]) for name in vars(expected))


@pytest.mark.parametrize("muon", CHOICES["muon"], ids=["adam", "muon"])
@pytest.mark.parametrize(
    "options",
    [{"accumulate": 4}, {"gradient_checkpointing": True}, {"channels_last": True}],
    ids=str,
)
def test_the_engine_changes_only_the_last_bits(trainer, unet, options, muon):
    """Parts, recomputed activations and another layout give the same steps within float32's rounding."""
    channels = {name: None for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)}
    loss = LossParams(output=1, feature=0.1)
    runs = []
    for changes in ({}, options):
        teacher = (copy.deepcopy(unet), channels)
        run = trainer(loss=loss, engine=EngineParams(**changes), teacher=teacher, muon=muon)
        run.unet.conv_out.weight.data.add_(0.01)
        for _ in range(3):
            run.step()
        runs.append(run)

    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    for mine, theirs in zip(runs[1].unet.parameters(), runs[0].unet.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_bfloat16_stays_close_and_keeps_float32_weights(trainer):
    """The losses of the first steps differ by less than two percent."""
    runs = [trainer(engine=EngineParams(precision=precision)) for precision in ("float32", "bfloat16")]
    for run in runs:
        for _ in range(3):
            run.step()

    assert runs[1].losses != runs[0].losses
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=0.02)
    assert {parameter.dtype for parameter in runs[1].unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("schedule", "falling"),
    [("cosine", [0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]), ("linear", [1, 0.75, 0.5, 0.25])],
)
def test_the_learning_rate_follows_its_schedule(trainer, schedule, falling):
    """It rises during the warm-up, then falls to 0 along a half cosine or a line."""
    run = trainer(schedule=schedule, warmup_steps=2, steps=6)
    rates = []
    for _ in range(6):
        run.step()
        rates.append(run.optimizer.parts["adam"].param_groups[0]["lr"] / PARAMS.learning_rate)

    assert rates == pytest.approx([0.5, 1, *falling])


def test_a_warm_up_of_all_steps_is_refused():
    """No step after it would have the rate of the schedule."""
    with pytest.raises(ValidationError, match="warmup_steps 5 must be less than steps 5"):
        FinetuneParams(steps=5, warmup_steps=5)
    assert FinetuneParams(steps=5, warmup_steps=4).warmup_steps == 4


def test_dropout_overrides_the_models_config(trainer):
    """Without a number the config's probability stays."""
    changed = [module.p for module in trainer(dropout=0.3).unet.modules() if isinstance(module, torch.nn.Dropout)]
    kept = [module.p for module in trainer().unet.modules() if isinstance(module, torch.nn.Dropout)]

    assert set(changed) == {0.3}
    assert set(kept) == {0.0}


def test_each_step_and_process_has_dropout_of_its_own(trainer):
    """The seed of its masks is set before each step, so that a resumed training repeats them."""
    run, seeds = trainer(dropout=0.5), []
    for index, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        run.engine.index = index
        run._accumulate(step)
        seeds.append(torch.initial_seed())

    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[3]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_follow_the_steps_alone(unet, scheduler, images, tmp_path, size, in_place):
    """The forecast changes none, so that a resumed training ends with the same; every EMA has the model's.

    An expanded tensor has fewer numbers than elements and could not be written to. One that is made in the first pass
    is missing before, or None.
    """

    def count(module, _inputs, _output):
        if module.late is None:
            module.late = torch.ones(())
        if not hasattr(module, "new"):
            module.register_buffer("new", torch.ones(()), persistent=False)
        if module.training:
            module.new = module.new + 1
        if module.training and in_place:
            module.passes += 1
        elif module.training:
            module.passes = module.passes + 1

    shared = torch.ones(2)

    def make():
        model = copy.deepcopy(unet)
        model.register_buffer("passes", torch.zeros(1).expand(size))
        model.register_buffer("late", None, persistent=False)
        model.register_buffer("table", shared, persistent=False)
        model.conv_in.register_buffer("table", shared, persistent=False)
        model.register_forward_hook(count)
        return Trainer(model, scheduler, images, PARAMS, 0)

    killed = make()
    step = killed.step

    def step_or_die():
        if killed.steps_done == 5:
            raise KilledError
        step()

    killed.step = step_or_die
    with pytest.raises(KilledError):
        killed.run(Checkpoints(tmp_path, "run"))
    resumed = make()
    resumed.run(Checkpoints(tmp_path, "run"))

    models = (resumed.unet, *resumed.ema_models.models.values())
    assert [set(model.passes.tolist()) for model in models] == [{7}] * 3
    assert {float(model.new) for model in models} == {8}, "of 1 in the first pass and 7 steps"
    assert not any("new" in model.state_dict() for model in models)


def test_an_operation_without_a_deterministic_kernel_is_named_from_the_first_pass(trainer, monkeypatch):
    """The first passes are those of the held-out loss."""
    run = trainer()

    def refuse(*_):
        raise RuntimeError(f"cumsum_cuda_kernel{REFUSAL}")

    monkeypatch.setattr(run.distillation, "predict", refuse)
    with pytest.raises(InputError, match=r"cumsum_cuda_kernel has .* set finetune\.engine\.deterministic to false"):
        run.measure()


def test_samples_are_drawn_at_regular_steps(trainer, tmp_path):
    """There is a row before the first step, one every four steps and one at the end."""
    run = trainer(samples=SamplesParams(every=4, num_images=2, steps=2))
    run.run(Checkpoints(tmp_path, "run"))

    assert list(run.samples) == [0, 4, 7]
    assert {drawn.shape for drawn in run.samples.values()} == {(2, 1, 8, 8)}


def test_a_training_that_cannot_reach_its_gate_ends_early(trainer, tmp_path):
    """Its last step stays: the same gate is missed at once, without one the training goes on as if never stopped."""
    changes = {"steps": 12, "heldout_every": 2, "samples": None}
    run, again, more, whole = (trainer(**changes, gate=gate) for gate in (1e-6, 1e-6, None, None))
    for missed in (run, again):
        with pytest.raises(InputError, match=r"finetune\.gate is 1e-06"):
            missed.run(Checkpoints(tmp_path, "run"))
        assert missed.steps_done == 8
    more.run(Checkpoints(tmp_path, "run"))
    whole.run(Checkpoints(tmp_path / "whole", "run"))

    assert torch.equal(more.best_ema.conv_in.weight, whole.best_ema.conv_in.weight)
    assert run.params.of_weights() == more.params.of_weights()


def test_a_gate_that_is_missed_at_the_last_step_keeps_it(trainer, tmp_path):
    """It is measured again neither with the same gate nor without."""
    changes = {"steps": 3, "heldout_every": 3, "samples": None, "checkpoint_every": 2}
    for gate in (1e-6, 1e-6):
        with pytest.raises(InputError, match=r"at step 3 falls to .* finetune\.gate is 1e-06"):
            trainer(**changes, gate=gate).run(Checkpoints(tmp_path, "run"))
    run = trainer(**changes)
    run.run(Checkpoints(tmp_path, "run"))

    assert [point.step for point in run.curve] == [0, 3]


def test_all_kinds_of_dropout_are_set(trainer, unet):
    """An own class may have any."""
    unet.extra, unet.attention = torch.nn.Dropout2d(0.5), torch.nn.MultiheadAttention(4, 1, dropout=0.5)
    run = trainer(dropout=0.1)

    assert (run.unet.extra.p, run.unet.attention.dropout) == (0.1, 0.1)
    assert trainer().unet.attention.dropout == 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_stops(trainer, tmp_path, number):
    """The current step is finished, the exit code is that of the signal, and the next run resumes bit for bit."""
    uninterrupted = trainer()
    uninterrupted.run(Checkpoints(tmp_path / "uninterrupted", "run"))
    run = trainer()
    step = run.step

    def step_and_interrupt():
        step()
        if run.steps_done == 5:
            os.kill(os.getpid(), number)

    run.step = step_and_interrupt
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 5, which is saved") as stopped:
        run.run(Checkpoints(tmp_path / "stopped", "run"))
    resumed = trainer()
    resumed.run(Checkpoints(tmp_path / "stopped", "run"))

    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert tensors_sha256(resumed.unet.state_dict()) == tensors_sha256(uninterrupted.unet.state_dict())


def test_a_checkpoint_of_another_run_is_refused(trainer, tmp_path):
    """It can only get into this run's folder by hand."""
    run = trainer()
    run.step()
    theirs = Checkpoints(tmp_path, "a" * 64)
    theirs.save(run.checkpoint())
    mine = Checkpoints(tmp_path, "b" * 64)
    theirs.folder.rename(mine.folder)

    with pytest.raises(InputError, match=r"is a checkpoint of run a{12}, this is run b{12}: other params"):
        mine.newest()


def test_a_batch_that_does_not_divide_is_refused(trainer):
    """The message has the processes, the parts and a possible size."""
    run = trainer()
    run.engine.num_processes = 3
    with pytest.raises(InputError, match=r"batch_size 8 does not divide by 3 processes of 1 parts each; .* of 3"):
        run.engine.local_rows(8)


def test_fresh_weights_have_the_same_shapes(unet, magnitude):
    """The seed determines them."""
    plan = plan_pruning(unet, magnitude, PruneParams(target=Target(ratio=0.3)), 0)
    pruned = prune_unet(copy.deepcopy(unet), plan, None)
    copies = [with_fresh_weights(pruned, seed) for seed in (0, 0, 1)]
    hashes = [tensors_sha256(one.state_dict()) for one in copies]

    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (pruned, *copies)]
    assert all(found == shapes[0] for found in shapes)
    assert hashes[0] == hashes[1] != hashes[2]
    assert tensors_sha256(pruned.state_dict()) not in hashes
