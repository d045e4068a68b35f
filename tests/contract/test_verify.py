"""Verifying: what is told, what is repaired, and where a round goes on. Memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.collect.verify import FaultKind
from cluster.digest import digest_of, hex_of
from cluster.errors import UnavailableError
from cluster.faultpoints import FaultPlan, FaultPoint, armed
from cluster.ref import BlobRecord
from storage.faults import ProcessFaults
from storage.fetching import new_key
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from storage.rounds import go_round
from storage.verifier import Verifier, verify_copies
from tests.doubles.collect import Bench

DATA = {name: name.encode() * 1000 for name in ("right", "damaged", "missing", "unreadable")}
DIGESTS = {name: digest_of(data) for name, data in DATA.items()}


class Bucket(MemoryContentStore):
    """Gives nothing of the keys in *away*; tells *on_open* first."""

    def __init__(self):
        super().__init__()
        self.away = set()
        self.on_open = lambda _key: None

    def open(self, key, offset=0, length=None):
        self.on_open(key)
        if key in self.away:
            raise UnavailableError("memory", "away")
        return super().open(key, offset, length)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def bucket():
    return Bucket()


@pytest.fixture
async def records(stores, bucket):
    """A blob of each kind, present."""
    found = {}
    for name, data in DATA.items():
        owned = await stores.flights.join(f"blob:{DIGESTS[name]}", worker="w", token=name, ttl_s=60.0)
        info = bucket.put(new_key(DIGESTS[name]), data)
        found[name] = BlobRecord(
            digest=DIGESTS[name], key=info.key, size_bytes=len(data), etag=info.etag, fence=owned.fence.number
        )
        await stores.flights.commit(owned.fence, found[name])
    bucket.put(found["damaged"].key, b"other bytes")
    bucket.delete(found["missing"].key)
    bucket.away.add(found["unreadable"].key)
    return found


@pytest.fixture
def verifier(stores, bucket, threads):
    return Verifier(stores.refs, bucket, threads=threads, grace_s=60.0)


async def present(stores):
    found = zip(DIGESTS, await stores.refs.blobs(list(DIGESTS.values())), strict=True)
    return {name for name, blob in found if blob is not None}


async def test_faults_are_told_and_nothing_changes(stores, records, bucket, verifier):
    """Without repair; a blob that is not present is no fault."""
    before = {info.key for info in bucket.objects("")}
    found = await verifier.verify([*DIGESTS.values(), digest_of(b"lazy")], repair=False, bytes_per_s=0)
    assert (found.blobs, found.size_bytes) == (4, sum(map(len, DATA.values())))
    assert {(fault.digest, fault.kind, fault.is_repaired) for fault in found.faults} == {
        (DIGESTS["damaged"], FaultKind.DAMAGED, False),
        (DIGESTS["missing"], FaultKind.MISSING, False),
        (DIGESTS["unreadable"], FaultKind.UNREADABLE, False),
    }
    assert await present(stores) == set(DIGESTS)
    assert {info.key for info in bucket.objects("")} == before


async def test_repair_makes_lazy_and_keeps_the_damaged_bytes(stores, records, bucket, verifier):
    """The object is deleted after the grace, with those of collected blobs; what can't be read is left alone."""
    found = await verifier.verify(list(DIGESTS.values()), repair=True, bytes_per_s=0)
    assert [fault.kind for fault in found.unrepaired] == [FaultKind.UNREADABLE]
    assert await present(stores) == {"right", "unreadable"}
    bench, damaged = Bench(stores), records["damaged"].key
    assert await bench.delete_due() == 0
    stores.pass_time(61.0)
    await bench.delete_due()
    assert damaged in bench.deleted
    (kept,) = bucket.objects(QUARANTINE_PREFIX)
    assert kept.key == QUARANTINE_PREFIX + damaged
    assert {fault.quarantine for fault in found.faults} == {"", kept.key}
    assert (await verifier.verify(list(DIGESTS.values()), repair=True, bytes_per_s=0)).blobs == 2


async def test_a_blob_that_is_fetched_anew_meanwhile_is_no_fault(stores, records, bucket, verifier):
    """A look that ends late judges an object that nothing names any more; the new one stays present."""
    old, loop = records["damaged"], asyncio.get_running_loop()

    async def fetch_anew():
        await stores.refs.mark_absent(old, "found by somebody else")
        owned = await stores.flights.join(f"blob:{old.digest}", worker="w", token="new", ttl_s=60.0)
        info = bucket.put(new_key(old.digest), DATA["damaged"])
        blob = BlobRecord(digest=old.digest, key=info.key, size_bytes=5, etag=info.etag, fence=owned.fence.number)
        await stores.flights.commit(owned.fence, blob)

    def on_open(_key):
        bucket.on_open = lambda _: None
        asyncio.run_coroutine_threadsafe(fetch_anew(), loop).result(10)

    bucket.on_open = on_open
    assert (await verifier.verify([old.digest], repair=True, bytes_per_s=0)).faults == ()
    assert "damaged" in await present(stores)


@pytest.mark.parametrize("point", [FaultPoint.VERIFY_FOUND, FaultPoint.VERIFY_QUARANTINED], ids=str)
async def test_stopped_at_any_step_the_next_one_repairs(stores, records, bucket, verifier, point):
    """The blob is as it was, or lazy; the quarantine has one copy in the end."""
    plan = FaultPlan.parse(f"{point}=error:UnavailableError")
    with armed(plan, ProcessFaults()), pytest.raises(UnavailableError):
        await verifier.verify([DIGESTS["damaged"]], repair=True, bytes_per_s=0)
    assert "damaged" in await present(stores)
    assert not (await verifier.verify([DIGESTS["damaged"]], repair=True, bytes_per_s=0)).unrepaired
    assert "damaged" not in await present(stores)
    assert len(list(bucket.objects(QUARANTINE_PREFIX))) == 1


async def test_a_bit_that_turned_over_on_the_way_is_no_fault(records, bucket, verifier):
    """What reads as damaged is read once more before it is judged."""
    right = records["right"]
    bucket.put(right.key, b"not what it is")

    def once(key):
        bucket.on_open = lambda _: bucket.put(right.key, DATA["right"])

    bucket.on_open = once
    assert (await verifier.verify([right.digest], repair=True, bytes_per_s=0)).faults == ()


async def test_a_cancelled_verification_ends_at_once(records, verifier):
    """Also where it sleeps to keep to its rate: a byte a second."""
    verifying = asyncio.ensure_future(verifier.verify([DIGESTS["right"]], repair=False, bytes_per_s=1.0))
    await asyncio.sleep(0)
    verifying.cancel()
    async with asyncio.timeout(5.0):
        await asyncio.wait({verifying})
    assert verifying.cancelled()


async def test_a_damaged_copy_is_dropped(tmp_path, threads):
    """Nodes' copies: told with the node; what is right stays, what is not there is not counted."""
    cache = NodeCache(tmp_path, 10**9, headroom_bytes=0)
    for name in ("right", "damaged"):
        staging = cache.staging(DIGESTS[name], len(DATA[name]))
        staging.pwrite(0, memoryview(DATA[name]))
        staging.advance(len(DATA[name]))
        staging.publish()
    (tmp_path / "blobs" / hex_of(DIGESTS["damaged"])).write_bytes(b"other bytes")
    found = await verify_copies(cache, list(DIGESTS.values()), node="n7", threads=threads, bytes_per_s=0)
    assert (found.blobs, [(fault.digest, fault.node) for fault in found.faults]) == (2, [(DIGESTS["damaged"], "n7")])
    assert found.unrepaired == ()
    assert [state.digest for state in cache.states()] == [DIGESTS["right"]]


async def test_a_round_goes_on_where_it_was_stopped(stores):
    """Everything is looked at, in order, once but for the batch at the stop; the next round is for when it is due."""
    everything, seen, failing = [f"{n:02}" for n in range(10)], [], {"04"}

    async def names():
        return everything

    async def look(batch):
        seen.extend(batch)
        if failing & set(batch):
            failing.clear()
            raise UnavailableError("memory", "away")

    def go():
        return go_round(stores.collect, "test", every_s=3600.0, names=names, look=look, most=3)

    with pytest.raises(UnavailableError):
        await go()
    assert seen == everything[:6]
    assert await go()
    assert seen == everything[:6] + everything[3:]
    assert not await go()
