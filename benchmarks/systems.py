"""The exact configs of the systems, with random weights -> time and memory of each stage on few steps and images."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from ruamel.yaml import YAML

from benchmarks.sizes import SYSTEMS, build
from flows.workspaces.overrides import apply
from stages.fetch.convert import LDM_NOISE
from stages.models.families import family_of
from stages.models.pipeline import write_pipeline
from stages.storage.files import read_json, write_json
from stages.storage.tensors import write_tensors

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "recipes" / "presets"
CLASSES = 10
"""Of the few that stand in for ImageNet's."""


def _layers(*channels: int) -> dict[str, Any]:
    """Config of an autoencoder's levels, which are two plain blocks each: their channels."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
    }


VQ_F4 = {
    **_layers(128, 256, 512),
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "scaling_factor": 1.0,
}
"""The autoencoder of LDM-4."""
KL_F8 = {
    **_layers(128, 256, 512, 512),
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
"""The autoencoder of DiT and of Stable Diffusion 1."""
AUTOENCODERS: dict[str, tuple[str, type[AutoencoderKL | VQModel], dict[str, Any]]] = {
    "imagenet-ldm": ("vqvae", VQModel, VQ_F4),
    "celebahq-ldm": ("vqvae", VQModel, VQ_F4),
    "imagenet-dit": ("vae", AutoencoderKL, KL_F8),
}
"""Config of a latent model -> the autoencoder's folder, class and config."""


@dataclass(frozen=True)
class System:
    """One system, and what its sizes must come to: parameters in millions, GMACs, as measured on the original."""

    config: str
    dense: tuple[float, float]
    pruned: tuple[float, float]
    size: int
    """Of the pictures in the folder that stands in for its data, which the preset then fits."""
    preset: str | None = None
    """The preset whose params it takes; None for that of its own name."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the preset's params."""


DENSE_LSUN, PRUNED_LSUN = (113.6732, 248.6884), (37.4555, 99.7469)
"""The latter is the largest uniform cut within 100.7 GMACs; the paper's has 46.5 M parameters there."""
SYSTEM_OF = {
    "cifar10": System("cifar10", (35.7463, 6.0641), (19.8512, 3.3919), 32),
    "celeba-hq-64": System("celeba-hq-64", (78.7008, 23.9216), (43.7350, 13.3211), 178),
    "lsun-church": System("lsun-256", DENSE_LSUN, PRUNED_LSUN, 300),
    "lsun-bedroom": System("lsun-256", DENSE_LSUN, PRUNED_LSUN, 300),
    "imagenet-ldm": System("imagenet-ldm", (400.9206, 99.86), (203.22, 55.2), 300),
    "celebahq-ldm": System(
        "celebahq-ldm", (274.0562, 96.0961), (139.8686, 49.0790), 300, "lsun-church", {"prune.target": {"ratio": 0.3}}
    ),
    "imagenet-dit": System("imagenet-dit", (749.8265, 114.4566), (526.7601, 57.3804), 300),
}
FEW: dict[str, Any] = {
    "reference.sampler.steps": 4,
    "reference.num_images": 4,
    "reference.batch_size": 4,
    "reference.extractor": {"name": "thumbnail"},
    "reference.kid_subsets": 2,
    "reference.kid_subset_size": 4,
    "reference.neighbours": 2,
    "importance.num_images": 1,
    "importance.stride": 500,
    "importance.report": None,
    "finetune.steps": 2,
    "finetune.batch_size": 2,
    "finetune.loss": {"noise": 0.0, "output": 1.0, "feature": 0.1},
    "finetune.heldout_images": 2,
    "finetune.heldout_every": 2,
    "finetune.checkpoint_every": 2,
    "finetune.keep_checkpoints": 1,
    "finetune.samples": None,
    "finetune.engine.accumulate": 2,
    "costs": {"batches": [1], "precisions": ["float32"], "repeats": 6, "seconds": 30.0},
}


@dataclass
class Run:
    """What a preset took."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, command: str, folder: Path) -> None:
        """Run one command of a stage to its end.

        Raises:
            SystemExit: It failed.
        """
        begin = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(shlex.split(command), cwd=folder, env=environment)  # noqa: S603  # from dvc.yaml
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)  # else it passes for one that still runs
        if status:
            sys.exit(f"{name} failed with exit code {child.returncode}: {command}")
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - begin
        self.peak_gib[name] = max(self.peak_gib.get(name, 0), usage.ru_maxrss / 2**20)


def make_model(system: System, folder: Path) -> None:
    """Write a model of random weights in the layout of the Hub."""
    unet = build(SYSTEMS / f"{system.config}.json")
    is_ldm = system.config == "imagenet-ldm"
    write_pipeline(folder, unet, DDPMScheduler.from_config(LDM_NOISE) if is_ldm else DDPMScheduler())
    if system.config in AUTOENCODERS:
        name, network, config = AUTOENCODERS[system.config]
        network(**config).save_pretrained(folder / name)
        index = read_json(folder / "model_index.json")
        pipeline = family_of(unet).pipelines[True]
        added = {"_class_name": pipeline, name: ["diffusers", network.__name__]}
        write_json(folder / "model_index.json", {**index, **added})
    if is_ldm:
        make_class_embedding(int(unet.config["cross_attention_dim"]), folder / "class_embedding")
    elif system.config == "imagenet-dit":  # it embeds all classes itself, of which the data have the first
        labels = {"num_classes": CLASSES, "unconditional": unet.config["num_embeds_ada_norm"]}
        write_json(folder / "class_embedding" / "config.json", labels)


def make_class_embedding(width: int, folder: Path) -> None:
    """Write random vectors of the classes and of no class."""
    write_json(folder / "config.json", {"num_classes": CLASSES, "width": width, "unconditional": CLASSES})
    table = torch.randn(CLASSES + 1, width, generator=torch.Generator().manual_seed(0))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", {"weight": table})


def make_data(system: System, folder: Path, count: int = 20) -> None:
    """Write pictures of noise as JPEG, in folders of classes; those for CelebA are of its own size."""
    draws = np.random.default_rng(0)
    height = 218 if system.config == "celeba-hq-64" else system.size
    for index in range(count):
        class_folder = folder / f"class{index % CLASSES}"
        class_folder.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (height, system.size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(class_folder / f"{index}.jpg")


def make_params(name: str, folder: Path) -> None:
    """Write params.yaml: the preset, but from local folders, and with few of everything."""
    system = SYSTEM_OF[name]
    preset_file = PRESETS / f"{system.preset or name}.yaml"
    preset = YAML(typ="safe").load(preset_file.read_text())
    data = {key: value for key, value in preset["fetch"]["data"].items() if key in ("fit", "resample", "labels")}
    data = data if preset["fetch"]["data"]["source"] == "folder" else {}
    local = {
        "fetch.model": {"source": "folder", "path": str(folder / "model")},
        "fetch.data": {"source": "folder", "path": str(folder / "pictures"), **data},
        "fetch.heldout": 0.2,
    }
    (folder / "params.yaml").write_bytes(apply({**FEW, **system.changes, **local}, preset_file))


def run_stages(folder: Path) -> Run:
    """Take what lies in a folder through every stage of dvc.yaml."""
    run = Run()
    for stage, entry in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].items():
        commands = entry["cmd"] if isinstance(entry["cmd"], list) else [entry["cmd"]]
        run.stage(stage, commands[0].replace("python", sys.executable, 1), folder)
    return run


def make_inputs(name: str, folder: Path) -> None:
    """Write model, pictures and params of a system."""
    make_model(SYSTEM_OF[name], folder / "model")
    make_data(SYSTEM_OF[name], folder / "pictures")
    make_params(name, folder)


def plan_stages(folder: Path) -> dict[str, float]:
    """Ask `espalier plan` what the stages in a folder would take: name -> seconds.

    Raises:
        SystemExit: It would refuse something.
    """
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    command = [sys.executable, "-m", "flows", "plan", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=False)  # noqa: S603
    if result.returncode:
        sys.exit(f"the plan of {folder} failed: {result.stdout.decode()}")
    return {stage["name"]: stage["seconds"] for stage in json.loads(result.stdout)["stages"]}


def measure(name: str, folder: Path, forecast: dict[str, float] | None = None) -> str:
    """Take one system through the stages, check its sizes and give its row of the table."""
    system = SYSTEM_OF[name]
    run = run_stages(folder)
    models = read_json(folder / "reports" / "evaluate" / "evaluation.json")["models"]
    sizes = {key: (models[key]["params"] / 1e6, models[key]["macs"] / 1e9) for key in ("dense", "finetuned")}
    for key, expected in (("dense", system.dense), ("finetuned", system.pruned)):
        wrong = [(a, b) for a, b in zip(sizes[key], expected, strict=True) if not np.isclose(a, b, rtol=1.5e-3)]
        if wrong:
            sys.exit(f"{name}: {key} has {wrong[0][0]:.4f}, expected {wrong[0][1]}")
    cells = [f"{params:.4f} M / {macs:.4f} G" for params, macs in sizes.values()]
    planned = {stage: f"{seconds:.0f} / " for stage, seconds in (forecast or {}).items()}
    cells += [
        f"{planned.get(stage, '')}{seconds:.0f} s, {run.peak_gib[stage]:.1f} GiB"
        for stage, seconds in run.seconds.items()
    ]
    return f"| {name} | {' | '.join(cells)} |"


@click.command()
@click.option("--system", "names", multiple=True, type=click.Choice(list(SYSTEM_OF)), default=list(SYSTEM_OF))
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for what the stages write, which stays.")
@click.option("--plan/--no-plan", "to_plan", default=False, help="Print the time that plan forecasts, too.")
def main(names: tuple[str, ...], keep: Path | None, *, to_plan: bool) -> None:
    """Run the systems and print time and peak memory of each stage, on this machine."""
    stages = list(YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"])
    rows = [f"| system | dense | pruned | {' | '.join(stages)} |", f"|{' --- |' * (3 + len(stages))}"]
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / name
            if folder.exists():
                raise click.UsageError(f"{folder} is there; remove it or choose another --keep")
            folder.mkdir(parents=True)
            make_inputs(name, folder.resolve())
            forecast = plan_stages(folder.resolve()) if to_plan else None
            rows.append(measure(name, folder.resolve(), forecast))
            click.echo(rows[-1], err=True)
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
