"""A job and a model -> the shards of the job that no other worker draws, each written whole and then recorded.

Run as a program, it reads one line of JSON from its standard input, prints what it does as JSON, and ends when its
standard input closes.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from stages.drawing.job import JOB, Job, Shard, ShardRecord, check_same, read_shard_record, record_bytes
from stages.drawing.labels import Labels
from stages.drawing.loaded import Loaded, load_model
from stages.drawing.shards import WRITERS, Row, to_png
from stages.drawing.source import Settings
from stages.drawing.worker_reports import BATCH, DONE, ERROR, FOUND, READY
from stages.models.sampling import draw_batches
from stages.runtime.device import keep_freed_memory
from stages.runtime.errors import InputError
from stages.storage.places import Place, open_place

POLL_S = 1.0
"""Pause before a worker looks again for what others draw."""
Report = Callable[[str, int, int], None]
"""Takes a kind, the number of a shard and a number of images."""


@dataclass(frozen=True)
class Drawer:
    """A model that was loaded and checked, and the classes of the images."""

    job: Job
    model: Loaded
    labels: Labels

    def draw(self, shard: Shard, report: Report) -> list[Row]:
        """Draw the images of a shard, in whole batches; images of a batch that lie outside the shard are dropped."""
        size, wanted = self.job.batch_size, shard.seeds
        seeds = range(wanted.start // size * size, -(-wanted.stop // size) * size)
        labels, rows = self.labels.of(self.model.context.table, seeds), []
        batches = draw_batches(
            self.model.unet,
            self.model.scheduler,
            seeds,
            self.job.sampler,
            range(0, len(seeds), size),
            precision=self.job.precision,
            batch_size=size,
            label=self.job.model,
            context=self.model.context,
            labels=labels,
        )
        for start, pixels in batches:
            for place, image in enumerate(pixels, start):
                if seeds[place] in wanted:
                    rows.append(Row(seeds[place], labels[place] if labels else None, to_png(image)))
            report(BATCH, shard.number, len(rows))
        return rows


def load_drawer(job: Job, folder: Path, labels: Labels) -> Drawer:
    """Load the model of a job, and check that everything fits it.

    Raises:
        InputError: The folder is damaged, or sampler, guidance, precision or classes do not fit.
    """
    settings = Settings(job.sampler, job.guidance, job.precision, job.batch_size)
    return Drawer(job, load_model(folder, settings, labels, job.model), labels)


def draw_pending(drawer: Drawer, place: Place, pending: list[Shard], report: Report) -> None:
    """Draw shards until all of them are finished, by this worker or by others.

    Args:
        drawer: The model.
        place: Where the shards go.
        pending: The shards, in the order in which this worker tries them.
        report: Called as the work goes on.

    Raises:
        InputError: The place holds another job or cannot be written, or an image is not finite.
    """
    if not place.create(JOB, content := record_bytes(drawer.job)):
        check_same(place.read(JOB) or content, drawer.job, place)
    report(READY, 0, 0)
    while pending:
        left = [shard for shard in pending if not _finish(drawer, place, shard, report)]
        if len(left) == len(pending):
            time.sleep(POLL_S)
        pending = left


def _finish(drawer: Drawer, place: Place, shard: Shard, report: Report) -> bool:
    """Draw a shard unless it is finished or another worker draws it; returns whether it is finished."""
    if read_shard_record(place, shard):
        report(FOUND, shard.number, len(shard.seeds))
        return True
    with place.claim(f"shard-{shard.number:05d}") as is_own:
        if not is_own:
            return False
        if read_shard_record(place, shard):  # finished between the two
            report(FOUND, shard.number, len(shard.seeds))
            return True
        content, name = WRITERS[drawer.job.format](drawer.draw(shard, report)), drawer.job.name(shard)
        place.write(name, content)
        record = ShardRecord(
            name=name,
            first_seed=shard.seeds.start,
            count=len(shard.seeds),
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        place.write(shard.record, record_bytes(record))
    report(DONE, shard.number, len(shard.seeds))
    return True


def main() -> None:
    """Take a job from standard input and draw; a mistake is reported, and the exit code is 1."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # so that a library that prints does not disturb the reports
        task = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_caller, daemon=True).start()
        try:
            _work(task, out)
        except InputError as error:
            print(json.dumps([ERROR, error.exit_code, error.message]), file=out)
            sys.exit(error.exit_code)


def _work(task: dict[str, Any], out: IO[str]) -> None:
    job = Job.model_validate(task["job"])
    if job.threads:
        torch.set_num_threads(job.threads)
        keep_freed_memory()
    drawer = load_drawer(job, Path(task["model"]), Labels(**task["labels"]))
    numbers = task["pending"]
    turn = len(numbers) * task["worker"] // task["workers"]  # so that workers do not all try the same shard first
    pending = [job.shard(number) for number in numbers[turn:] + numbers[:turn]]
    draw_pending(drawer, open_place(task["out"], "--out"), pending, lambda *it: print(json.dumps(it), file=out))


def _end_with_caller() -> NoReturn:
    """Wait until the caller's end of standard input closes, and end at once: what is unfinished is drawn again."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
