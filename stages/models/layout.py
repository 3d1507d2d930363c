"""Names of the files and components of a model folder, and the choice between two folders."""

from pathlib import Path

from stages.runtime.errors import InputError

PLAN = "pruning_plan.json"
SNAPSHOTS = "snapshots"
"""Folder of a finetuned model with its snapshots, a model folder each, named by the step."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
DENOISERS = ("unet", "transformer")
"""Component names that diffusers pipelines use for the model that is pruned."""
CODE, DESCRIPTION = "denoiser.py", "denoiser.json"
"""Files of a model whose class diffusers does not have: the class, and what it takes and returns."""
CLASS_EMBEDDING = "class_embedding"
"""Component of a class-conditional pipeline: config.json {num_classes, width, unconditional} and the table `weight`;
config.json {num_classes, unconditional} alone beside a model that embeds its classes itself."""
AUTOENCODERS = ("vqvae", "vae")
"""Component names that diffusers pipelines use for an autoencoder."""


def denoiser_name(folder: Path) -> str:
    """Return the name of the component that is pruned: that of which the pipeline folder has a subfolder."""
    return next((name for name in DENOISERS if (folder / name).is_dir()), DENOISERS[0])


def is_pixel_dit(folder: Path) -> bool:
    """Whether a pipeline folder holds a DiT in pixel space, with which no pipeline of diffusers draws."""
    return denoiser_name(folder) == "transformer" and not (folder / "vae").is_dir()


def latest_model(model: Path, rounds: Path | None) -> Path:
    """Return the folder of the model that was pruned in several rounds, or the given one if there was one round.

    Raises:
        InputError: `rounds` is no folder.
    """
    if rounds is None:
        return model
    if not rounds.is_dir():
        raise InputError(f"--rounds {rounds} is not a folder; give the one that the rounds stage writes")
    return rounds if (rounds / "model_index.json").is_file() else model
