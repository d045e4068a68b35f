"""What flights and lookups cost, in Redis's own round trips of the same run, and what a ref takes of its memory."""

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
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord
from storage.connect import connect
from storage.flights import RedisFlightStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.refs import BLOB, PROVIDER, RedisRefStore
from tests.bench.ratio import Ratio, percentile
from tests.doubles.redis import redis_binaries, redis_server

_ROUNDS = 2000
_REFS = 5000
_BULK = 500
_REPEATS = 5
_MEMORY_REFS = 10_000
_CHAIN = 10
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
            memory = await _memory(link())
            return [*memory, *await _flights(link(), link(), keys), await _lookups(link(), keys)]
        finally:
            gc.enable()


async def _memory(link: RedisLink) -> list[Ratio]:
    """Measure what Redis keeps of a ref: images of ten layers, each with its provider, held by one lease."""
    keys = Keys("bench-memory")
    leases, refs, lease = RedisLeaseStore(link, keys), RedisRefStore(link, keys), LeaseId("bench")
    await leases.create(lease, ttl_s=600)
    provider = ProviderHandle(registry="registry.example", repository="team/bench")
    blank_bytes = await _used_bytes(link)
    blobs: list[Descriptor] = []
    for top in range(0, _MEMORY_REFS, _CHAIN):
        name, records = f"registry.example/team/bench:{top}", list[RefRecord]()
        for number in range(top, top + _CHAIN):
            records.append(RefRecord.over(_layer(number), records[-1] if records else None, name))
        layers = [record.blob for record in records]
        blobs += layers
        await refs.get_or_create(records, {layer.digest: [provider] for layer in layers}, lease_id=lease)
        image = ImageRecord(
            name=name,
            manifest=_layer(-top - 1),
            config=_layer(-top - 2),
            platform="linux/amd64",
            layers=tuple(layers),
            ref=records[-1].id,
        )
        await refs.put_image(image, lease_id=lease)
    lazy_bytes = await _used_bytes(link)
    flights = RedisFlightStore(link, keys)
    for number, layer in enumerate(blobs):
        owned = await flights.join(f"blob:{layer.digest}", worker="owner", token=f"t{number}", ttl_s=_TTL_S)
        assert isinstance(owned, Owned)
        key = f"blobs/sha256/{layer.digest}/{number:032x}"
        await flights.commit(
            owned.fence,
            BlobRecord(digest=layer.digest, key=key, size_bytes=layer.size_bytes, etag="e", fence=owned.fence.number),
        )
    present_bytes = await _used_bytes(link)
    told = f"of Redis, {_MEMORY_REFS:,} refs in images of {_CHAIN} layers, with provider and lease"
    return [
        Ratio(
            name="redis_bytes_a_lazy_ref",
            value=(lazy_bytes - blank_bytes) / _MEMORY_REFS,
            target=5000,
            detail=told,
        ),
        Ratio(
            name="redis_bytes_a_present_ref",
            value=(present_bytes - blank_bytes) / _MEMORY_REFS,
            target=8000,
            detail=f"{told}; just committed, so the flights' own leases are among them",
        ),
    ]


async def _used_bytes(link: RedisLink) -> int:
    info: bytes = await link.execute("INFO", "memory", may_repeat=True)
    return int(next(line for line in info.splitlines() if line.startswith(b"used_memory:")).partition(b":")[2])


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
    """Measure lookups of refs, with presence and providers, against raw MGETs of as many keys as they read.

    Half of the refs' blobs are present, and each digest has a provider. A set can't be read by MGET, so
    copies of the sets' members stand for them: the raw side reads as many keys with as many bytes.
    """
    leases, refs = RedisLeaseStore(link, keys), RedisRefStore(link, keys)
    lease = LeaseId("bench")
    await leases.create(lease, ttl_s=600)
    provider = ProviderHandle(registry="registry.example", repository="team/bench")
    ids: list[RefId] = []
    raw_keys: list[list[str]] = []
    for start in range(0, _REFS, _BULK):
        records = [RefRecord.over(_layer(n), None, "registry.example/bench:1") for n in range(start, start + _BULK)]
        digests = [record.blob.digest for record in records]
        states = await refs.get_or_create(records, {d: [provider] for d in digests}, lease_id=lease)
        ids += [state.record.id for state in states]
        present = [
            BlobRecord(digest=digest, key=f"blobs/sha256/{digest}/nonce", size_bytes=20_000_000, etag="e", fence=1)
            for digest in digests[::2]
        ]
        packed = [("SET", keys.blob(blob.digest), BLOB.encode(blob)) for blob in present]
        packed += [("SET", f"{keys.prefix}:copy:{digest}", PROVIDER.encode(provider)) for digest in digests]
        await link.execute_many(packed, may_repeat=True)
        raw_keys.append(
            [
                *(keys.ref(state.record.id) for state in states),
                *(keys.blob(digest) for digest in digests),
                *(f"{keys.prefix}:copy:{digest}" for digest in digests),
            ]
        )

    async def look_up() -> None:
        for start in range(0, _REFS, _BULK):
            found = await refs.get(ids[start : start + _BULK])
            assert found[0] is not None
            assert found[0].present is not None
            assert len(found[0].providers) == 1

    async def read_raw() -> None:
        for batch in raw_keys:
            # As large a command as a lookup's: MGETs of a thousand keys, all sent at once.
            commands = [("MGET", *batch[start : start + 1000]) for start in range(0, len(batch), 1000)]
            await link.execute_many(commands, may_repeat=True)

    async def rate(work: Callable[[], Awaitable[None]]) -> float:
        began = time.perf_counter()
        await work()
        return _REFS / (time.perf_counter() - began)

    ours, raw = 0.0, 0.0
    for _ in range(_REPEATS):  # in turn, so that a busy moment of the machine meets both
        ours, raw = max(ours, await rate(look_up)), max(raw, await rate(read_raw))
    return Ratio(
        name="ref_lookups_over_raw_mget",
        value=ours / raw,
        target=0.3,
        side="at least",
        detail=(
            f"{ours:,.0f} refs/s, decoded, with presence and providers, of {raw:,.0f}/s "
            f"for raw MGETs of the same three keys a ref, undecoded; {_BULK} refs a call"
        ),
    )


def _layer(number: int) -> Descriptor:
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(f"blob {number}".encode()),
        size_bytes=20_000_000,
        diff_id=digest_of(f"diff {number}".encode()),
    )
