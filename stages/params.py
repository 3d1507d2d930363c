"""params.yaml -> frozen, checked types; unknown keys are refused."""

from pathlib import Path

import click
from pydantic import Field, model_validator

from stages.costs.params import CostsParams
from stages.fetch.params import FetchParams
from stages.finetune.params import FinetuneParams
from stages.grid.params import GridParams
from stages.importance.params import ImportanceParams
from stages.models.params import RoundsParams
from stages.protocol.params import ReferenceParams
from stages.prune.params import PruneParams
from stages.runtime.schema import Section, read_yaml
from stages.variants.params import VariantsParams


class Params(Section):
    """All of params.yaml: one seed, then one block a stage."""

    seed: int = Field(ge=0)
    """The root of every random draw."""
    fetch: FetchParams
    reference: ReferenceParams
    importance: ImportanceParams
    prune: PruneParams
    rounds: RoundsParams
    finetune: FinetuneParams
    variants: VariantsParams | None
    costs: CostsParams
    grid: GridParams | None = None
    """Of the command `espalier grid`; no stage reads it, so that it may be missing."""

    @model_validator(mode="after")
    def _check_variants(self) -> "Params":
        if self.variants:
            self.variants.check_protocol(self.reference)
        return self

    @model_validator(mode="after")
    def _check_rounds(self) -> "Params":
        self.prune.check_rounds(self.rounds)
        self.finetune.after_rounds(self.rounds)
        return self


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        InputError: The file is missing, is no YAML, or a value is not allowed; every wrong value is named.
    """
    return read_yaml(path, Params)


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="The file to check.")
def main(params_path: Path) -> None:
    """Check a params file, before anything runs."""
    load_params(params_path)


if __name__ == "__main__":
    main()
