"""The kernels and the precision that stages choose: strictly deterministic, and tf32 where it was asked for alone."""

import copy
import platform
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers.models.unets.unet_2d import UNet2DModel
from ruamel.yaml import YAML

from stages.costs import timing
from stages.costs.params import CostsParams
from stages.costs.timing import measure_costs
from stages.evaluate.__main__ import main as evaluate
from stages.finetune.__main__ import main as finetune
from stages.finetune.params import EngineParams, FinetuneParams, SamplesParams
from stages.finetune.trainer import Trainer
from stages.importance.__main__ import main as importance
from stages.importance.calibration import calibrate
from stages.importance.params import DrawParams, ImportanceParams
from stages.models.latency import measure_latencies_ms
from stages.models.params import SamplerParams
from stages.models.sampling import draw, draw_strip
from stages.reference.__main__ import main as reference
from stages.runtime import device
from stages.runtime.device import check_precision, keep_freed_memory, kernels, select_device
from stages.runtime.errors import InputError
from stages.storage import provenance
from stages.storage.provenance import fingerprint

SAMPLER = SamplerParams(steps=2)
IMPORTANCE = {"criterion": "taylor", "formula": "paper", "threshold": 0.0, "num_images": 2, "stride": 500}


@pytest.fixture(autouse=True)
def _settings_are_restored(monkeypatch):
    """Leave the process's settings as they were."""
    monkeypatch.delenv(device.WORKSPACE_VARIABLE, raising=False)
    matmul, cudnn, filling = torch.backends.cuda.matmul, torch.backends.cudnn, torch.utils.deterministic
    before = matmul.allow_tf32, cudnn.allow_tf32, filling.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    matmul.allow_tf32, cudnn.allow_tf32, filling.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


def overwrite():
    """Run an operation that PyTorch has no deterministic kernel for, on any device."""
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def tf32():
    """Whether products and convolutions would be computed in tf32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


class Watched(UNet2DModel):
    """A model that notes the settings of each forward and each backward pass; copies note in the same list."""

    seen = None

    def forward(self, *inputs, **options):
        """Note, then compute."""
        self.note("forward")
        output = super().forward(*inputs, **options)
        if output[0].requires_grad:
            output[0].register_hook(lambda _gradient: self.note("backward"))
        return output

    def note(self, name):
        """Append the settings."""
        type(self).seen.append((name, torch.are_deterministic_algorithms_enabled(), *tf32()))


@pytest.fixture
def watched(unet):
    """The tiny UNet, which notes; an empty list of notes."""
    copied = copy.deepcopy(unet)
    copied.__class__ = Watched
    Watched.seen = []
    return copied


def test_what_has_no_deterministic_kernel_is_refused_and_not_merely_warned_of():
    """PyTorch takes the deterministic backward passes of attention only where it would refuse others."""
    assert select_device().type in ("cpu", "cuda")
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        overwrite()

    select_device(deterministic=False)
    assert overwrite()[0] == 1
    with kernels(deterministic=True), pytest.raises(RuntimeError):
        overwrite()
    assert overwrite()[0] == 1


def train(unet, scheduler, images, precision, **engine):
    """Take a step, measure, and draw samples."""
    params = FinetuneParams(
        steps=2,
        batch_size=4,
        learning_rate=1e-3,
        ema_decays=(0.5,),
        clip_norm=1.0,
        flip=False,
        heldout_images=4,
        heldout_every=1,
        checkpoint_every=2,
        samples=SamplesParams(every=1, num_images=1, steps=2),
        engine=EngineParams(precision=precision, **engine),
    )
    trainer = Trainer(unet, scheduler, images, params, 0)
    Watched.seen.clear()
    trainer.step()
    steps = list(Watched.seen)
    Watched.seen.clear()
    trainer.measure()
    measurements, Watched.seen = Watched.seen, steps
    return measurements


def score(unet, scheduler, images, precision, **changes):
    """Measure the importance."""
    calibrate(unet, scheduler, images, ImportanceParams(precision=precision, **IMPORTANCE, **changes), 0)
    return []


def sample(unet, scheduler, _images, precision):
    """Draw images, and a strip."""
    draw(unet, scheduler, [1], SAMPLER, precision=precision, batch_size=1, label="x")
    draw_strip(unet, scheduler, [1], SAMPLER, 2, precision)
    return []


def time_passes(unet, _scheduler, _images, precision):
    """Time forward passes."""
    costs = CostsParams(batches=(1,), precisions=(precision,), repeats=6, seconds=1, deterministic=True)
    assert measure_costs({"dense": unet}, costs)[0].median_ms
    return []


WORK = [train, score, sample, time_passes]


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tf32_holds_for_the_passes_that_asked_for_it_and_for_no_others(
    work, precision, watched, scheduler, images, monkeypatch
):
    """In forward and backward passes, products and convolutions alike; measurements of a training stay float32."""
    monkeypatch.setattr(timing, "has_tf32", lambda _device: True)
    select_device()
    others = work(watched, scheduler, images, precision)

    asked = precision == "tf32"
    assert {(strict, *found) for _, strict, *found in Watched.seen} == {(True, asked, asked)}
    assert {name for name, *_ in Watched.seen} == ({"forward", "backward"} if work in (train, score) else {"forward"})
    assert {tuple(found) for _, _, *found in others} <= {(False, False)}
    assert bool(others) == (work is train)
    assert tf32() == (False, False)


def test_calibration_images_are_drawn_in_float32(watched, scheduler, images):
    """So that they do not depend on the precision of the gradients."""
    select_device()
    score(watched, scheduler, images, "tf32", draw=DrawParams(steps=2))

    found = {(name, *flags) for name, _, *flags in Watched.seen}
    assert found == {("forward", False, False), ("forward", True, True), ("backward", True, True)}


@pytest.mark.parametrize(
    ("command", "block", "folders"),
    [
        (reference, "reference", ("model", "data", "out")),
        (importance, "importance", ("model", "data", "out", "report")),
        (finetune, "finetune", ("model", "data", "checkpoints", "out", "report")),
        (evaluate, "reference", ("dense", "pruned", "finetuned", "reference", "report")),
    ],
)
def test_a_device_without_tf32_refuses_it(command, block, folders, root, tmp_path, monkeypatch):
    """It would silently compute in float32, and the record would say tf32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    key = f"{block}.engine.precision" if block == "finetune" else f"{block}.precision"
    (params[block]["engine"] if block == "finetune" else params[block])["precision"] = "tf32"
    YAML().dump(params, tmp_path / "params.yaml")
    options = [argument for name in folders for argument in (f"--{name}", str(tmp_path / name))]
    result = CliRunner().invoke(command, ["--params", str(tmp_path / "params.yaml"), *options])

    assert result.exit_code == 1
    needed = "an NVIDIA GPU of compute capability 8.0 or more"
    advice = "set it to float32 or bfloat16"
    assert result.stderr == f"Error: {key} is tf32, which needs {needed}, and this is the CPU; {advice}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_older_gpus_have_no_tf32(monkeypatch):
    """Ampere, compute capability 8.0, was the first with it."""
    gpu, capability = torch.device("cuda"), (7, 5)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Turing")
    with pytest.raises(InputError, match="and this is Turing"):
        check_precision("tf32", "reference.precision", gpu)
    check_precision("bfloat16", "reference.precision", gpu)

    capability = (8, 0)
    check_precision("tf32", "reference.precision", gpu)


@pytest.mark.parametrize(("work", "key"), [(train, "finetune.engine"), (score, "importance")])
def test_an_operation_without_deterministic_kernel_names_the_switch_that_allows_it(
    work, key, watched, scheduler, images
):
    """In the backward pass too; with the switch off it runs."""

    def hook(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _gradient: overwrite().sum() * 0 + _gradient)

    watched.conv_in.register_forward_hook(hook)
    select_device()
    with pytest.raises(InputError) as caught:
        work(watched, scheduler, images, "float32")
    advice = f"set {key}.deterministic to false"
    assert caught.value.message == f"put_ has no deterministic kernel on this device; {advice}"

    select_device(deterministic=False)
    work(watched, scheduler, images, "float32", deterministic=False)


@pytest.mark.parametrize(
    ("variable", "value", "deterministic", "message"),
    [
        (device.WORKSPACE_VARIABLE, ":0:0", True, "unset it, or set it to :4096:8 or :16:8"),
        (device.WORKSPACE_VARIABLE, ":0:0", False, None),
        (device.WORKSPACE_VARIABLE, ":16:8", True, None),
        (device.OVERRIDE_VARIABLE, "1", True, "overrides every precision of params.yaml; unset it"),
        (device.OVERRIDE_VARIABLE, "0", False, "overrides every precision of params.yaml; unset it"),
    ],
)
def test_variables_that_break_the_choice_on_a_gpu_are_refused(variable, value, deterministic, message, monkeypatch):
    """NVIDIA's libraries read them behind PyTorch's back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(variable, value)
    if message is None:
        assert select_device(deterministic=deterministic).type == "cuda"
        return
    with pytest.raises(InputError, match=message):
        select_device(deterministic=deterministic)


def test_times_are_those_of_the_kernels_that_pytorch_chooses_for_speed(watched):
    """As users of the released model have them; each row names them, and the process goes on as before."""
    select_device()
    quick = {"batches": (1,), "repeats": 6, "seconds": 0.5}
    (fast,), (strict,) = (
        measure_costs({"dense": watched}, CostsParams(**quick, **changes)) for changes in ({}, {"deterministic": True})
    )
    assert (fast.deterministic, strict.deterministic) == (False, True)
    assert (fast.kernels, strict.kernels) == ("kernels chosen for speed", "deterministic kernels")
    half = len(Watched.seen) // 2
    assert {flag for _, flag, *_ in Watched.seen[:half]} == {False}
    assert {flag for _, flag, *_ in Watched.seen[half:]} == {True}

    Watched.seen.clear()
    measure_latencies_ms({"dense": watched}, 3)
    assert {flag for _, flag, *_ in Watched.seen} == {False}
    assert torch.are_deterministic_algorithms_enabled()


def test_a_time_in_tf32_is_left_out_where_the_device_has_none(unet):
    """It would be the time of float32."""
    params = CostsParams(batches=(1,), precisions=("float32", "tf32"), repeats=6, seconds=0.5)
    float32, row = measure_costs({"dense": unet}, params)

    assert float32.median_ms
    if not torch.cuda.is_available():
        assert (row.precision, row.median_ms, row.left_out) == ("tf32", None, "this device has no tf32")


def test_what_alters_the_weights_names_another_training(params, monkeypatch):
    """Precision, kernels, and what of the machine decides the order of sums."""

    def name(**changes):
        engine = params.finetune.engine.model_copy(update=changes)
        return fingerprint("finetune", [], finetune=params.finetune.model_copy(update={"engine": engine}))

    names = [name(), name(precision="tf32"), name(precision="bfloat16"), name(deterministic=False)]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.append(name())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    for workspace in device.WORKSPACES:
        monkeypatch.setenv(provenance.WORKSPACE_VARIABLE, workspace)
        names.append(name())
    assert len(set(names)) == len(names) == 7


@contextmanager
def on_gpu(**choice):
    """Select the GPU, and give a tensor function of attention there."""
    gpu = select_device(**choice)
    torch.manual_seed(0)
    yield torch.randn(3, 2, 8, 1024, 64, device=gpu, requires_grad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_repeats_its_gradients_on_a_gpu(dtype):
    """Flash attention's in bfloat16, memory-efficient attention's in float32; twenty times the same bits."""
    with on_gpu() as tensors:
        found = []
        for _ in range(20):
            (gradient,) = torch.autograd.grad(
                torch.nn.functional.scaled_dot_product_attention(*tensors.to(dtype)).float().square().sum(), tensors
            )
            found.append(gradient)
    assert all(torch.equal(gradient, found[0]) for gradient in found)


@pytest.mark.gpu
def test_tf32_rounds_on_a_gpu_and_float32_does_not():
    """To three digits or so, which float32 in full does not."""
    gpu = select_device()
    one, two = (torch.randn(256, 256, device=gpu, generator=torch.Generator(gpu).manual_seed(seed)) for seed in (0, 1))
    exact = (one.double() @ two.double()).cpu().numpy()
    error = {}
    for precision in ("float32", "tf32"):
        with device.computing(precision):
            error[precision] = float(np.abs((one @ two).cpu().numpy() - exact).max())
    assert error["float32"] < 1e-4 < error["tf32"] < 0.2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Without it, each of these tensors of 32 MB needs 8,000 new pages."""
    keep_freed_memory()
    for _ in range(10):
        torch.ones(8_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8_000_000)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 8_000
