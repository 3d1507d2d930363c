"""Shards: an image depends on its seed alone, equal jobs give equal bytes, and what is finished is not repeated."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Features
from PIL import Image

from stages.drawing.finished import find_finished, write_manifest
from stages.drawing.labels import Labels
from stages.drawing.source import Source
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.sampling import draw as draw_pixels
from stages.models.variants.folder import read_model, variant_file, write_variant
from stages.models.variants.kinds import Kind
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256


def read(out):
    """Read all shards of a folder: seed -> label and PNG."""
    found = {}
    for path in sorted(out.glob("shard-*")):
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
            found |= {row["seed"]: (row.get("label"), row["image"]["bytes"]) for row in rows}
        else:
            with tarfile.open(path) as archive:
                files = {name: archive.extractfile(name).read() for name in archive.getnames()}
            for name, content in files.items():
                if name.endswith(".json"):
                    about = json.loads(content)
                    found[about["seed"]] = about.get("label"), files[name.replace(".json", ".png")]
    return found


def shards(out):
    """Return the bytes of all shards of a folder."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


@pytest.mark.parametrize(
    "other",
    [
        {"format": "webdataset"},
        {"shard_size": 4},
        {"shard_size": 12, "seeds": range(5, 18)},
        {"seeds": range(3, 4), "format": "webdataset"},
    ],
)
def test_an_image_is_the_same_in_every_job(draw, tmp_path, other):
    """Whatever format, size of shards, and first and last seed: the PNG of a seed has the same bytes."""
    draw(tmp_path / "one")
    draw(tmp_path / "two", **other)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")

    assert list(one) == list(range(20))
    assert list(two) == list(other.get("seeds", range(20)))
    assert two == {seed: one[seed] for seed in two}


def test_an_image_is_that_of_the_sampler(draw, source, tmp_path):
    """The reference: the function that the stages draw with; it is nobody else's image."""
    draw(tmp_path / "out")
    found = [np.asarray(Image.open(io.BytesIO(png))) for _, png in read(tmp_path / "out").values()]
    unet, scheduler = read_unet(source.folder), read_scheduler(source.folder)
    expected = draw_pixels(unet, scheduler, range(20), SamplerParams(steps=2), batch_size=20, label="x")[:, 0]

    np.testing.assert_allclose(np.stack(found).astype(int), expected.astype(int), atol=1)
    assert len({image.tobytes() for image in found}) == 20


@pytest.mark.parametrize("shard_format", ["parquet", "webdataset"])
def test_equal_shards_of_two_jobs_have_equal_bytes(draw, tmp_path, shard_format):
    """A job of a part of the seeds has the same shards as the whole; the manifest of a job is the same each time."""
    manifests = []
    for name in ("one", "again"):
        job, place, _ = draw(tmp_path / name, format=shard_format)
        manifests.append(write_manifest(place, job))
    draw(tmp_path / "part", range(8, 16), format=shard_format)
    ((name, content),) = shards(tmp_path / "part").items()

    assert manifests[0] == manifests[1] == (tmp_path / "one/manifest.json").read_bytes()
    assert shards(tmp_path / "one") == shards(tmp_path / "again")
    assert shards(tmp_path / "one")[name] == content


def test_the_manifest_names_every_shard_with_its_hash(draw, tmp_path):
    """Seeds follow one another without a gap, and the model is named by the hashes of its files."""
    job, place, _ = draw(tmp_path / "out")
    manifest = json.loads(write_manifest(place, job) or b"")

    assert [(it["first_seed"], it["count"]) for it in manifest["shards"]] == [(0, 8), (8, 8), (16, 4)]
    for shard in manifest["shards"]:
        assert file_sha256(tmp_path / "out" / shard["name"]) == shard["sha256"]
        assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["size_bytes"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert manifest["job"]["files"][weights] == file_sha256(tmp_path / "model" / weights)
    assert manifest["job"]["sampler"]["steps"] == 2


def test_a_finished_shard_is_not_drawn_again(draw, tmp_path):
    """A second call finds what the first one finished, and draws the rest; the manifest comes with the last shard."""
    job, place, reports = draw(tmp_path / "out", numbers=range(1, 2))
    assert [kind for kind, _, _ in reports] == ["ready", "batch", "batch", "done"]
    assert write_manifest(place, job) is None
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    job, place, reports = draw(tmp_path / "out")

    assert [(kind, number) for kind, number, _ in reports if kind in ("done", "found")] == [
        ("done", 0),
        ("found", 1),
        ("done", 2),
    ]
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    assert sorted(find_finished(place, job)) == [0, 1, 2]


def test_a_damaged_shard_is_named(draw, tmp_path):
    """One bit, and one byte less; after it was removed, the same bytes are drawn anew."""
    job, place, _ = draw(tmp_path / "out")
    shard = tmp_path / "out/shard-00001.parquet"
    content = shard.read_bytes()
    for damaged in (bytes([content[0] ^ 1, *content[1:]]), content[:-1]):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=r"out/shard-00001\.parquet is damaged: it has .*remove this file"):
            find_finished(place, job)
    shard.unlink()
    with pytest.raises(InputError, match="is gone; run the same command without --check"):
        find_finished(place, job, only_check=True)
    assert sorted(find_finished(place, job)) == [0, 2]
    draw(tmp_path / "out")

    assert shard.read_bytes() == content


def test_a_damaged_record_is_named(draw, tmp_path):
    """Of a shard, and of the job; neither is taken for unfinished."""
    job, place, _ = draw(tmp_path / "out")
    record = tmp_path / "out/.job/shard-00002.json"
    record.write_text("{")
    with pytest.raises(InputError, match=r"shard-00002\.json is damaged .*; remove it, and run the same command again"):
        find_finished(place, job)
    (tmp_path / "out/.job/job.json").write_text("{}")
    with pytest.raises(InputError, match=r"job\.json is damaged"):
        find_finished(place, job)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seeds": range(1, 20)}, "first_seed is 0 there, 1 here"),
        ({"steps": 4}, "sampler.steps is 2 there, 4 here"),
        ({"shard_size": 16}, "shard_size is 8 there, 16 here"),
        ({"batch_size": 8}, "batch_size is 4 there, 8 here"),
        ({"format": "webdataset"}, "format is parquet there, webdataset here"),
        ({"labels": Labels(one=1, origin="--label 1")}, "labels is None there, class 1 here"),
    ],
)
def test_another_job_in_the_same_place_is_refused(draw, make, tmp_path, other, difference):
    """The message names what differs and what to do."""
    _, place, _ = draw(tmp_path / "out", range(20), numbers=range(1))
    with pytest.raises(InputError, match=difference) as caught:
        find_finished(place, make(**other))
    assert caught.value.message.endswith("choose another --out, or give the same values")


def test_other_weights_are_another_job(draw, make, make_unet, scheduler, tmp_path):
    """The name of the folder does not matter, the hash of each file does."""
    from stages.models.pipeline import write_pipeline

    _, place, _ = draw(tmp_path / "out", numbers=range(1))
    write_pipeline(tmp_path / "model", make_unet(seed=1), scheduler)
    with pytest.raises(InputError, match=r"files\.unet/diffusion_pytorch_model\.safetensors is .* there"):
        find_finished(place, make())


def test_files_of_others_are_not_touched(make, tmp_path):
    """A folder without a job has to be empty."""
    from stages.storage.places import open_place

    (tmp_path / "out").mkdir()
    place = open_place(str(tmp_path / "out"), "--out")
    assert find_finished(place, make()) == {}
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that no draw wrote"):
        find_finished(place, make())


def test_classes_come_from_the_seed_an_option_or_a_file(draw, labelled, tmp_path):
    """Each image has its class beside it, and another class is another image; datasets reads the columns."""
    draw(tmp_path / "by-seed", of=labelled)
    draw(tmp_path / "one", labels=Labels(one=1), of=labelled, format="webdataset")
    draw(tmp_path / "each", range(2, 8), Labels(2, each=[2, 1, 0, 1, 2, 0]), labelled)
    by_seed, one, each = (read(tmp_path / name) for name in ("by-seed", "one", "each"))

    assert [label for label, _ in by_seed.values()] == [seed % 3 for seed in range(20)]
    assert {label for label, _ in one.values()} == {1}
    assert [label for label, _ in each.values()] == [2, 1, 0, 1, 2, 0]
    assert {seed for seed in by_seed if by_seed[seed] == one[seed]} == {seed for seed in by_seed if seed % 3 == 1}
    assert {seed for seed in each if each[seed] == by_seed[seed]} == {2}
    features = Features.from_arrow_schema(pq.read_schema(tmp_path / "each/shard-00000.parquet"))
    assert {name: type(feature).__name__ for name, feature in features.items()} == {
        "image": "Image",
        "seed": "Value",
        "label": "Value",
    }


@pytest.mark.parametrize("kind", [Kind("float32", 3), Kind("int8"), Kind("onnx")], ids=lambda kind: kind.name)
def test_a_variant_is_drawn_as_itself(draw, source, tmp_path, kind):
    """Its images are those of the variant and not of the model it was made from; its files name the job."""
    folder = tmp_path / "variant"
    folder.mkdir()
    write_variant("dense", source.folder, kind, folder)
    sampler = SamplerParams(steps=10)
    settings = replace(source.settings, sampler=sampler)
    job, _, _ = draw(tmp_path / "out", range(8), of=Source("variant", folder, settings))
    found = [np.asarray(Image.open(io.BytesIO(png))) for _, png in read(tmp_path / "out").values()]

    unet, scheduler = read_model(folder), read_scheduler(folder)
    expected = draw_pixels(unet, scheduler, range(8), sampler, batch_size=4, label="x")[:, 0]
    np.testing.assert_array_equal(np.stack(found), expected)
    dense = draw_pixels(read_unet(source.folder), scheduler, range(8), sampler, batch_size=4, label="x")[:, 0]
    assert kind.is_graph or (expected != dense).any()
    assert {"variant.json", variant_file(folder).relative_to(folder).as_posix()} <= set(job.files)
    assert ("onnxruntime" in job.packages) == kind.is_graph
