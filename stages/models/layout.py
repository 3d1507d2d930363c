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


def latest_model(model: Path, rounds: Path | None, count: int) -> Path:
    """Return the folder of the model that was pruned in several rounds, or the given one if there was one round.

    Args:
        model: The model that was pruned in one round.
        rounds: Output of the stage rounds, which holds a model if there were several.
        count: How many rounds there must have been.

    Raises:
        InputError: `rounds` is no folder, or holds no model though there must have been several rounds.
    """
    if rounds is not None and not rounds.is_dir():
        raise InputError(f"--rounds {rounds} is not a folder; give the one that the rounds stage writes")
    if rounds is not None and (rounds / "model_index.json").is_file():
        return rounds
    if count > 1:
        found = "no --rounds is given" if rounds is None else f"--rounds {rounds} holds no model"
        raise InputError(f"rounds.count is {count}, and {found}; give the folder that the rounds stage writes for it")
    return model
