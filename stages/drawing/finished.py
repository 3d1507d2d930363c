"""A place -> the finished shards of a job, each compared with its hash, and the manifest of a complete job."""

from concurrent.futures import ThreadPoolExecutor

import click

from stages.drawing.job import JOB, MANIFEST, Job, Shard, ShardRecord, check_same, manifest_bytes, read_shard_record
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.storage.places import FolderPlace, Place

READERS = 8
"""Records that are read at once; a server takes longer to answer than to send one."""


def find_finished(place: Place, job: Job, *, only_check: bool = False) -> dict[int, ShardRecord]:
    """Find the finished shards of a job; a shard whose file is gone is made unfinished.

    Their hashes are compared in a folder, and in a bucket, where that means a download, their sizes.

    Args:
        place: Where the shards are.
        job: The job.
        only_check: Compare the hashes in a bucket, too, and change nothing.

    Raises:
        InputError: The place holds another job or files of others, or a finished shard is damaged or, while nothing is
            changed, gone.
    """
    names = place.sizes()  # before the second listing below: a shard is written before its record
    content = place.read(JOB)
    if content is None:
        if names:
            raise InputError(f"{place.uri} holds files that no draw wrote; move them away or choose another --out")
        if only_check:
            raise InputError(f"{place.uri} holds no job; correct --out, or leave --check out to draw")
        return {}
    check_same(content, job, place)
    shards = [shard for shard in job.shards() if shard.record in names]
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(lambda shard: read_shard_record(place, shard), shards))
    found = {shard.number: record for shard, record in zip(shards, records, strict=True) if record}
    sizes = place.sizes()
    is_hashed = only_check or isinstance(place, FolderPlace)
    present = [number for number, record in found.items() if record.name in sizes]
    for number in track(present, f"check {place.uri}, shard", len(present)) if is_hashed else present:
        _check(place, found[number], sizes[found[number].name], is_hashed=is_hashed)
    for number in found.keys() - set(present):
        _forget(place, job.shard(number), found[number], only_check=only_check)
    return {number: found[number] for number in present}


def _check(place: Place, record: ShardRecord, size_bytes: int, *, is_hashed: bool) -> None:
    """Compare a shard with its record.

    Raises:
        InputError: They differ.
    """
    found, expected = f"{size_bytes} bytes", f"{record.size_bytes}"
    if size_bytes == record.size_bytes:
        if not is_hashed or (sha256 := place.sha256(record.name)) == record.sha256:
            return
        found, expected = f"sha256 {sha256[:12]}…", f"{record.sha256[:12]}…"
    advice = "remove this file, and run the same command again to draw it anew"
    raise InputError(f"{place.uri}/{record.name} is damaged: it has {found}, expected {expected}; {advice}")


def _forget(place: Place, shard: Shard, record: ShardRecord, *, only_check: bool) -> None:
    if only_check:
        raise InputError(f"{place.uri}/{record.name} is gone; run the same command without --check to draw it anew")
    click.echo(f"{record.name} is gone, and is drawn anew", err=True)
    place.remove(shard.record)


def write_manifest(place: Place, job: Job) -> bytes | None:
    """Write the manifest if every shard of the job is finished, and return it; None if one is not."""
    names, shards = place.sizes(), job.shards()
    if not all(shard.record in names for shard in shards):
        return None
    with ThreadPoolExecutor(READERS) as pool:
        records = [record for record in pool.map(lambda shard: read_shard_record(place, shard), shards) if record]
    if len(records) < len(shards):
        return None
    content = manifest_bytes(job, records)
    with place.claim(MANIFEST) as is_own:
        if is_own and place.read(MANIFEST) != content:  # else another call of the job writes the same
            place.write(MANIFEST, content)
    return content
