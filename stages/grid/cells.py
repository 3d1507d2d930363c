"""Models, settings and a reference -> the measurements of each cell of the grid, of which finished ones are kept."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluate.consistency import images_to_ssim
from stages.evaluate.opened import OpenedReference
from stages.evaluate.quality import Quality, QualityMetrics, features_to_statistics, frechet_distance
from stages.models.families import Denoiser
from stages.models.sampling import SamplingContext
from stages.protocol.evaluation import DENSE, FID_DENSE
from stages.protocol.grid import SSIM, SSIM_PROTOCOL
from stages.protocol.protocol import Protocol
from stages.protocol.reference import draw_set
from stages.runtime.code_hash import hash_files, import_closure, stage_files
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record, write_json, writing
from stages.storage.provenance import PACKAGES, write_run_record
from stages.storage.rows import RowFile, array_file

CELL, SAMPLES, FEATURES = "cell.json", "samples.npy", "features.npy"
SHORT = 16
"""Digits of a cell's key in the name of its folder."""
Images = NDArray[np.uint8]


class CellValues(Frozen):
    """cell.json: what was measured on the images of one cell."""

    key: Sha256
    sets: dict[str, list[float]]
    """Metric -> value of each set."""


@dataclass(frozen=True)
class Drawn:
    """The images of a dense model at one setting."""

    samples: Images
    """[sets, N, C, H, W]."""
    features: torch.Tensor
    """[sets, N, D] float32."""


@dataclass(frozen=True)
class GridContext:
    """What all cells share."""

    models: Mapping[str, Denoiser]
    """By name, the dense one first."""
    weights: Mapping[str, str]
    """Model -> hash of its weights."""
    denoisers: Mapping[str, str]
    """Model -> hash of all files of its denoiser: weights, config, and code of an own class."""
    opened: OpenedReference
    """Of the protocol's own setting."""
    metrics: QualityMetrics
    store: Path
    """Folder of the finished cells."""

    def key(self, name: str, protocol: Protocol) -> str:
        """Hash all that decides a cell: code, packages, protocols, model, and dense model with its autoencoder."""
        parts = {
            "code": hash_measuring_code(),
            "packages": {package: version(package) for package in PACKAGES},
            "protocols": [protocol.model_dump(mode="json"), self.opened.reference.protocol.id],
            "models": [self.denoisers[name], self.denoisers[DENSE], self.opened.reference.model_sha256],
            "is_dense": name == DENSE,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def folder(self, name: str, protocol: Protocol) -> Path:
        """Return the folder of a cell."""
        return self.store / self.key(name, protocol)[:SHORT]

    def is_finished(self, name: str, protocol: Protocol) -> bool:
        """Whether a cell has been measured."""
        return (self.folder(name, protocol) / CELL).is_file()

    def is_own(self, protocol: Protocol) -> bool:
        """Whether a setting is the protocol's own, at which the reference holds the dense model's images."""
        own = self.opened.reference.protocol
        names = ("sampler", "guidance", "schedule_sha256")
        return all(getattr(protocol, name) == getattr(own, name) for name in names)

    def own(self, protocol: Protocol) -> Drawn:
        """Return the dense model's images under the protocol of the reference, as many as a setting has."""
        sets, images = slice(protocol.sets), slice(protocol.num_images)
        return Drawn(self.opened.reference.samples[sets, images], self.opened.reference.features[sets, images])


@cache
def hash_measuring_code() -> str:
    """Hash the code that decides what a cell holds: the imports of this module, and not of those that show it."""
    closure = {module.replace(".", "/") for module in import_closure(__name__)}
    return hash_files({path: sha256 for path, sha256 in stage_files("grid").items() if _is_of(path, closure)})


def _is_of(path: str, closure: Collection[str]) -> bool:
    """Whether a file below stages/ is a module of a closure, or data of one of its packages."""
    module = f"stages/{path.removesuffix('.py').removesuffix('/__init__')}"
    return (module if path.endswith(".py") else module.rpartition("/")[0]) in closure


def measure_cell(grid: GridContext, name: str, protocol: Protocol, label: str) -> dict[str, list[float]]:
    """Measure one cell, or read what an earlier call has measured; that of the dense model comes before the others.

    Returns:
        Metric -> value of each set.

    Raises:
        InputError: Images are not finite, the disk is full, or a finished cell is damaged.
    """
    folder, key = grid.folder(name, protocol), grid.key(name, protocol)
    if not (folder / CELL).is_file():
        dense = None if name == DENSE else read_dense(grid, protocol)
        with writing(folder) as made:
            sets = _draw_and_measure(grid, name, protocol, dense, made, label)
            write_json(made / CELL, CellValues(key=key, sets=sets).model_dump(mode="json"))
            write_run_record(made, "grid")
    return read_record(folder / CELL, CellValues, f"remove {folder}").sets


def read_dense(grid: GridContext, protocol: Protocol) -> Drawn:
    """Read the images of the dense model's finished cell, memory-mapped."""
    if grid.is_own(protocol):
        return grid.own(protocol)
    samples, features = _files(grid, protocol, grid.folder(DENSE, protocol))
    return Drawn(samples.read(), torch.from_numpy(np.array(features.read())))


def _files(grid: GridContext, protocol: Protocol, folder: Path) -> tuple[RowFile, RowFile]:
    """Describe the files of the images and features of a cell."""
    shape, width = grid.opened.reference.samples.shape[2:], grid.opened.reference.features.shape[-1]
    sets = (protocol.sets, protocol.num_images)
    return (
        array_file(folder / SAMPLES, np.uint8, (*sets, *shape)),
        array_file(folder / FEATURES, np.float32, (*sets, width)),
    )


def _draw_and_measure(
    grid: GridContext, name: str, protocol: Protocol, dense: Drawn | None, folder: Path, label: str
) -> dict[str, list[float]]:
    """Draw a cell and measure it; of the dense model, without `dense`, the images stay in the folder."""
    if name == DENSE and grid.is_own(protocol):
        drawn = grid.own(protocol)
    else:
        drawn = _draw(grid, name, protocol, folder, label)
    own = grid.own(protocol).samples
    others = {SSIM_PROTOCOL: own} if dense is None else {SSIM_PROTOCOL: own, SSIM: dense.samples}
    found: dict[str, list[float]] = {field.name: [] for field in fields(Quality)}
    found |= {metric: [] for metric in others}
    for index, features in enumerate(drawn.features):
        statistics = features_to_statistics(features)
        for metric, value in zip(fields(Quality), astuple(grid.metrics(features, index, statistics)), strict=True):
            found[metric.name].append(float(value))
        for compared, images in others.items():
            found[compared].append(float(images_to_ssim(drawn.samples[index], images[index]).mean()))
        if dense is not None:
            distance = frechet_distance(statistics, features_to_statistics(dense.features[index]))
            found.setdefault(FID_DENSE, []).append(distance)
    if name != DENSE:
        (folder / SAMPLES).unlink()
        (folder / FEATURES).unlink()
    return found


def _draw(grid: GridContext, name: str, protocol: Protocol, folder: Path, label: str) -> Drawn:
    """Draw all sets of a cell into files of a folder."""
    samples, features = _files(grid, protocol, folder)
    for file in (samples, features):
        file.create()
    context = SamplingContext(grid.opened.autoencoder, grid.opened.reference.table, protocol.guidance)
    size = grid.opened.extractor.batch_size
    for index in range(protocol.sets):
        first = index * protocol.num_images
        batches = draw_set(grid.models[name], grid.opened.scheduler, protocol, index, size, label, context)
        for start, pixels in batches:
            samples.write(first + start, pixels)
            features.write(first + start, grid.opened.extractor.features(pixels).numpy())
    return Drawn(samples.read(), torch.from_numpy(np.array(features.read())))
