"""espalier init: a model and images of one's own -> a short params.yaml that the stages accept."""

import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML

from flows.initialise import init
from stages.finetune.params import MuonParams
from stages.models.pipeline import write_pipeline
from stages.params import load_params
from stages.prune.params import CompensateParams
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError, UnavailableError
from stages.tools.initialise import sources
from stages.tools.initialise.sources import data_source, model_sources
from stages.tools.params_yaml import write_value
from tests.hub import Repository, hub

__all__ = ["hub"]


@pytest.fixture
def own(tmp_path, make_unet, scheduler, monkeypatch):
    """A folder with a small random UNet and twenty PNGs, half of them of another size."""
    write_pipeline(tmp_path / "model", make_unet(sample_size=16), scheduler)
    (tmp_path / "images").mkdir()
    for index in range(20):
        side = 16 if index % 2 else 20
        Image.fromarray(np.full((side, side), index, np.uint8)).save(tmp_path / f"images/{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.tools.planning.probe.SECONDS", 0.02)
    return tmp_path


def run(*arguments):
    """Call the command with the model and images of one's own."""
    return CliRunner().invoke(init, ["--model", "model", "--data", "images", *arguments])


def test_a_model_of_ones_own_gets_a_short_file_that_is_valid(own):
    """It says what the model is, chooses a crop for images of other sizes, and names whole paths for workspaces."""
    result = run("--steps", "40", "--macs", "60%", "--stride", "50")
    text = (own / "params.yaml").read_text()
    params = load_params(own / "params.yaml")

    assert result.exit_code == 0, result.output
    assert len(text.splitlines()) <= 25
    assert params.fetch.model.path == own / "model"
    assert params.fetch.data.fit == "crop"
    assert params.finetune.steps == 40
    assert params.finetune.batch_size <= 18
    assert "UNet2DModel, unconditional, 1×16×16 pixels" in result.output
    assert "1000 timesteps, predicts epsilon" in result.output
    assert "data    20 images, 18 for training, 2 held out, cropped" in result.output
    assert YAML(typ="safe").load(text)["prune"]["target"] == {"macs": "60%"}
    assert params.importance.stride == 50
    assert run().exit_code == 1  # it is there now
    assert (own / "params.yaml").read_text() == text


@pytest.mark.parametrize(
    ("steps", "batch", "compensate", "muon"),
    [
        (10_000, 16, CompensateParams(), MuonParams(learning_rate=4e-4)),
        (1, 16, None, MuonParams(learning_rate=4e-4)),
        (10_000, 1, CompensateParams(), None),
    ],
)
def test_our_recovery_is_chosen_where_it_takes_little_beside_the_steps(own, steps, batch, compensate, muon):
    """Compensation beside all of the steps, and Muon's products beside those of the batch."""
    run("--steps", str(steps), "--batch-size", str(batch), "--stride", "100")
    params = load_params(own / "params.yaml")

    assert params.prune.compensate == compensate
    assert params.finetune.muon == muon


def test_a_file_that_is_there_stays_unless_forced(own):
    """Nobody's choices are lost; with --force the command goes on, here to a model that is missing."""
    (own / "params.yaml").write_text("mine")
    result = run()
    assert result.exit_code == 1
    assert "give --force to overwrite it, or another --out" in result.output
    assert "nowhere is no file or folder here" in run("--force", "--model", "nowhere").output
    assert (own / "params.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nowhere"], "--model nowhere is no file or folder here; give a diffusers folder"),
        (["--data", "images/0.png"], "is no .npz file of arrays"),
        (["--heldout", "0.9", "--batch-size", "16"], "finetune.batch_size 16 is more than the 2 training images"),
        (
            ["--model", "~nobody-of-this-name/m"],
            "--model is ~nobody-of-this-name/m, and this home folder does not exist",
        ),
        (["--data", "~nobody-of-this-name/i"], "--data is ~nobody-of-this-name/i, and this home folder does not exist"),
        (["--out", "images", "--force"], "--out images is a folder; give the name of a file in it"),
        (["--out", "nowhere/params.yaml"], "the folder nowhere does not exist; create it, or give another --out"),
        (["--macs", "50%", "--ratio", "0.5"], "give one of --ratio, --macs and --params"),
        (
            ["--extractor", "incepton", "--sampler-steps", "1001"],
            "reference.extractor.name is 'incepton'; allowed: dig",
        ),
        (["--params", "200%"], "is out of reach: possible from"),
        (["--system", "cifar10"], "--system is for a checkpoint file"),
        (["--model", "s3://mine/model"], "--model s3://mine/model: a bucket needs its sha256; write the block by hand"),
    ],
)
def test_what_a_stage_would_refuse_is_refused_and_nothing_is_written(own, arguments, expected):
    """One line that names the option or the key."""
    result = run(*arguments)

    assert result.exit_code == 1
    assert expected in result.output
    assert not (own / "params.yaml").exists()


def test_a_share_is_a_finite_number(own):
    """Click alone takes nan, which no bound excludes."""
    result = run("--heldout", "nan")

    assert result.exit_code == 2
    assert "nan is not a finite number" in result.output
    assert not (own / "params.yaml").exists()


def test_each_kind_of_source_is_known_by_how_it_is_written(tmp_path):
    """A commit needs no network; a checkpoint may be any of the known architectures."""
    commit = "0" * 40
    (tmp_path / "a.ckpt").touch()
    np.savez(tmp_path / "a.npz", labels=np.zeros(3, np.int64), pictures=np.zeros((3, 8, 8), np.uint8))

    assert model_sources(f"google/ddpm-cifar10-32@{commit}")[0].revision == commit
    assert model_sources("models:/digits/3")[0].source == "registry"
    assert model_sources("bundled:digits")[0].name == "digits"
    assert {source.system for source in model_sources(str(tmp_path / "a.ckpt"))} >= {"cifar10", "imagenet-ldm"}
    assert data_source(str(tmp_path / "a.npz")).images == "pictures"
    assert data_source(f"uoft-cs/cifar10@{commit}", "image").column == "image"
    with zipfile.ZipFile(tmp_path / "bad.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00\x76\x00" + b"{" * 118)
    with pytest.raises(InputError, match=r"bad\.npz is no \.npz file of arrays"):
        data_source(str(tmp_path / "bad.npz"))
    for text in (str(tmp_path), str(tmp_path / "a.npz"), "bundled:digits"):
        with pytest.raises(InputError, match=r"--column names a column of a dataset on the Hub, and .* is none"):
            data_source(text, "image")


def test_a_branch_of_the_hub_becomes_its_commit(hub, tmp_path, monkeypatch):
    """By the Hub; by its cache where it does not answer. What neither has is refused, or an outage."""
    monkeypatch.setattr(sources, "HF_HUB_CACHE", str(tmp_path))
    hub.repositories["me/model"] = Repository(private=False, history=[("1" * 40, {})])
    assert model_sources("me/model")[0].revision == "1" * 40
    for text in ("me/nothing", "me/model@v2"):
        with pytest.raises(
            InputError, match=f"^{text.partition('@')[0]} is no file or folder here, and the Hub says: "
        ):
            model_sources(text)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match=r"the Hub does not answer .*or give the commit: me/model@COMMIT$"):
        model_sources("me/model")
    (tmp_path / "models--me--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--model" / "refs" / "main").write_text("2" * 40)
    assert model_sources("me/model")[0].revision == "2" * 40


@pytest.mark.parametrize("text", ["/data/📷 of me", "a\n\tb", "Ä: ö", "0x1", "ü"])
def test_a_text_is_read_back_as_it_was(text):
    """Whatever folder it names."""
    assert parse_yaml(write_value(text), "a value") == text
