"""The block variants of params.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from stages.models.variants.kinds import Kind, check_cache_sampler, parse_kind
from stages.protocol.params import ReferenceParams
from stages.runtime.errors import InputError
from stages.runtime.schema import Section, load_block, load_seed

ModelName = Literal["dense", "pruned", "finetuned"]


class VariantsParams(Section):
    """Which variants are built and measured; the block is null where there are none."""

    models: tuple[ModelName, ...] = Field(("dense", "finetuned"), min_length=1)
    """The models that variants are made of, by their names in the results table."""
    kinds: tuple[str | tuple[str, ...], ...] = Field(min_length=1)
    """What is made of each model: onnx (an ONNX graph), int8 or int4 (integer weights, computed in float32), float8
    (weights that are floats of 8 bits, likewise), int8-dynamic (an ONNX graph with integer products), cache-N (deep
    features are computed in every N-th sampling step and reused in those between), or a list such as
    [int8, cache-3]."""

    @field_validator("models")
    @classmethod
    def _are_different(cls, models: tuple[ModelName, ...]) -> tuple[ModelName, ...]:
        if len(set(models)) < len(models):
            raise ValueError("a model is named twice")
        return models

    @field_validator("kinds")
    @classmethod
    def _are_kinds(cls, kinds: tuple[str | tuple[str, ...], ...]) -> tuple[str | tuple[str, ...], ...]:
        if len({parse_kind(parts) for parts in kinds}) < len(kinds):
            raise ValueError("a kind is named twice")
        return kinds

    def parsed(self) -> list[Kind]:
        """Return the kinds."""
        return [parse_kind(parts) for parts in self.kinds]

    def check_protocol(self, reference: ReferenceParams) -> None:
        """Check that every kind can draw under the protocol.

        Raises:
            InputError: A graph would have to compute in another precision than float32, or a cache has no second full
                pass or would be another cache.
        """
        graphs = [kind.name for kind in self.parsed() if kind.is_graph]
        if graphs and reference.precision != "float32":
            found = f"variants.kinds has {graphs[0]}, which computes in float32, and reference.precision is"
            raise InputError(f"{found} {reference.precision}; leave it out, or set reference.precision to float32")
        for kind in self.parsed():
            check_cache_sampler(kind.interval, reference.sampler, f"variants.kinds has {kind.name}")


@dataclass(frozen=True)
class Params:
    """What the stage reads of params.yaml."""

    seed: int
    reference: ReferenceParams
    variants: VariantsParams | None

    def decisive(self) -> dict[str, Any]:
        """Return the params that the outputs depend on; without variants there are none but the block itself."""
        if self.variants is None:
            return {"variants": {}}
        return {"seed": self.seed, "reference": self.reference, "variants": self.variants}


def read_params(path: Path) -> Params:
    """Read what the stage needs of a params file.

    Raises:
        InputError: A block is missing or not valid, or the blocks do not fit each other.
    """
    params = Params(
        seed=load_seed(path),
        reference=load_block(path, "reference", ReferenceParams),
        variants=load_block(path, "variants", VariantsParams | None),  # type: ignore[arg-type]  # a type of the block
    )
    if params.variants:
        params.variants.check_protocol(params.reference)
    return params
