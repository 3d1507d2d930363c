"""What is to be drawn -> a job, its shards and the record of each; equal jobs give equal bytes."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from stages.models.params import PrecisionName, SamplerParams
from stages.protocol.protocol import brief
from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError, first_line
from stages.runtime.schema import Frozen, Sha256, flatten
from stages.storage.files import json_bytes
from stages.storage.places import Place
from stages.storage.s3_place import CONTROL

JOB, MANIFEST = f"{CONTROL}/job.json", "manifest.json"
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
"""Format -> suffix of a shard."""
MAX_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Shard(NamedTuple):
    """A part of a job that one worker draws and writes as one file."""

    number: int
    """Shard k holds those of the job's seeds that lie from k · shard_size up to, but not with, (k + 1) · shard_size."""
    seeds: range

    @property
    def record(self) -> str:
        """Name of its record, which is written after it."""
        return f"{CONTROL}/shard-{self.number:05d}.json"


class ShardRecord(Frozen):
    """What is known of a finished shard."""

    name: str
    first_seed: Seed
    count: int = Field(ge=1)
    """Number of images; their seeds follow one another."""
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class Job(Frozen):
    """Everything that decides the bytes of the shards, apart from the kind of the processor."""

    version: Literal[1] = 1
    model: str
    """Address of the version, models:/NAME/3, or name of the folder; the files count, and not this name."""
    files: dict[str, Sha256]
    """File of the model -> hash."""
    first_seed: Seed
    end_seed: Seed
    """The seed after the last one."""
    labels: str | None
    """Where classes come from: one class, or the hash of a file; null is the seed modulo the number of classes."""
    sampler: SamplerParams
    guidance: float | None
    precision: PrecisionName
    batch_size: int = Field(ge=1)
    """Seeds of a batch. An image is always drawn in the same whole batch, seeds k · batch_size and following, because
    kernels may round differently in a batch of another size."""
    shard_size: int = Field(ge=1)
    """Seeds of a shard, a multiple of the batch size."""
    format: Literal["parquet", "webdataset"]
    device: Literal["cpu", "cuda"]
    threads: int | None
    """Threads of a worker on a CPU, which decide the order of sums; null on a GPU."""
    packages: dict[str, str]
    """Package that decides bits -> version."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.end_seed <= self.first_seed:
            raise ValueError("end_seed is not after first_seed")
        if self.shard_size % self.batch_size:
            raise ValueError("shard_size is not a multiple of batch_size")
        return self

    @property
    def num_images(self) -> int:
        """Number of images of all shards."""
        return self.end_seed - self.first_seed

    @property
    def id(self) -> str:
        """Hash of all that decides the bytes."""
        content = json.dumps(self.model_dump(mode="json", exclude={"model"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def numbers(self) -> range:
        """Return the numbers of the shards."""
        return range(self.first_seed // self.shard_size, -(-self.end_seed // self.shard_size))

    def shards(self, numbers: range | None = None) -> list[Shard]:
        """Return the shards, or those with some numbers."""
        return [self.shard(number) for number in (self.numbers() if numbers is None else numbers)]

    def name(self, shard: Shard) -> str:
        """Name of the file of a shard."""
        return f"shard-{shard.number:05d}{SUFFIXES[self.format]}"

    def shard(self, number: int) -> Shard:
        """Return the shard with a number."""
        begin = number * self.shard_size
        return Shard(number, range(max(begin, self.first_seed), min(begin + self.shard_size, self.end_seed)))


def check_same(found: bytes, job: Job, place: Place) -> None:
    """Check that a place holds this job.

    Raises:
        InputError: It holds another one, or its record is damaged; every value that differs is named.
    """
    try:
        known = Job.model_validate(parse_json(found))
    except (ValueError, ValidationError) as error:
        advice = "choose another --out, or remove it with its shards"
        raise InputError(f"{place.uri}/{JOB} is damaged ({first_line(error)}); {advice}") from None
    if known.id == job.id:
        return
    there, here = (dict(flatten(it.model_dump(mode="json", exclude={"model"}))) for it in (known, job))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    differing = "; ".join(f"{name} is {brief(there.get(name))} there, {brief(here.get(name))} here" for name in names)
    raise InputError(f"{place.uri} holds another job: {differing}; choose another --out, or give the same values")


def read_shard_record(place: Place, shard: Shard) -> ShardRecord | None:
    """Read the record of a finished shard; None if it is not finished.

    Raises:
        InputError: The record is damaged.
    """
    content = place.read(shard.record)
    if content is None:
        return None
    try:
        return ShardRecord.model_validate(parse_json(content))
    except (ValueError, ValidationError) as error:
        found = f"{place.uri}/{shard.record} is damaged ({first_line(error)})"
        raise InputError(f"{found}; remove it, and run the same command again to draw its shard anew") from None


def record_bytes(record: Frozen) -> bytes:
    """Return the JSON of a record."""
    return json_bytes(record.model_dump(mode="json"))


def manifest_bytes(job: Job, records: Sequence[ShardRecord]) -> bytes:
    """Return the JSON of a finished job with all of its shards; equal jobs give equal bytes."""
    shards = [record.model_dump(mode="json") for record in records]
    return json_bytes({"job": job.model_dump(mode="json"), "num_images": job.num_images, "shards": shards})
