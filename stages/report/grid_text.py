"""A grid -> sentences: where each model has its best FID, and what that is worth."""

from stages.protocol.evaluation import DENSE, Metric
from stages.protocol.grid import SSIM, GridRecord, fid_apart
from stages.protocol.intervals import Estimate


def write_value(found: Estimate | Metric) -> str:
    """Format a mean, with its interval if it has one."""
    return f"{found.mean:.3f}" + (f" ± {found.half_width:.3f}" if found.half_width is not None else "")


def summarise(record: GridRecord) -> str:
    """Say in one sentence where each model has its best FID, and whether the bests differ by more than the interval."""
    dense = record.best(DENSE)
    names = [DENSE, *record.others]
    wheres = [
        f"{name} with {(it := record.best(name)).describe()} ({write_value(it.metrics['fid'])})" for name in names
    ]
    parts = [f"By FID, best are {' and '.join([', '.join(wheres[:-1]), wheres[-1]])}"]
    for name in record.others:
        apart = fid_apart(record.best(name), dense)
        if apart.half_width is None:
            parts.append("with one set there are no intervals, so that nothing says whether the bests differ")
            break
        side = "above" if apart.mean > 0 else "below"
        size = write_value(Estimate(abs(apart.mean), apart.half_width))
        told = "more than the interval" if apart.is_distinct else "within the interval, so they cannot be told apart"
        parts.append(f"the best of {name} is {size} {side} the best of dense, {told}")
    return "; ".join(parts) + "."


def explain(record: GridRecord) -> list[str]:
    """Say what a user can take from the grid: fewer operations at the same FID, and where pruning shows least."""
    found = []
    for name in [DENSE, *record.others] if record.protocol.sets > 1 else []:
        best, cheapest = record.best(name), record.cheapest(name)
        if cheapest is best:
            found.append(f"{name}: no cheaper setting has an FID that cannot be told from its best.")
        else:
            found.append(
                f"{name}: by FID, {cheapest.describe()} cannot be told from its best "
                f"({write_value(fid_apart(cheapest, best))} apart), at {cheapest.macs / best.macs:.0%} of the MACs."
            )
    for name in record.others:
        closest = max(record.of(name), key=lambda cell: cell.metrics[SSIM].mean)
        value = write_value(closest.metrics[SSIM])
        found.append(f"{name} is closest to dense at the same setting with {closest.describe()}: SSIM {value}.")
    return [*found, "The best of several cells is chosen by the same images that it is measured on, and flatters."]
