"""Each reader of a file from outside, with a valid file of its kind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from ruamel.yaml import YAML

from flows.workspaces.overrides import parse_overrides
from stages.data.images import read_images, write_images
from stages.fetch.listing import Listing
from stages.fetch.model import fetch_model
from stages.fetch.params import FitParams, FolderModel, NpzData
from stages.fetch.pickles import BIN
from stages.fetch.source_images import CorruptImageError, open_folder, open_npz, read_image
from stages.fetch.weights import read_weights
from stages.finetune.checkpoint import Checkpoint, Checkpoints
from stages.finetune.curve import CurvePoint
from stages.models.autoencoder import read_autoencoder
from stages.models.layout import WEIGHTS
from stages.models.pipeline import CPU, read_scheduler, read_unet, write_pipeline
from stages.models.plan import Base, Budget, Plan, PlannedGroup, read_plan
from stages.models.saliency import Importance, read_importance, write_importance
from stages.params import load_params
from stages.protocol.costs import read_costs
from stages.protocol.evaluation import FID_DENSE, FID_DENSE_UNPAIRED, read_evaluation
from stages.protocol.reference import Reference, read_reference
from stages.register.lineage import read_lineage
from stages.register.policy import load_policy
from stages.report.report_data import _read_licence
from stages.runtime.errors import InputError
from stages.storage.files import read_json, read_record, write_json
from stages.storage.manifest import parse_manifest
from stages.storage.run_record import read_run_record
from stages.storage.tensors import read_metadata, read_shapes, read_tensors, write_tensors
from stages.tracking.runs import RunRecord
from tests.records import make_costs, make_evaluation, make_model
from tests.references import write_reference

ROOT = Path(__file__).parents[2]
RUN = "f" * 64
CARD = "---\nlicense: mit\ntags:\n- a\nmodel-index:\n- name: x\n  results: []\n---\n\n# A model\n"


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    file: str
    """The file that is damaged, relative to the folder."""
    read: Callable[[Path], object]
    """Reads the folder."""
    is_tree: bool = True
    """Whether it is JSON or YAML, whose values are replaced as well."""
    cost: int = 1
    """How much longer than others it takes."""


def read_npz(folder):
    """Open the images of an .npz file, and read the first."""
    images = open_npz(NpzData(source="npz", path=folder / "images.npz", labels="labels"), folder)
    _read_first(images)


def read_picture(folder):
    """Read an image."""
    _read_first(open_folder(folder, "images", Listing(["image.png"], {})))


def _read_first(images):
    try:
        read_image(images, 0, (3, 8, 8), FitParams(fit="crop"))
    except CorruptImageError as error:
        raise InputError(str(error)) from None


def read_content_of_manifest(folder):
    """Parse a manifest; its reader makes an InputError of a ValueError."""
    try:
        parse_manifest((folder / "manifest.json").read_bytes())
    except ValueError as error:
        raise InputError(str(error)) from None


def read_safetensors(folder):
    """Read tensors, shapes and metadata."""
    for read in (read_tensors, read_shapes, read_metadata):
        read(folder / "model.safetensors")


def read_override(folder):
    """Read the file as the value of an option."""
    parse_overrides([f"prune.target={(folder / 'value.yaml').read_bytes().decode(errors='surrogateescape')}"])


def fetch(folder):
    """Fetch the model, which loads, runs, cuts and writes it."""
    fetch_model(FolderModel(source="folder", path=folder / "model"), folder / "out")


def read_index(folder):
    """Copy the components of a pipeline."""
    write_pipeline(folder / "out", read_unet(folder / "model"), read_scheduler(folder / "model"), folder / "model")


READERS = {
    "safetensors": Reader("model.safetensors", read_safetensors, is_tree=False),
    "weights": Reader(f"model/unet/{WEIGHTS}", lambda it: read_unet(it / "model"), is_tree=False, cost=3),
    "bin": Reader(BIN, lambda it: read_weights(it / BIN), is_tree=False),
    "shards": Reader("shards/index.json", lambda it: read_weights(it / "shards" / "index.json")),
    "npz": Reader("images.npz", read_npz, is_tree=False),
    "npy": Reader("data/train.npy", lambda it: read_images(it / "data"), is_tree=False),
    "image": Reader("image.png", read_picture, is_tree=False),
    "plan": Reader("plan.json", lambda it: read_plan(it / "plan.json")),
    "run.json": Reader("run/run.json", lambda it: read_run_record(it / "run")),
    "dataset.json": Reader("data/dataset.json", lambda it: read_json(it / "data" / "dataset.json")),
    "evaluation.json": Reader("evaluation/evaluation.json", lambda it: read_evaluation(it / "evaluation")),
    "costs.json": Reader("costs/costs.json", lambda it: read_costs(it / "costs")),
    "protocol.json": Reader("reference/protocol.json", lambda it: read_reference(it / "reference")),
    "samples": Reader("reference/samples.npy", lambda it: read_reference(it / "reference"), is_tree=False),
    "importance.json": Reader("importance/importance.json", lambda it: read_importance(it / "importance")),
    "manifest": Reader("manifest.json", read_content_of_manifest),
    "lineage": Reader("lineage.json", read_lineage),
    "record": Reader("record.json", lambda it: read_record(it / "record.json", RunRecord, "remove it")),
    "params": Reader("params.yaml", lambda it: load_params(it / "params.yaml"), cost=3),
    "policy": Reader("policy.yaml", lambda it: load_policy(it / "policy.yaml")),
    "option": Reader("value.yaml", read_override),
    "card": Reader("README.md", lambda it: _read_licence(it / "README.md"), is_tree=False),
    "model_index": Reader("model/model_index.json", read_index, cost=3),
    "unet": Reader("model/unet/config.json", fetch, cost=20),
    "scheduler": Reader("model/scheduler/scheduler_config.json", lambda it: read_scheduler(it / "model")),
    "autoencoder": Reader("vae/config.json", lambda it: read_autoencoder(it, CPU), cost=2),
    "checkpoint": Reader("checkpoints", lambda it: Checkpoints(it / "checkpoints", RUN).newest()),
}
"""Kind -> its file and reader; `checkpoint` is a tree in the metadata of a safetensors file."""


def write_valid_files(folder, unet, scheduler, images, protocol):
    """Write one valid file of each kind."""
    write_models(folder, unet, scheduler)
    write_arrays(folder, images, protocol)
    model = make_model(dict.fromkeys((FID_DENSE, FID_DENSE_UNPAIRED), make_model().fid))
    evaluation = make_evaluation(protocol.model_copy(update={"sets": 3}), {"dense": model})
    write_json(folder / "evaluation" / "evaluation.json", evaluation.model_dump(mode="json"))
    write_json(folder / "costs" / "costs.json", make_costs(evaluation).model_dump(mode="json"))
    write_json(
        folder / "run" / "run.json", {"stage": "fetch", "params": {"fetch": {"a": 1}}, "packages": {"torch": "2"}}
    )
    write_json(folder / "plan.json", make_plan().to_json())
    entry = {"path": "unet/a", "sha256": "a" * 64, "size_bytes": 1}
    write_json(folder / "manifest.json", {"version": 1, "files": [entry, {**entry, "path": "b"}]})
    write_json(folder / "lineage.json", make_lineage())
    record = RunRecord(compression=RUN, run_name="x", finished_ms=1, params={"a": "b"}, tags={}, values=[("a", 0, 1.0)])
    write_json(folder / "record.json", record.model_dump(mode="json"))
    (folder / "README.md").write_text(CARD)
    for name, source in (("params.yaml", "params.yaml"), ("policy.yaml", "mlflow/promotion.yaml")):
        write_json(folder / name, YAML(typ="safe").load((ROOT / source).read_text()))
    write_json(folder / "value.yaml", {"ratio": 0.3, "list": [1, "a"]})


def write_models(folder, unet, scheduler):
    """Write models, weights in each layout, and a checkpoint."""
    write_pipeline(folder / "model", unet, scheduler)
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    write_tensors(folder / "model.safetensors", tensors, {"key": "value"})
    torch.save(tensors, folder / BIN)
    write_tensors(folder / "shards" / "one.safetensors", tensors)
    write_json(folder / "shards" / "index.json", {"weight_map": dict.fromkeys(tensors, "one.safetensors")})
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    point = CurvePoint(0, None, ((0.9, 0.5),))
    Checkpoints(folder / "checkpoints", RUN).save(Checkpoint(2, tensors, [0.1], [point]))


def write_arrays(folder, images, protocol):
    """Write images in each form, and the outputs of reference and importance."""
    write_images(folder / "data", images, {"sha256": "d" * 64, "source": {"source": "bundled"}})
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.savez_compressed(folder / "images.npz", arr_0=pixels, labels=np.arange(4))
    Image.fromarray(pixels[0]).save(folder / "image.png")
    sets = (protocol.sets, protocol.num_images)
    samples = np.zeros((*sets, 1, 8, 8), np.uint8)
    features = torch.zeros(*sets, 64), torch.zeros(protocol.num_real_images, 64)
    write_reference(folder / "reference", Reference(protocol, "a" * 64, samples, *features))
    importance = Importance(
        criterion="magnitude",
        formula="paper",
        model_sha256="a" * 64,
        counts_doubled=False,
        timesteps=[0, 5],
        losses=[[0.5, 0.25]],
        precision="float32",
        saliency={"conv": torch.ones(2, 3)},
    )
    write_importance(folder / "importance", importance)


def make_plan():
    """Make a sealed plan of one group."""
    budget = Budget(quantity="macs", asked=1, found=1, smallest=0.5, dense=2)
    group = PlannedGroup(root="conv_in", width=4, blocks=1, cut=[0])
    base = Base(family="UNet2DModel", architecture_sha256="a" * 64, weights_sha256="b" * 64)
    given = {"criterion": "magnitude", "formula": "paper", "seed": 0, "prune": {"round_to": 1}}
    return Plan(base=base, budget=budget, groups=[group], layers={"a": {"outputs": [1]}}, heads={}, **given).sealed()


def make_lineage():
    """Make the lineage of a version."""
    files = ("params.yaml", "dvc.lock", "dvc.yaml", "requirements.lock")
    return {
        "git_commit": "c" * 40,
        "git_remote": None,
        "files": dict.fromkeys(files, "a" * 64),
        "data_sha256": "d" * 64,
        "outputs": {"artifacts/a": "a" * 64},
        "runs": {"fetch": {"stage": "fetch", "params": {}}},
        "dvc_remotes": [],
    }


def damage_metadata(folder, content):
    """Replace the metadata of the checkpoint."""
    (path,) = folder.glob("checkpoints/*/*.safetensors")
    write_tensors(path, {"a": torch.ones(2)}, {"checkpoint": content.decode()})


def read_metadata_tree(folder):
    """Read the metadata of the checkpoint."""
    (path,) = folder.glob("checkpoints/*/*.safetensors")
    return json.loads(read_metadata(path)["checkpoint"])
