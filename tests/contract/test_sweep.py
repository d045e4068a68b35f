"""What is swept from the bucket, and what never is: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import pytest

from cluster.flight.values import UploadState
from cluster.ref import BlobRecord
from storage.bucket_mark import others_in_bucket
from storage.fetching import new_key
from storage.memory_blobs import MemoryContentStore
from storage.sweeper import sweep
from tests.doubles.collect import Bench, layer
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import RedisFarm

STRAY_S = 3600.0
DIGEST = layer("a").digest


@pytest.fixture
def bench(stores):
    return Bench(stores)


async def swept(bench, bucket):
    """Sweep, delete what is due, and return how many strays there were."""
    count = await sweep(bench.stores.collect, bucket, stray_s=STRAY_S)
    await bench.delete_due()
    for key in bench.deleted:
        bucket.delete(key)
    return count


def keys(bucket):
    return [found.key for found in bucket.objects("")]


async def test_a_stray_goes_after_its_grace_and_not_before(bench):
    """An object and an upload that nothing names; what isn't of the farm's making stays."""
    bucket = MemoryContentStore()
    bucket.put(new_key(DIGEST), b"lost commit")
    bucket.put("blobs/sha256/mine", b"a user's")
    bucket.begin_upload(new_key(DIGEST))
    assert await swept(bench, bucket) == 0
    bench.stores.pass_time(STRAY_S - 60)
    assert await swept(bench, bucket) == 0
    assert len(keys(bucket)) == 2
    bench.stores.pass_time(120.0)
    assert await swept(bench, bucket) == 2
    assert keys(bucket) == ["blobs/sha256/mine"]
    assert bucket.list_uploads("") == []


async def test_what_a_record_or_a_live_flight_names_stays(bench):
    """A live flight spares every key of its digest; afterwards, the committed one alone is kept."""
    bucket = MemoryContentStore()
    won, lost = new_key(DIGEST), new_key(DIGEST)
    for key in (won, lost):
        bucket.put(key, b"layer")
    assert await swept(bench, bucket) == 0
    bench.stores.pass_time(STRAY_S + 1)
    owned = await bench.stores.flights.join(f"blob:{DIGEST}", worker="w", token="t", ttl_s=60.0)
    assert await swept(bench, bucket) == 0
    blob = BlobRecord(digest=DIGEST, key=won, size_bytes=5, etag="e", fence=owned.fence.number)
    await bench.stores.flights.commit(owned.fence, blob)
    assert await swept(bench, bucket) == 0, "seen for the first time since the flight"
    bench.stores.pass_time(STRAY_S + 1)
    assert await swept(bench, bucket) == 1
    assert keys(bucket) == [won]


async def test_an_upload_that_can_be_resumed_stays(bench):
    """Its owner is dead; the next one goes on with its parts. Another upload of that digest is a stray."""
    bucket = MemoryContentStore()
    key, other = new_key(DIGEST), new_key(DIGEST)
    upload_id = bucket.begin_upload(key)
    bucket.begin_upload(other)
    owned = await bench.stores.flights.join(f"blob:{DIGEST}", worker="w", token="t", ttl_s=60.0)
    upload = UploadState(key=key, upload_id=upload_id, part_bytes=5, parts={})
    await bench.stores.flights.begin_upload(owned.fence, upload)
    bench.stores.pass_time(61.0)
    assert await swept(bench, bucket) == 0
    bench.stores.pass_time(STRAY_S + 1)
    assert await swept(bench, bucket) == 1
    assert bucket.list_uploads("") == [(key, upload_id)]


@pytest.mark.redis
async def test_farms_of_one_bucket_know_of_each_other(redis_servers):
    """Each leaves one mark, however often it looks; two of one name with records of their own are two."""
    bucket = MemoryContentStore()
    one, two = (RedisFarm(redis_servers(next(iter(redis_binaries()))).config) for _ in range(2))
    one.stores(), two.stores()
    try:
        assert await others_in_bucket(one.links[0], one.keys, bucket) == []
        assert await others_in_bucket(one.links[0], one.keys, bucket) == []
        (mark,) = keys(bucket)
        assert await others_in_bucket(two.links[0], two.keys, bucket) == [mark]
        assert len(await others_in_bucket(one.links[0], one.keys, bucket)) == 1
        await one.links[0].execute("DEL", one.keys.mark)
        assert len(await others_in_bucket(one.links[0], one.keys, bucket)) == 2, "the mark of lost records stands"
    finally:
        await one.close()
        await two.close()
