"""The folder of a model, or the address of a registered version -> a folder, and how to draw with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.models.layout import AUTOENCODERS, CLASS_EMBEDDING, WEIGHTS, denoiser_name
from stages.models.params import PrecisionName, SamplerParams
from stages.protocol.params import ReferenceParams
from stages.runtime.errors import InputError
from stages.runtime.schema import load_block
from stages.storage.files import file_sha256

VERSION = "models:/"
BATCH_SIZE = 64
"""Images per batch of a version, whose protocol does not name it."""
GRAPH = "model.onnx"
WEIGHT_FILES = (WEIGHTS, "integers.safetensors", "float8.safetensors", GRAPH)
"""Weights or graph of a model or variant, as `stages.models.variants.folder` writes them, which imports diffusers."""
FILES = ("config.json", "scheduler_config.json", "variant.json", *WEIGHT_FILES)
"""Files of a component that decide what is drawn."""


@dataclass(frozen=True)
class Settings:
    """How images are drawn."""

    sampler: SamplerParams
    guidance: float | None
    precision: PrecisionName
    batch_size: int

    def changed(self, steps: int | None, batch_size: int | None) -> "Settings":
        """Return the settings with another number of steps or batch size; None keeps one."""
        sampler = self.sampler if steps is None else self.sampler.model_copy(update={"steps": steps})
        return Settings(sampler, self.guidance, self.precision, batch_size or self.batch_size)


@dataclass(frozen=True)
class Source:
    """A model to draw with."""

    name: str
    """Address of the version, or name of the folder."""
    folder: Path
    settings: Settings

    def hashes(self) -> dict[str, str]:
        """Hash the files that decide what is drawn: path in the folder -> SHA-256.

        Raises:
            InputError: The folder holds no weights.
        """
        parts = (denoiser_name(self.folder), "scheduler", CLASS_EMBEDDING, *AUTOENCODERS, ".")
        paths = [path for part in parts for name in FILES if (path := self.folder / part / name).is_file()]
        if not any(path.name in WEIGHT_FILES for path in paths):
            found = f"{self.folder} holds no {WEIGHTS}" if self.folder.is_dir() else f"{self.folder} is no folder"
            raise InputError(
                f"--model {found}; give the folder of a pipeline, or a version such as models:/NAME@champion"
            )
        return {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in paths}


@contextmanager
def opened(model: str, params_path: Path | None) -> Iterator[Source]:
    """Yield a model; a version lies in a temporary folder while the block lasts.

    Args:
        model: A folder, or models:/NAME/3 or models:/NAME@champion.
        params_path: The params file whose block reference applies; None takes params.yaml for a folder, and for a
            version the protocol under which it was measured.

    Raises:
        InputError: The params are wrong, or there is no such version, or its files were changed.
        UnavailableError: The registry does not answer.
    """
    if not model.startswith(VERSION):
        folder = Path(model)
        yield Source(folder.resolve().name, folder, _of_params(params_path or Path("params.yaml")))
        return
    from stages.register import versions  # noqa: PLC0415  # imports diffusers, which a folder does not need here

    settings = _of_params(params_path) if params_path else None
    with versions.downloaded(model) as (name, files):
        if settings is None:
            protocol = versions.measured_under(files)
            settings = Settings(protocol.sampler, protocol.guidance, protocol.precision, BATCH_SIZE)
        yield Source(name, versions.model_folder(files), settings)


def _of_params(path: Path) -> Settings:
    params = load_block(path, "reference", ReferenceParams)
    return Settings(params.sampler, params.guidance, params.precision, params.batch_size)
