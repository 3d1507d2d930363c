"""Every path that computes, on CUDA tensors without values: operations on two devices fail here as there."""

import copy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stages.costs.params import CostsParams
from stages.costs.timing import measure_costs
from stages.finetune.distillation import kept_channels
from stages.finetune.params import EngineParams, FinetuneParams, LossParams
from stages.finetune.recovery import with_fresh_weights
from stages.finetune.trainer import Trainer
from stages.importance.calibration import calibrate
from stages.importance.criteria import CRITERIA
from stages.importance.params import DrawParams, ImportanceParams, ReportParams
from stages.importance.stability import measure_diagnostics
from stages.models.autoencoder import Autoencoder
from stages.models.latency import measure_latencies_ms
from stages.models.params import SamplerParams, SamplesParams, SchedulerName
from stages.models.sampling import SamplingContext, draw, draw_strip
from stages.models.trial import _score_and_cut, check_runs
from stages.protocol.extractors import BUNDLED, GIVEN, PYTORCH_FID, Extractor
from stages.protocol.params import ExtractorParams
from stages.protocol.resnet56 import ResNet56
from stages.prune.compensate import NoisyBatches
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from tests.conftest import AUTOENCODER

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
IMPORTANCE = ImportanceParams(
    criterion="diff-pruning",
    formula="paper",
    threshold=0.05,
    num_images=3,
    stride=250,
    timesteps_per_pass=2,
    report=ReportParams(timesteps=2, draws=2),
)
FINETUNE = FinetuneParams(
    steps=2,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=1,
    ema_decays=(0.9,),
    clip_norm=1.0,
    flip=True,
    heldout_images=4,
    heldout_every=1,
    checkpoint_every=1,
    loss=LossParams(output=1, feature=0.1, min_snr=5),
    samples=SamplesParams(every=2, num_images=2, steps=2),
)
COMPENSATE = CompensateParams(num_images=2, num_timesteps=1, rounds=2)
CODECS = {
    "AutoencoderKL": lambda: AutoencoderKL(**AUTOENCODER, shift_factor=0.1),
    "VQModel": lambda: VQModel(**AUTOENCODER),
}
SAMPLERS = [
    *(SamplerParams(scheduler=name, steps=4) for name in get_args(SchedulerName)),
    *(SamplerParams(steps=4, spacing=spacing) for spacing in ("trailing", "quadratic")),
    SamplerParams(steps=4, eta=0.5, clip=True),
    SamplerParams(steps=4, eta=0.5, spacing="quadratic"),
]


@pytest.fixture(params=["pixels", "latents"])
def system(request, fake_cuda, unet, conditional, images, latents):
    """A model on CUDA with its images: unconditional in pixel space, and conditional on latents."""
    model, data = (unet, images) if request.param == "pixels" else (conditional, latents)
    return model.to(fake_cuda), data


def test_an_operation_on_two_devices_fails(fake_cuda):
    """As on a real GPU: elementwise, in place, by index, with a generator, in lists; scalars and copies pass."""
    there, here = torch.ones(2, 2, device=fake_cuda), torch.ones(2, 2)
    wrong = [
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.cat([there, here]),
        lambda: here[torch.ones(1, dtype=torch.long, device=fake_cuda)],
        lambda: torch.randn(2, generator=torch.Generator(), device=fake_cuda),
        lambda: torch._foreach_lerp_([here], [there], 0.5),
        lambda: torch.equal(here, there),
        there.numpy,
    ]
    for operation in wrong:
        with pytest.raises((RuntimeError, TypeError)):
            operation()

    assert (
        (there * torch.tensor(2.0)).device == there[torch.tensor([1])].device == here.to(fake_cuda).device == fake_cuda
    )
    assert there.cpu().numpy().shape == here.shape


def test_importance(system, scheduler):
    """Each criterion scores every layer; the saliencies come back to the CPU. Of latents one of each kind is enough."""
    unet, images = system
    for index, criterion in enumerate(CRITERIA if images.conditions is None else ("diff-pruning", "fisher")):
        precision = ("float32", "bfloat16")[index % 2]
        params = IMPORTANCE.model_copy(update={"criterion": criterion, "precision": precision, "stride": 500})
        importance = calibrate(unet, scheduler, images, params, 0)

        assert {value.device.type for value in importance.saliency.values()} <= {"cpu"}
        assert bool(importance.saliency) == (criterion != "random")


@pytest.mark.e2e
def test_importance_of_drawn_images(fake_cuda, conditional, latents, scheduler):
    """The model draws its calibration images itself, with guidance, and the diagnostics are measured."""
    unet, images = conditional.to(fake_cuda), latents
    draw_params = DrawParams(steps=2, guidance=2.0)
    params = IMPORTANCE.model_copy(update={"draw": draw_params, "formula": "ldm", "stride": 500})
    importance = calibrate(unet, scheduler, images, params, 0)
    heat, _ = measure_diagnostics(importance, unet, scheduler, images, params, 0)

    assert heat is not None
    assert heat.contribution.shape == (len(heat.layers), 2)


def test_stability(fake_cuda, unet, images, scheduler):
    """Importance of training images with both diagnostics."""
    unet.to(fake_cuda)
    importance = calibrate(unet, scheduler, images, IMPORTANCE, 0)

    assert measure_diagnostics(importance, unet, scheduler, images, IMPORTANCE, 0)[0] is not None


@pytest.mark.e2e
def test_prune_and_compensate(fake_cuda, conditional, latents, scheduler, magnitude_of):
    """The cut model and its compensated weights stay on the device."""
    unet, images = conditional.to(fake_cuda), latents
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}, compensate=COMPENSATE))
    pruned = prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, COMPENSATE, 0))

    assert {parameter.device.type for parameter in pruned.parameters()} == {"cuda"}


def test_a_trial_and_fresh_weights(fake_cuda, unet):
    """What fetch tries a model with, and finetune.init scratch."""
    unet.to(fake_cuda)
    check_runs(unet, 1000, "")
    _score_and_cut.__wrapped__(unet)  # also where a model of this structure was tried before

    assert with_fresh_weights(unet, 0).device.type == "cuda"


@pytest.mark.parametrize(
    ("system", "engine"),
    [
        pytest.param("pixels", EngineParams(precision="bfloat16", channels_last=True), id="bfloat16"),
        pytest.param(
            "latents", EngineParams(accumulate=2, gradient_checkpointing=True), marks=pytest.mark.e2e, id="accumulate"
        ),
    ],
    indirect=["system"],
)
def test_finetune(system, scheduler, magnitude_of, engine):
    """Both distillations, EMA, held-out loss, samples, checkpoint and resume."""
    unet, images = system
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}))
    context = SamplingContext(table=images.conditions.table if images.conditions else None)
    params = FINETUNE.model_copy(update={"engine": engine, "flip": images.conditions is None})

    pruned = prune_unet(unet, plan, None)
    taught = copy.deepcopy(unet).requires_grad_(requires_grad=False), kept_channels(unet, plan)

    def start():
        return Trainer(copy.deepcopy(pruned), scheduler, images, params, 0, taught, context=context)

    first, second = start(), start()
    first.step()
    first.measure()
    second.restore(first.checkpoint())
    second.step()
    second.measure()

    assert first.engine.device.type == "cuda"
    assert (second.steps_done, len(second.curve), list(second.samples)) == (2, 2, [2])
    assert {it.device.type for moments in second.optimizer.moments().values() for it in moments.values()} == {"cuda"}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda it: f"{it.scheduler}-{it.spacing}-{it.eta}")
def test_draw(fake_cuda, unet, scheduler, sampler):
    """Every sampler, also after a training has moved the noise schedule to the device."""
    there = unet.to(fake_cuda)
    scheduler.add_noise(*torch.ones(2, 1, 1, 8, 8, device=fake_cuda), torch.ones(1, dtype=torch.long, device=fake_cuda))
    drawn = draw(there, scheduler, [1, 2], sampler, batch_size=2, label="")

    assert scheduler.alphas_cumprod.device == fake_cuda
    assert drawn.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_guidance(fake_cuda, conditional, scheduler, latents, guidance):
    """A conditional model with and without guidance, in bfloat16."""
    context = SamplingContext(table=latents.conditions.table, guidance=guidance)
    settings = {"precision": "bfloat16", "batch_size": 2, "context": context, "labels": context.labels(0, 3)}
    drawn = draw(conditional.to(fake_cuda), scheduler, [1, 2, 3], SamplerParams(steps=2), label="", **settings)

    assert drawn.shape == (3, 3, 8, 8)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_draw_of_other_predictions(fake_cuda, unet, kind):
    """DDIM and quadratic DDIM of models that predict v or the clean image, with thresholding."""
    unet.to(fake_cuda)
    scheduler = DDPMScheduler(prediction_type=kind, thresholding=True, rescale_betas_zero_snr=True)
    for spacing in ("trailing", "quadratic"):
        strip = draw_strip(unet, scheduler, [1, 2], SamplerParams(steps=2, spacing=spacing), 3)
        assert strip.shape == (2, 3, 1, 8, 8)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_codec(fake_cuda, conditional, scheduler, latents, codec):
    """Pixels to latents and back, and drawn latents to pixels."""
    autoencoder = Autoencoder(codec().to(fake_cuda))
    context = SamplingContext(autoencoder, latents.conditions.table, 2.0)
    sampler = SamplerParams(steps=2, spacing="trailing")
    encoded = autoencoder.encode(np.zeros((2, 3, 16, 16), np.uint8))
    drawn = draw(
        conditional.to(fake_cuda), scheduler, [1, 2], sampler, batch_size=2, label="", context=context, labels=[0, 3]
    )

    assert encoded.shape == (2, 3, 8, 8)
    assert drawn.shape == (2, 3, 16, 16)


def test_latency_and_costs(fake_cuda, unet):
    """Times, and memory by the allocator's peak."""
    unet.to(fake_cuda)
    rows = measure_costs({"dense": unet}, CostsParams(batches=(2,), precisions=("bfloat16",), repeats=6))

    assert [row.left_out for row in rows] == [""]
    assert set(measure_latencies_ms({"dense": unet}, 1)) == {"dense"}


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("name", [*BUNDLED, *GIVEN, PYTORCH_FID, "inception-v3-compat"])
def test_extractors(monkeypatch, name):
    """Features of images come back to the CPU; Inception and the residual network have weights of no training."""
    monkeypatch.setattr("stages.protocol.extractors._find_weights", lambda _: BUNDLED["digits"][1])
    monkeypatch.setattr("stages.protocol.extractors._check_hash", lambda *_: "")
    monkeypatch.setattr("stages.protocol.extractors._check_tensors", lambda _: None)
    monkeypatch.setattr("torch.load", lambda *_, **__: {})
    for network in (FeatureExtractorInceptionV3, ResNet56):
        monkeypatch.setattr(network, "load_state_dict", lambda *_, **__: None)
    params = ExtractorParams(name=name, weights=Path("given") if name in GIVEN else None)
    features = Extractor(params, 2).features(np.zeros((3, 1, 16, 16), np.uint8))

    assert features.device.type == "cpu"
    assert features.shape == (3, {"digits": 64, "thumbnail": 192, "cifar10-resnet56": 64}.get(name, 2048))
