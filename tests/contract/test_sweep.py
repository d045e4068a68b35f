"""What is swept from the bucket, and what never is: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from cluster.collect.pace import Pace
from cluster.collect.sweep import NAMELESS, QUARANTINE_S, Suspect
from cluster.errors import UnavailableError
from cluster.faultpoints import FaultPlan, armed
from cluster.flight.values import UploadState
from cluster.lease import LeaseId, object_resource
from cluster.ref import BlobRecord
from storage.bucket_mark import others_in_bucket
from storage.faults import ProcessFaults
from storage.fetching import new_key
from storage.layer_upload import new_key as built_key
from storage.memory_blobs import MemoryContentStore
from storage.sweeper import due_sweep, make_missing_lazy, sweep
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
    current = await due_sweep(bench.stores.collect, every_s=0.0)
    count = await sweep(bench.stores.collect, bucket, current, stray_s=STRAY_S, pace=Pace(0.0))
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


async def test_an_ops_layer_stays_while_its_lease_lives_and_once_it_is_recorded(bench):
    """Nothing but the lease names it before its commit; without either it goes."""
    bucket = MemoryContentStore()
    kept, lost = built_key(), built_key()
    upload_id = bucket.begin_upload(kept)
    await bench.stores.leases.create(LeaseId("op"), ttl_s=10 * STRAY_S)
    await bench.stores.leases.attach(LeaseId("op"), [object_resource(kept), object_resource(lost)])
    bucket.put(lost, b"layer")
    for _ in range(3):
        assert await swept(bench, bucket) == 0
        bench.stores.pass_time(STRAY_S + 1)
    bucket.abort_upload(kept, upload_id)
    bucket.put(kept, b"layer")
    owned = await bench.stores.flights.join(f"blob:{DIGEST}", worker="w", token="t", ttl_s=60.0)
    blob = BlobRecord(digest=DIGEST, key=kept, size_bytes=5, etag="e", fence=owned.fence.number)
    await bench.stores.flights.commit(owned.fence, blob)
    await bench.stores.leases.delete(LeaseId("op"))
    bench.stores.pass_time(STRAY_S + 1)
    assert await swept(bench, bucket) == 0, "seen for the first time since the lease"
    bench.stores.pass_time(STRAY_S + 1)
    assert await swept(bench, bucket) == 1
    assert keys(bucket) == [kept]


async def test_a_commit_that_comes_late_keeps_its_object(bench):
    """Its uploader was paused until the object was to be deleted, and wins: it is deleted no more."""
    bucket, key = MemoryContentStore(), built_key()
    bucket.put(key, b"layer")
    owned = await bench.stores.flights.join(f"blob:{DIGEST}", worker="w", token="t", ttl_s=10 * STRAY_S)
    stray = Suspect(NAMELESS, key)
    assert await bench.stores.collect.strays([stray], stray_s=STRAY_S) == []
    bench.stores.pass_time(STRAY_S + 1)
    assert await bench.stores.collect.strays([stray], stray_s=STRAY_S) == [stray]
    blob = BlobRecord(digest=DIGEST, key=key, size_bytes=5, etag="e", fence=owned.fence.number)
    await bench.stores.flights.commit(owned.fence, blob)
    assert await bench.delete_due() == 0


async def test_probes_go_and_what_is_put_aside_is_kept_for_a_week(bench):
    """What isn't of the farm's making stays, also there."""
    bucket = MemoryContentStore()
    damaged = f"quarantine/{new_key(DIGEST)}"
    for key in (f"doctor/probe-{uuid4().hex}", damaged, "quarantine/mine", "doctor/mine", "blobs/built/mine"):
        bucket.put(key, b"")
    assert await swept(bench, bucket) == 0
    bench.stores.pass_time(STRAY_S + 1)
    assert await swept(bench, bucket) == 1
    bench.stores.pass_time(QUARANTINE_S - STRAY_S - 60)
    assert await swept(bench, bucket) == 0
    assert damaged in keys(bucket)
    bench.stores.pass_time(120.0)
    assert await swept(bench, bucket) == 1
    assert keys(bucket) == ["blobs/built/mine", "doctor/mine", "quarantine/mine"]


async def test_a_sweep_goes_on_where_it_was_stopped(bench, monkeypatch):
    """Stopped in the midst, at the fault point: each key is judged, and none is noted twice in one round."""
    monkeypatch.setattr("storage.sweeper._BATCH", 2)
    bucket = MemoryContentStore()
    for _ in range(7):
        bucket.put(new_key(DIGEST), b"lost")
    await swept(bench, bucket)
    bench.stores.pass_time(STRAY_S + 1)
    with armed(FaultPlan.parse("sweep.judged@2=error:UnavailableError"), ProcessFaults()):
        with pytest.raises(UnavailableError):
            await swept(bench, bucket)
        stopped = await bench.stores.collect.round("sweep")
        assert stopped.after == keys(bucket)[1]
        assert await swept(bench, bucket) == 3, "but for what was judged before the stop"
    assert keys(bucket) == []


async def test_what_is_gone_turns_lazy_and_what_is_there_stays(bench, monkeypatch):
    """A record that names a new object meanwhile stays, whatever was seen of the old one."""
    monkeypatch.setattr("storage.sweeper._SURE_S", 0.0)
    bucket, pace = MemoryContentStore(), Pace(0.0)
    there, gone = layer("there").digest, layer("gone").digest
    for digest in (there, gone):
        await bench.fetch(digest)
    bucket.put((await bench.stores.refs.blobs([there]))[0].key, b"")
    wanted = [there, gone, layer("lazy").digest]
    assert await make_missing_lazy(bench.stores.refs, bucket, wanted, pace=pace) == 1
    assert await bench.is_present(there, gone) == [True, False]
    await bench.fetch(gone)
    (old,) = await bench.stores.refs.blobs([gone])
    head = bucket.head

    def head_late(key):
        if key == old.key:
            asyncio.run_coroutine_threadsafe(fetch_anew(), loop).result(10)
        return head(key)

    async def fetch_anew():
        if await bench.stores.refs.mark_absent(old, "found by somebody else"):
            await bench.fetch(gone)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(bucket, "head", head_late)
    assert await make_missing_lazy(bench.stores.refs, bucket, [gone], pace=pace) == 0
    assert await bench.is_present(gone) == [True]


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
