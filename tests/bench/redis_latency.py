"""What flights and lookups cost, in Redis's own round trips of the same run."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.flight.values import Committed, FlightEvent, Owned
from cluster.lease import LeaseId
from cluster.ref import BlobRecord, RefId, RefRecord
from storage.connect import connect
from storage.flights import RedisFlightStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.refs import RedisRefStore
from tests.bench.ratio import Ratio, percentile
from tests.doubles.redis import redis_binaries, redis_server

_ROUNDS = 2000
_REFS = 5000
_BULK = 500
_TTL_S = 10.0
_WAKE_DEADLINE_S = 10.0


def measure() -> list[Ratio]:
    """Measure against a redis-server as `lazyfarm up` starts it: append-only, synced every second."""
    binary = next(iter(redis_binaries().values()))
    with redis_server(binary, "--appendonly", "yes") as server:
        return asyncio.run(_measure(lambda: connect(server.config)))


async def _measure(new_link: Callable[[], RedisLink]) -> list[Ratio]:
    async with AsyncExitStack() as stack:

        def link() -> RedisLink:
            made = new_link()
            stack.push_async_callback(made.close)
            return made

        keys = Keys("bench")
        # The collector's pauses are the interpreter's, not Redis's.
        gc.collect()
        gc.disable()
        try:
            return [*await _flights(link(), link(), keys), await _lookups(link(), keys)]
        finally:
            gc.enable()


async def _flights(owner_link: RedisLink, waiter_link: RedisLink, keys: Keys) -> list[Ratio]:
    owner, waiter = RedisFlightStore(owner_link, keys), RedisFlightStore(waiter_link, keys)
    trips, acquires, wakes = [], [], []
    for i in range(_ROUNDS):
        digest = digest_of(f"flight {i}".encode())
        key = f"blob:{digest}"
        # In turn with what is measured by it: a connection that is used without a pause is twice as fast.
        began = time.perf_counter()
        await owner_link.execute("PING", may_repeat=True)
        trips.append(time.perf_counter() - began)
        began = time.perf_counter()
        owned = await owner.join(key, worker="owner", token=f"o{i}", ttl_s=_TTL_S)
        acquires.append(time.perf_counter() - began)
        assert isinstance(owned, Owned)
        async with waiter.events(key) as events:
            await waiter.join(key, worker="waiter", token=f"w{i}", ttl_s=_TTL_S)
            woken = asyncio.create_task(_committed_at(events))
            await asyncio.sleep(0)
            blob = BlobRecord(digest=digest, key=f"blobs/{digest}/n", size_bytes=1, etag="e", fence=owned.fence.number)
            began = time.perf_counter()
            await owner.commit(owned.fence, blob)
            wakes.append(await asyncio.wait_for(woken, _WAKE_DEADLINE_S) - began)
    acquire_s, wake_s = percentile(acquires, 50), percentile(wakes, 99)
    round_trip_s = percentile(trips, 50)
    shown = f"round trip p50 {round_trip_s * 1e3:.3f}, p99 {percentile(trips, 99) * 1e3:.3f} ms"
    return [
        Ratio(
            name="flight_acquire_p50_in_round_trips",
            value=acquire_s / round_trip_s,
            target=3.0,
            detail=f"{acquire_s * 1e3:.3f} ms, {shown}",
        ),
        Ratio(
            name="flight_wake_p99_in_round_trips",
            value=wake_s / round_trip_s,
            target=10.0,
            detail=f"{wake_s * 1e3:.3f} ms from the commit's start, {shown}",
        ),
    ]


async def _committed_at(events: AsyncIterator[FlightEvent]) -> float:
    async for event in events:
        if isinstance(event, Committed):
            return time.perf_counter()
    raise AssertionError("the events ended before the commit")


async def _lookups(link: RedisLink, keys: Keys) -> Ratio:
    leases, refs = RedisLeaseStore(link, keys), RedisRefStore(link, keys)
    lease = LeaseId("bench")
    await leases.create(lease, ttl_s=600)
    ids: list[RefId] = []
    for start in range(0, _REFS, _BULK):
        records = [RefRecord.over(_layer(n), None, "registry.example/bench:1") for n in range(start, start + _BULK)]
        ids += [state.record.id for state in await refs.get_or_create(records, {}, lease_id=lease)]

    async def best(look: Callable[[list[RefId]], Awaitable[object]]) -> float:
        rates = []
        for _ in range(5):
            began = time.perf_counter()
            for start in range(0, _REFS, _BULK):
                await look(ids[start : start + _BULK])
            rates.append(_REFS / (time.perf_counter() - began))
        return max(rates)

    raw = await best(lambda part: link.execute("MGET", *[keys.ref(i) for i in part], may_repeat=True))
    bare = await best(refs.records)
    full = await best(refs.get)
    return Ratio(
        name="ref_lookups_over_raw_mget",
        value=bare / raw,
        target=0.3,
        side="at least",
        detail=f"{bare:,.0f}/s of MGET's {raw:,.0f}/s, {_BULK} a call; with presence and providers {full:,.0f}/s",
    )


def _layer(number: int) -> Descriptor:
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(f"blob {number}".encode()),
        size_bytes=20_000_000,
        diff_id=digest_of(f"diff {number}".encode()),
    )
