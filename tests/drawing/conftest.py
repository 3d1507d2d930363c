"""Jobs of the tiny model."""

import pytest

from stages.drawing.labels import Labels
from stages.drawing.request import Request, make_job
from stages.drawing.source import Settings, Source
from stages.drawing.worker import draw_pending, load_drawer
from stages.models.params import SamplerParams
from stages.models.pipeline import write_pipeline
from stages.storage.places import open_place


@pytest.fixture
def source(model_folder):
    """The tiny model, drawn in two steps and batches of 4."""
    return Source("tiny", model_folder, Settings(SamplerParams(steps=2), None, "float32", 4))


@pytest.fixture
def labelled(tmp_path, make_unet, scheduler):
    """The tiny model with three classes."""
    write_pipeline(tmp_path / "labelled", make_unet(num_class_embeds=3), scheduler)
    return Source("labelled", tmp_path / "labelled", Settings(SamplerParams(steps=2), None, "float32", 4))


@pytest.fixture
def make(source):
    """Return a job of the tiny model; keywords are those of a request."""

    def make_one(seeds=range(20), labels=None, of=source, **options):
        request = Request(**{"model": "", "out": "", "format": "parquet", "shard_size": 8, **options}, seeds=seeds)
        return make_job(request, of, labels or Labels(seeds.start))

    return make_one


@pytest.fixture
def draw(make, source):
    """Draw a job into a place by one worker of this process: the job, the place, and what the worker reported."""

    def draw_one(out, seeds=range(20), labels=None, of=source, numbers=None, **options):
        job, place, reports = make(seeds, labels, of, **options), open_place(str(out), "--out"), []
        drawer = load_drawer(job, of.folder, labels or Labels(seeds.start))
        draw_pending(drawer, place, job.shards(numbers), lambda *report: reports.append(report))
        return job, place, reports

    return draw_one
