"""The bundled digits -> images per second of a worker that writes shards, against a bare loop of the sampler."""

import tempfile
import time
from statistics import median

import click

from stages.drawing.labels import Labels
from stages.drawing.request import Request, make_job
from stages.drawing.source import Settings, Source
from stages.drawing.worker import draw_pending, load_drawer
from stages.fetch.model import BUNDLED
from stages.models.params import SamplerParams
from stages.models.sampling import draw
from stages.storage.places import open_place

MODEL = BUNDLED / "digits"


@click.command()
@click.option("--num-images", type=click.IntRange(1), default=250, help="Images of a run, one shard.")
@click.option("--batch-size", type=click.IntRange(1), default=125, help="Images per batch.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Runs of each kind, in turn; medians are printed.")
def main(num_images: int, batch_size: int, rounds: int) -> None:
    """Draw the same images in ten steps by a worker and by a bare loop in turn, in one process."""
    source = Source("digits", MODEL, Settings(SamplerParams(steps=10), None, "float32", batch_size))
    request = Request("", "", range(num_images), "parquet", shard_size=-(-num_images // batch_size) * batch_size)
    job = make_job(request, source, Labels())
    drawer = load_drawer(job, MODEL, Labels())
    bare, whole, ratios = [], [], []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        seeds, sampler = range(num_images), job.sampler
        draw(drawer.model.unet, drawer.model.scheduler, seeds, sampler, batch_size=batch_size, label="bare loop")
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            place = open_place(f"{folder}/out", "--out")
            draw_pending(drawer, place, job.shards(), lambda *_: None)
            end = time.perf_counter()
        bare.append(num_images / (middle - begin))
        whole.append(num_images / (end - middle))
        ratios.append(whole[-1] / bare[-1])
    rates = f"bare loop {median(bare[1:]):.1f}/s, worker {median(whole[1:]):.1f}/s"
    print(f"{rates}, ratio {median(ratios[1:]):.3f} (medians)")
    print("ratios of the rounds, the first one to warm up:", *(f"{ratio:.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
