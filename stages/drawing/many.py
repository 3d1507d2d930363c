"""A request -> a job drawn by several workers, with progress, a manifest and a run in MLflow."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from stages.drawing.finished import find_finished, write_manifest
from stages.drawing.job import MANIFEST, Job
from stages.drawing.request import Request, choose_labels, choose_numbers, make_job
from stages.drawing.source import opened
from stages.drawing.worker_pool import WorkerPool
from stages.drawing.worker_reports import BATCH, DONE, FOUND, READY, WorkerReport
from stages.runtime.cores import count_cores
from stages.runtime.errors import InputError, warn
from stages.runtime.progress import track
from stages.runtime.result import write_result
from stages.runtime.wording import count
from stages.storage.places import open_place
from stages.tracking.draws import DrawRun

SECONDS_BETWEEN_LOGS = 10.0


def draw_many(request: Request) -> str:
    """Draw what is unfinished of a request, and write the manifest once every shard of the job is finished.

    Returns:
        What was done, in one line.

    Raises:
        InputError: Something does not fit, the place holds another job, or a finished shard is damaged.
        UnavailableError: A server does not answer.
    """
    labels = choose_labels(request.label, request.labels_path, request.seeds)
    place = open_place(request.out, "--out")
    with opened(request.model, request.params_path) as source:
        job = make_job(request, source, labels)
        numbers = choose_numbers(request, job)
        finished = find_finished(place, job, only_check=request.check)
        if request.check:
            found = f"{len(finished)} of {len(job.numbers())} shards of {request.out} are finished"
            return f"{found}, and each has its hash"
        pending = [number for number in numbers if number not in finished]
        progress = Progress(job, numbers, [number for number in numbers if number in finished])
        if pending:
            task = {
                "job": job.model_dump(mode="json"),
                "model": str(source.folder.resolve()),
                "labels": asdict(labels),
                "out": request.out,
                "pending": pending,
            }
            with _recorded(job, progress) as run:
                progress.follow(WorkerPool(task, _environments(request.jobs, len(pending), job)), job.model, run)
                manifest = write_manifest(place, job)
                run.close("FINISHED", manifest)
        else:
            manifest = write_manifest(place, job)
    return _summarise(request, job, numbers, progress, is_complete=manifest is not None)


@contextmanager
def _recorded(job: Job, progress: "Progress") -> Iterator[DrawRun]:
    """Open the MLflow run of a job, and end it with a failure of the block.

    A mistake that is found before the first image leaves no run.
    """
    params = {**job.model_dump(mode="json", exclude={"files"}), **job.files}
    run = DrawRun(job.id, f"{job.model} {job.first_seed}:{job.end_seed}", params)
    try:
        yield run
    except BaseException as error:
        is_mistake = isinstance(error, InputError)
        if not is_mistake or progress.counted > progress.before:
            run.log(progress.counted, progress.rate)
            run.close("FAILED" if is_mistake else "KILLED")
        raise


def _environments(jobs: int | None, num_shards: int, job: Job) -> list[dict[str, str]]:
    """Return the environment of each worker: its GPU, or its threads on the CPU; by default one for each."""
    if job.threads is None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [it for it in given.split(",") if it] if given else list(map(str, range(torch.cuda.device_count())))
        wanted = min(jobs or len(gpus), num_shards)
        return [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(wanted)]
    wanted = min(jobs or max(1, count_cores() // job.threads), num_shards)
    return [{"OMP_NUM_THREADS": str(job.threads), "CUDA_VISIBLE_DEVICES": ""}] * wanted


class Progress:
    """How many images are finished, of those that this call is to see finished.

    Args:
        job: The job.
        numbers: The shards of this call.
        before: Those of them that were finished before.
    """

    def __init__(self, job: Job, numbers: range, before: Sequence[int]) -> None:
        self.total = sum(len(shard.seeds) for shard in job.shards(numbers))
        self.before = sum(len(job.shard(number).seeds) for number in before)
        self.counted = self.before
        """Images of finished shards, and of those that are being drawn."""
        self.drawn, self.begin, self.end = 0, time.monotonic(), time.monotonic()
        self._partial: dict[int, int] = {}
        self._finished = set(before)

    @property
    def rate(self) -> float:
        """Images that the workers of this call drew in a second, from the begin of the first."""
        return self.drawn / max(self.end - self.begin, 1e-9)

    def follow(self, pool: WorkerPool, label: str, run: DrawRun) -> None:
        """Show and record the work of a pool until it is done; whatever ends this ends the pool.

        Raises:
            InputError: A worker found a mistake, or all workers ended before the work was done.
        """
        try:
            reports = pool.reports()
            next(reports, None)  # a worker is ready: its start does not count
            self.begin = time.monotonic()
            for _ in track(self._images(reports, run), f"draw {label}, image", self.total, done=self.before):
                pass
        finally:
            pool.close()
        run.log(self.counted, self.rate)
        if self.counted - sum(self._partial.values()) < self.total:
            reason = pool.killed[0] if pool.killed else "ended early"
            raise InputError(f"all workers have ended before the last shard (one {reason}); run the same command again")
        if pool.killed:
            warn(f"{count(len(pool.killed), 'worker')} {pool.killed[0]}; others drew in its place")

    def _images(self, reports: Iterator[WorkerReport], run: DrawRun) -> Iterator[None]:
        """Yield once for each further image; what a killed worker had drawn of a shard counts once."""
        shown, logged = self.before, time.monotonic()
        for kind, number, num_images in reports:
            if kind in (BATCH, DONE, FOUND) and number not in self._finished:  # each worker finds what others finished
                self.counted += num_images - self._partial.pop(number, 0)
                self.drawn += num_images if kind == DONE else 0
                self.end = time.monotonic()
            if kind == BATCH:
                self._partial[number] = num_images
            elif kind != READY:
                self._finished.add(number)
            while shown < self.counted:
                shown += 1
                yield
            if self.end - logged > SECONDS_BETWEEN_LOGS:
                run.log(self.counted, self.rate)
                logged = self.end


def _summarise(request: Request, job: Job, numbers: range, progress: Progress, *, is_complete: bool) -> str:
    rate = f", {progress.drawn} of them now, {progress.rate:.3g}/s" if progress.drawn else ""
    write_result(out=request.out, num_images=progress.total, drawn=progress.drawn, is_complete=is_complete)
    finished = f"{count(progress.total, 'image')} in {count(len(numbers), 'shard')} of {request.out}{rate}"
    if is_complete:
        return f"{finished}; complete, see {request.out.rstrip('/')}/{MANIFEST}"
    return f"{finished}; the job has {len(job.numbers())} shards, and {MANIFEST} comes with the last"
