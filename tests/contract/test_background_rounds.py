"""What actors do of their own accord: scrub, sweep, look for what is missing. On real Redis, in memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from actors import collection, scrubbing
from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.config import CollectConfig, Config, FarmConfig
from cluster.digest import digest_of, hex_of
from cluster.ref import BlobRecord
from storage.fetching import new_key
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from storage.verifier import Verifier

pytestmark = pytest.mark.redis

DATA = [f"layer {n}".encode() for n in range(3)]
DIGESTS = [digest_of(data) for data in DATA]


@pytest.fixture
def stores(redis_farm):
    found = redis_farm.stores()
    return SimpleNamespace(
        link=redis_farm.links[0], refs=found.refs, leases=found.leases, flights=found.flights, audit=found.audit
    )


@pytest.fixture
async def bucket(stores):
    """A bucket with a few blobs that are present."""
    bucket = MemoryContentStore()
    for digest, data in zip(DIGESTS, DATA, strict=True):
        owned = await stores.flights.join(f"blob:{digest}", worker="w", token=digest, ttl_s=60.0)
        info = bucket.put(new_key(digest), data)
        blob = BlobRecord(digest=digest, key=info.key, size_bytes=len(data), etag=info.etag, fence=owned.fence.number)
        await stores.flights.commit(owned.fence, blob)
    return bucket


def config_of(redis_farm, **collect):
    return Config(farm=FarmConfig(name=redis_farm.keys.farm), collect=CollectConfig(**collect))


async def present(stores):
    return [blob is not None for blob in await stores.refs.blobs(DIGESTS)]


async def test_workers_scrub_the_bucket_by_turns_and_each_its_own_disk(
    redis_farm, stores, bucket, tmp_path, monkeypatch
):
    """Damage in the bucket turns a blob lazy, once for all; a damaged copy is dropped; then the round is done."""
    monkeypatch.setattr(scrubbing, "_LOOK_S", 0.01)
    config = config_of(redis_farm)
    (damaged,) = await stores.refs.blobs(DIGESTS[:1])
    bucket.put(damaged.key, b"damaged")
    cache = NodeCache(tmp_path, 10**9, headroom_bytes=0)
    for digest in DIGESTS[1:]:
        (tmp_path / "blobs" / hex_of(digest)).write_bytes(DATA[DIGESTS.index(digest)])
    (tmp_path / "blobs" / hex_of(DIGESTS[1])).write_bytes(b"damaged")
    with ThreadPoolExecutor(4) as threads:
        verifier = Verifier(stores.refs, bucket, threads=threads, grace_s=60.0)
        works = [scrubbing.scrub_forever(stores, config, verifier) for _ in range(2)]
        works.append(scrubbing.scrub_copies_forever(stores, config, cache, node="n0", threads=threads))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            collect = collection.RedisCollectStore(stores.link, redis_farm.keys)
            for work in ("scrub", "scrub:n0"):
                async with asyncio.timeout(20):
                    while (found := await collect.round(work)) is None or not found.is_done:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert await present(stores) == [False, True, True]
    assert [info.key for info in bucket.objects(QUARANTINE_PREFIX)] == [QUARANTINE_PREFIX + damaged.key]
    assert [state.digest for state in cache.states()] == DIGESTS[2:]
    noted = {(entry.operation, entry.outcome, entry.digest, entry.source) async for entry in stores.audit.entries()}
    assert noted == {
        ("absent", "ok", damaged.digest, damaged.key),
        ("verify", "damaged", damaged.digest, QUARANTINE_PREFIX + damaged.key),
        ("verify", "damaged", DIGESTS[1], "n0"),
    }
    # Off: they end at once.
    off = config_of(redis_farm, scrub_bytes_per_s=0)
    await scrubbing.scrub_forever(stores, off, verifier)
    await scrubbing.scrub_copies_forever(stores, off, cache, node="n0", threads=threads)


async def test_what_is_gone_turns_lazy_once_a_day(redis_farm, stores, bucket, monkeypatch):
    """Not before the next round is due; never where that is 0."""
    monkeypatch.setattr("storage.sweeper._SURE_S", 0.0)
    wanted = config_of(redis_farm, requests_per_s=10_000.0)
    work = collection._Collection(stores, wanted, bucket)
    blobs = await stores.refs.blobs(DIGESTS)
    off = config_of(redis_farm, missing_every_s=0.0)
    bucket.delete(blobs[0].key)
    await collection._Collection(stores, off, bucket).look_for_missing()
    assert await present(stores) == [True, True, True]
    await work.look_for_missing()
    assert await present(stores) == [False, True, True]
    bucket.delete(blobs[1].key)
    await work.look_for_missing()
    assert await present(stores) == [False, True, True]
    await stores.link.execute("DEL", redis_farm.keys.round("missing"))
    await work.look_for_missing()
    assert await present(stores) == [False, False, True]


async def test_a_bucket_with_another_farms_mark_is_not_swept(redis_farm, stores, bucket):
    """However long a stray is there; once the mark is gone it is swept when its time has come."""
    work = collection._Collection(stores, config_of(redis_farm, requests_per_s=10_000.0), bucket)
    stray = new_key(DIGESTS[0])
    bucket.put(stray, b"stray")
    bucket.put("farms/other-0123", b"")

    async def sweep_later():
        await stores.link.execute("DEL", redis_farm.keys.round("sweep"))
        await work.sweep()
        await work.collect()
        redis_farm.pass_time(3601.0)

    for _ in range(3):
        await sweep_later()
    assert bucket.head(stray) is not None
    bucket.delete("farms/other-0123")
    await sweep_later()
    assert bucket.head(stray) is not None
    await sweep_later()
    assert bucket.head(stray) is None
