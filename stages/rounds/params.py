"""params.yaml -> the params of each round, as files that the stages in it read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.finetune.params import FinetuneParams
from stages.importance.params import ImportanceParams
from stages.models.params import RoundsParams
from stages.prune.params import PruneParams, Target
from stages.runtime.schema import load_block, load_seed, read_tree
from stages.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Params:
    """The blocks of params.yaml that rounds depend on."""

    tree: dict[str, Any]
    """The whole file."""
    seed: int
    rounds: RoundsParams
    importance: ImportanceParams
    prune: PruneParams
    finetune: FinetuneParams

    def last_training(self) -> dict[str, Any]:
        """Return seed and params of the training after the rounds, by which a clean-up finds out what needs them."""
        return {"seed": self.seed, "finetune": self.finetune.after_rounds(self.rounds).model_dump(mode="json")}

    def trees(self, targets: Iterable[Target]) -> Iterator[dict[str, Any]]:
        """Yield the content of params.yaml for a round to each of the targets, without rounds in it.

        Each has a seed of its own, since its draws would otherwise repeat those of the other rounds.
        """
        recovery = self.finetune.in_round(self.rounds)
        for index, target in enumerate(targets, start=1):
            yield {
                **self.tree,
                "seed": derive_seed(self.seed, "round", index),
                "rounds": RoundsParams().model_dump(mode="json"),
                "importance": {**self.importance.model_dump(mode="json"), "report": None},
                "prune": {**self.prune.model_dump(mode="json"), "target": target.given()},
                "finetune": recovery.model_dump(mode="json"),
            }


def read_params(path: Path) -> Params:
    """Read a params file, and check that its pruning can be divided into rounds.

    Raises:
        InputError: A block is missing or not valid, or the blocks do not fit each other.
    """
    params = Params(
        tree=read_tree(path, YAML(typ="safe")),
        seed=load_seed(path),
        rounds=load_block(path, "rounds", RoundsParams),
        importance=load_block(path, "importance", ImportanceParams),
        prune=load_block(path, "prune", PruneParams),
        finetune=load_block(path, "finetune", FinetuneParams),
    )
    params.prune.check_rounds(params.rounds)
    params.finetune.after_rounds(params.rounds)
    return params
