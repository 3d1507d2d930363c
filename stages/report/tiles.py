"""An evaluation and its costs -> the tiles of the page: the headline numbers, in colours that follow the verdict."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.protocol.costs import Cost, CostsRecord
from stages.protocol.evaluation import DENSE, EvaluationRecord, Model
from stages.protocol.verdict import FINETUNED, Level, judge, rate_fid, rate_pictures, rate_speed, tone, write_share
from stages.report.table import ALIKE


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    value: str
    label: str
    term: str
    """The term that explains the label."""
    tone: Level | None = None
    """Its colour; None for a neutral one."""


def headline_tiles(record: EvaluationRecord, costs: CostsRecord, recovered: float | None) -> Iterator[Tile]:
    """List the headline numbers of the finetuned model.

    Args:
        record: The evaluation.
        costs: The costs of its models.
        recovered: Share of the FID lost by pruning that finetuning recovered; None without a tile.
    """
    level = judge(record, costs).level
    yield from _size_tiles(record)
    cost = costs.first(FINETUNED)
    if cost.speed_up:
        yield _speed_tile(cost, level)
    yield from _fid_tiles(record, level)
    yield from _picture_tiles(record, level)
    if recovered is not None:
        yield Tile(f"{recovered:.1%}" if recovered <= 1 else "all", "of the FID lost by pruning, recovered", "FID")


def _models(record: EvaluationRecord) -> tuple[Model, Model]:
    return record.models[DENSE], record.models[FINETUNED]


def _size_tiles(record: EvaluationRecord) -> Iterator[Tile]:
    dense, finetuned = _models(record)
    yield Tile(f"{finetuned.macs / dense.macs - 1:+.1%}".replace("-", "−"), "MACs", "MACs")
    yield Tile(f"{finetuned.params / dense.params - 1:+.1%}".replace("-", "−"), "parameters", "params")


def _speed_tile(cost: Cost, level: Level) -> Tile:
    label = f"speed at batch {cost.batch}, {cost.precision}, measured"
    return Tile(f"{cost.speed_up:.2f}×", label, "speed-up", tone(level, rate_speed(cost)))


def _fid_tiles(record: EvaluationRecord, level: Level) -> Iterator[Tile]:
    dense, finetuned = _models(record)
    above = finetuned.fid.above_dense
    mark = f", {ALIKE}" if above and above.is_distinct is False else ""
    colour = tone(level, rate_fid(record, FINETUNED))
    yield Tile(f"{dense.fid.mean:.2f} → {finetuned.fid.mean:.2f}", f"FID, dense → finetuned{mark}", "FID", colour)
    if finetuned.fid_dense:
        floor = record.fid_dense_floor
        scale = "" if floor is None else f"; dense sets from different noise {floor:.2f}"
        yield Tile(f"{finetuned.fid_dense.mean:.3f}", f"FID to the dense model's images{scale}", "FID to dense")


def _picture_tiles(record: EvaluationRecord, level: Level) -> Iterator[Tile]:
    _, finetuned = _models(record)
    colour = tone(level, rate_pictures(record, FINETUNED))
    yield Tile(f"{finetuned.ssim.mean:.3f}", "SSIM against dense", "SSIM", colour)
    if finetuned.visible_pairs is not None:
        share = write_share(finetuned.visible_pairs, record.num_pairs)
        yield Tile(share, "pictures differ visibly from dense", "differs visibly", colour)
