"""An evaluation and its record."""

import copy
import csv
import json
import tracemalloc
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from skimage.metrics import mean_squared_error
from torchmetrics.functional.image import structural_similarity_index_measure

from stages.data.grid import images_to_grid
from stages.evaluate import consistency
from stages.evaluate.consistency import Pairs, images_to_mse, images_to_ssim
from stages.evaluate.evaluation import evaluate
from stages.evaluate.folders import find_snapshots
from stages.evaluate.opened import OpenedReference
from stages.evaluate.report import write_report
from stages.evaluate.summary import summarise
from stages.models.latency import measure_latencies_ms
from stages.protocol.evaluation import read_evaluation, read_snapshots
from stages.protocol.extractors import Extractor
from stages.protocol.reference import read_reference
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.reference.reference import make_reference
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from tests.together import run_together

DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_ssim_and_mse_are_those_of_other_libraries(shape):
    """Torchmetrics with an 11×11 Gaussian window, σ 1.5, range 255, but for the border that it mirrors; within 1e-6."""
    left = DRAWS.integers(0, 256, (4, *shape)).astype(np.uint8)
    right = np.clip(left + DRAWS.normal(0, 40, left.shape), 0, 255).astype(np.uint8)
    tensors = [torch.from_numpy(side).double() for side in (left, right)]
    _, windows = structural_similarity_index_measure(
        *tensors, sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    expected = windows[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))

    np.testing.assert_allclose(images_to_ssim(left, right), expected, atol=1e-6)
    expected = [mean_squared_error(x / 255, y / 255) for x, y in zip(left, right, strict=True)]
    np.testing.assert_allclose(images_to_mse(left, right), expected, rtol=1e-12)


def test_an_image_is_like_itself_and_unlike_its_negative():
    """SSIM 1, and well below 0."""
    images = DRAWS.integers(0, 256, (20, 1, 16, 16)).astype(np.uint8)

    assert images_to_ssim(images, images).tolist() == pytest.approx([1.0] * 20)
    assert images_to_ssim(images, 255 - images).max() < -0.5


def test_the_worst_pairs_come_first():
    """By set and index."""
    pairs = Pairs(ssim=np.array([[0.9, 0.1], [-0.2, 0.5]]), mse=np.zeros((2, 2)))

    assert pairs.worst(3) == [(1, 0), (0, 1), (1, 1)]


def test_latency_is_a_time(unet):
    """Positive, one for each model."""
    latencies_ms = measure_latencies_ms({"a": unet, "b": unet}, repeats=3)

    assert list(latencies_ms) == ["a", "b"]
    assert all(0 < value < 10_000 for value in latencies_ms.values())


def test_a_grid_holds_the_images_in_reading_order():
    """The second image stands right of the first, the seventh below it."""
    images = np.arange(48, dtype=np.uint8)[:, None, None, None].repeat(4, axis=2).repeat(4, axis=3)
    grid = images_to_grid(images)[..., 0]

    assert (grid[2, 2], grid[2, 8], grid[8, 2], grid[-3, -3]) == (0, 1, 6, 47)


@pytest.fixture(scope="module")
def built(make_unet, magnitude_of):
    """A dense model of the digits' size, and one pruned from it."""
    unet = make_unet(sample_size=16)
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3})))
    return {"dense": unet, "pruned": pruned}


@pytest.fixture
def models(built):
    """Copies of both, which a test may change."""
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Their weights on disk; what they hold does not matter here."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / f"{name}.safetensors" for name in ("dense", "pruned")}
    for name, path in paths.items():
        path.write_text(name)
    return paths


@pytest.fixture(scope="module")
def extractor(params):
    """The bundled one."""
    return Extractor(params.reference.extractor, 4)


@pytest.fixture(scope="module")
def real():
    """The real images."""
    return np.random.default_rng(0).integers(0, 256, (10, 1, 16, 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def reference(built, real, protocol, extractor, tmp_path_factory):
    """What the dense model draws."""
    folder = tmp_path_factory.mktemp("reference")
    make_reference(built["dense"], DDPMScheduler(), real, protocol, extractor, folder)
    return read_reference(folder)


def make_folder(path):
    """Make a folder and return its path."""
    path.mkdir()
    return path


@pytest.fixture
def scratch(tmp_path):
    """The folder of the drawn images."""
    return make_folder(tmp_path / "scratch")


@pytest.fixture(scope="module")
def opened(reference, extractor):
    """The reference, with what models draw by."""
    return OpenedReference(reference, extractor, DDPMScheduler())


@pytest.fixture(scope="module")
def evaluation(built, files, opened, tmp_path_factory):
    """Both, measured; tests only read it."""
    return evaluate(built, files, opened, tmp_path_factory.mktemp("scratch"))


def test_the_dense_model_is_like_itself(evaluation):
    """SSIM 1, MSE 0, and nothing of it is drawn again: its images are the reference's."""
    dense = evaluation.models["dense"]

    assert dense.sets["ssim"] == pytest.approx([1, 1])
    assert dense.sets["mse"] == [0, 0]
    assert evaluation.models["pruned"].macs < dense.macs
    assert {len(values) for values in dense.sets.values()} == {2}


def test_several_processes_measure_what_one_measures(models, files, scheduler, real, protocol, params, tmp_path):
    """Every file of the reference, number and picture, bit for bit; two sets of two batches are shared."""

    def run(count):
        folder, scratch = make_folder(tmp_path / f"{count}"), make_folder(tmp_path / f"scratch-{count}")

        def measure(processes):
            unets, extractor = copy.deepcopy(models), Extractor(params.reference.extractor, 2)
            make_reference(unets["dense"], scheduler, real, protocol, extractor, folder, processes=processes)
            opened = OpenedReference(read_reference(folder), extractor, scheduler)
            return evaluate(unets, files, opened, scratch, processes)

        found, *others = run_together(count, measure)
        assert others == [None] * (count - 1)
        return found, {path.name: path.read_bytes() for path in folder.iterdir()}

    alone, written = run(1)
    for count in (2, 3):
        found, files_of_all = run(count)
        assert files_of_all == written
        assert summarise(found) == summarise(alone)
        for one, other in zip(found.models.values(), alone.models.values(), strict=True):
            assert all(np.array_equal(vars(one)[key], vars(other)[key]) for key in ("shown", "worst", "strip"))


def test_memory_does_not_grow_with_the_number_of_images(make_unet, scheduler, real, protocol, params, tmp_path):
    """NumPy's peak while 48 images more of 4 KiB are drawn and measured grows by less than a quarter of them."""
    models = {
        "dense": make_unet(
            sample_size=64,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    }
    models["dense"].mid_block.attentions[0] = None
    extractor = Extractor(params.reference.extractor, 8)

    def measure(count, number=0):
        own = protocol.model_copy(update={"num_images": count, "sets": 1})
        folder = make_folder(tmp_path / f"{count}-{number}")
        tracemalloc.start()
        make_reference(models["dense"], scheduler, real.repeat(4, 2).repeat(4, 3), own, extractor, folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read_reference(folder).samples.nbytes == count * 64 * 64
        return peak

    measure(8)  # what is allocated once
    peaks = {count: min(measure(count, number) for number in range(3)) for count in (16, 64)}  # other threads add some
    assert peaks[64] - peaks[16] < 48 * 64 * 64 / 4


def test_the_dense_model_is_not_compared_with_itself(models, files, reference, opened, scratch, monkeypatch):
    """SSIM is computed for the images of the pruned model alone; that of equal images is known."""
    compared = []
    compute = consistency.structural_similarity
    monkeypatch.setattr(
        consistency,
        "structural_similarity",
        lambda x, y, **settings: compared.append(np.array_equal(x, y)) or compute(x, y, **settings),
    )
    found = evaluate(models, files, opened, scratch)

    assert compared == [False] * reference.protocol.sets * reference.protocol.num_images
    assert found.models["dense"].sets["ssim"] == [1.0] * 2
    assert found.models["dense"].pairs.worst(8) == [(row, column) for row in range(2) for column in range(4)]
    assert np.array_equal(found.models["dense"].worst[0], found.models["dense"].worst[1])


def test_a_second_evaluation_draws_no_dense_image(models, files, reference, extractor, opened, evaluation, tmp_path):
    """Counted on the model itself: it draws its strip, but never a set."""
    calls = []
    handle = models["dense"].register_forward_hook(lambda _, __, output: calls.append(len(output.sample)))
    again = evaluate(models, files, opened, make_folder(tmp_path / "again"))
    handle.remove()

    assert again.models["dense"].sets == evaluation.models["dense"].sets
    assert again.models["pruned"].sets == evaluation.models["pruned"].sets
    assert reference.protocol.num_images not in calls
    assert extractor.batch_size not in calls
    assert calls.count(3) == reference.protocol.sampler.steps  # of the strip


def test_a_reference_of_another_dense_model_is_refused(models, make_unet, opened, tmp_path):
    """Its images would not be from the same weights."""
    others = {**models, "dense": make_unet(seed=5, sample_size=16)}

    with pytest.raises(InputError, match=r"the dense model has weights of sha256 .*; run the reference stage again"):
        opened.check_models(others, tmp_path)


def test_a_model_that_draws_no_numbers_is_refused(models, files, opened, scratch):
    """NaN in the weights is NaN in the pictures; the first seed is named, and no number is made of it."""
    with torch.no_grad():
        models["pruned"].conv_out.bias.fill_(float("nan"))

    with pytest.raises(
        InputError, match=r"pruned, set 1 of 2 draws 4 of 4 images with values that are not finite \(first: seed \d+\)"
    ):
        evaluate(models, files, opened, scratch)


def test_the_record_holds_every_number_with_its_interval(evaluation, tmp_path):
    """JSON for programs, a flat file a model for DVC, every pair, and pictures that open."""
    write_report(evaluation, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())

    assert record["protocol_id"] == evaluation.protocol.id
    assert set(record["models"]) == {"dense", "pruned"}
    pruned = record["models"]["pruned"]
    assert len(pruned["fid"]["sets"]) == 2
    assert pruned["fid"]["mean"] == pytest.approx(np.mean(pruned["fid"]["sets"]))
    assert set(pruned["fid"]["above_dense"]) == {"mean", "half_width", "is_distinct"}
    assert pruned["worst_pairs"][0]["ssim"] == evaluation.models["pruned"].pairs.ssim.min()
    assert pruned["weights_sha256"] == sha256(b"pruned").hexdigest()
    assert read_evaluation(tmp_path) == summarise(evaluation)
    flat = json.loads((tmp_path / "metrics" / "pruned.json").read_text())
    assert flat["protocol"] == evaluation.protocol.id
    assert flat["fid"] == pruned["fid"]["mean"]
    assert all(not isinstance(value, dict) for value in flat.values())
    with (tmp_path / "pairs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * evaluation.protocol.num_images
    for name in ("dense", "pruned", "dense-strip", "pruned-worst"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) >= 60


def test_snapshots_change_nothing_of_the_other_models(models, files, opened, evaluation, tmp_path):
    """Their numbers are in a file of their own, beside the dense model's, and are those of any model so drawn."""
    scratch, found = make_folder(tmp_path / "again"), {}
    weights = {**files, "step-3": files["pruned"]}
    again = evaluate({**models, "step-3": models["pruned"]}, weights, opened, scratch)
    for name, measured in (("plain", evaluation), ("snapshots", again)):
        write_report(measured, make_folder(tmp_path / name))
        found[name] = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    record = read_snapshots(tmp_path / "snapshots")

    assert json.loads(found["snapshots"].pop("snapshots.json"))["models"].keys() == {"dense", "step-3"}
    assert found["snapshots"] == found["plain"]
    assert record.models["step-3"] == read_evaluation(tmp_path / "plain").models["pruned"]
    with pytest.raises(InputError, match=r"snapshots\.json: No such file"):
        read_snapshots(tmp_path / "plain")


def test_snapshots_are_found_by_their_steps(tmp_path):
    """In the order of the numbers; what is no step is left alone, and a model without snapshots has none."""
    for name in ("50", "100", ".tmp"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)

    assert list(find_snapshots(tmp_path)) == ["step-50", "step-100"]
    assert find_snapshots(tmp_path / "none") == {}


def test_the_worst_pictures_are_those_of_the_worst_pairs(evaluation, reference):
    """Over all sets, dense above and this model below, the worst first."""
    pruned = evaluation.models["pruned"]
    (row, column), *_ = pruned.pairs.worst(1)

    assert np.array_equal(pruned.worst[0, 0], reference.samples[row, column])
    assert images_to_ssim(pruned.worst[1], pruned.worst[0]).tolist() == sorted(pruned.pairs.ssim.ravel())[:8]


def test_fid_to_dense_is_recorded_with_its_interval_and_floor(evaluation, tmp_path):
    """A value a set, paired and unpaired; the dense model's paired one is 0, and its unpaired one is the floor."""
    write_report(evaluation, tmp_path)
    record = read_evaluation(tmp_path)
    dense, pruned = record.models["dense"], record.models["pruned"]
    flat = {name: json.loads((tmp_path / "metrics" / f"{name}.json").read_text()) for name in ("dense", "pruned")}

    assert (dense.fid_dense.sets, dense.fid_dense.half_width) == ([0.0, 0.0], 0.0)
    assert dense.fid_dense_unpaired.sets[0] == pytest.approx(dense.fid_dense_unpaired.sets[1])  # of the same two sets
    assert record.fid_dense_floor == dense.fid_dense_unpaired.mean > 0
    assert pruned.fid_dense.mean == pytest.approx(np.mean(pruned.fid_dense.sets))
    assert pruned.fid_dense.half_width > 0
    assert pruned.fid_dense.above_dense is None
    assert pruned.fid_dense_unpaired.half_width is None
    assert flat["pruned"]["fid_dense"] == pruned.fid_dense.mean
    assert flat["pruned"]["fid_dense_interval"] == pruned.fid_dense.half_width
    assert flat["dense"]["fid_dense_unpaired"] == record.fid_dense_floor


def test_one_set_has_fid_to_dense_and_no_floor(models, files, scheduler, real, protocol, extractor, tmp_path):
    """The record says so by null, and the flat file leaves it out."""
    folder, one = make_folder(tmp_path / "one"), protocol.model_copy(update={"sets": 1})
    make_reference(models["dense"], scheduler, real, one, extractor, folder)
    opened = OpenedReference(read_reference(folder), extractor, scheduler)
    found = evaluate(models, files, opened, make_folder(tmp_path / "scratch"))
    write_report(found, tmp_path)
    record = read_evaluation(tmp_path)
    flat = json.loads((tmp_path / "metrics" / "pruned.json").read_text())

    assert record.fid_dense_floor is None
    assert record.models["pruned"].fid_dense_unpaired is None
    assert record.models["pruned"].fid_dense.half_width is None
    assert flat["fid_dense"] == record.models["pruned"].fid_dense.mean > 0
    assert not {"fid_dense_interval", "fid_dense_unpaired"} & flat.keys()


def without_fid_dense(content, *names):
    """Remove the keys that records of earlier versions did not have, from all models or from those named."""
    for name in names or content["models"]:
        for key in ("fid_dense", "fid_dense_unpaired"):
            del content["models"][name][key]
    return content


def test_a_record_from_before_fid_to_dense_is_read(evaluation, tmp_path):
    """It has the other metrics, and nothing in place of the missing one."""
    content = summarise(evaluation).model_dump(mode="json")
    write_json(tmp_path / "evaluation.json", without_fid_dense(content))
    record = read_evaluation(tmp_path)

    assert record.fid_dense_floor is None
    assert set(record.models["pruned"].metrics()) == {"fid", "kid", "precision", "recall", "ssim", "mse"}


@pytest.mark.parametrize("damage", ["one model", "too few values"])
def test_a_record_with_half_of_fid_to_dense_is_refused(evaluation, tmp_path, damage):
    """All models have it or none, with one value a set."""
    content = summarise(evaluation).model_dump(mode="json")
    if damage == "one model":
        without_fid_dense(content, "dense")
    else:
        content["models"]["pruned"]["fid_dense_unpaired"]["sets"].pop()
    write_json(tmp_path / "evaluation.json", content)
    words = {"one model": "some models have fid_dense", "too few values": "one value for each of the 2 sets"}

    with pytest.raises(InputError, match=rf"evaluation\.json is damaged .*{words[damage]}"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {}}, "models has no dense"),
        ({"protocol_id": "0" * 12}, "protocol_id is 000000000000, but the protocol has the id"),
        ({"floor_fid": "a lot"}, "floor_fid: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(evaluation, tmp_path, change, words):
    """With the key that is wrong."""
    content = summarise(evaluation).model_dump(mode="json")
    write_json(tmp_path / "evaluation.json", {**content, **change})

    with pytest.raises(InputError, match=r"evaluation\.json is damaged") as caught:
        read_evaluation(tmp_path)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
