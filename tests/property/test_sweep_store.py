"""Whatever is killed wherever: in the end the bucket has what the records name, whole, and nothing else.

Uploads that come through and uploads that don't, objects that get lost and damaged, and repair, sweep, collection and
looks for what is missing, each of which may be killed at any of its fault points.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.collect.pace import Pace
from cluster.collect.sweep import QUARANTINE_PREFIX, QUARANTINE_S
from cluster.digest import digest_of
from cluster.errors import UnavailableError
from cluster.faultpoints import FaultPlan, FaultPoint, armed
from cluster.lease import LeaseId, blob_resource, object_resource
from cluster.ref import BlobRecord
from storage import sweeper
from storage.faults import ProcessFaults
from storage.fetching import new_key
from storage.layer_upload import new_key as built_key
from storage.memory import Memory
from storage.memory_blobs import MemoryContentStore
from storage.rounds import go_round
from storage.sweeper import due_sweep, make_missing_lazy, sweep
from storage.verifier import Verifier
from tests.doubles.collect import GRACE_S, Bench
from tests.doubles.stores import FakeClock, memory_stores

STRAY_S = 3600.0
DATA = [f"layer {n}".encode() for n in range(3)]
DIGESTS = [digest_of(data) for data in DATA]
POINTS = [
    FaultPoint.SWEEP_JUDGED,
    FaultPoint.VERIFY_FOUND,
    FaultPoint.VERIFY_QUARANTINED,
    FaultPoint.COLLECT_OBJECT_DELETED,
]

UPLOADS = ["fetch", "begin", "end", "kill", "upload", "damage", "lose", "unuse"]
ROUNDS = ["sweep", "repair", "missing", "collect", "hours"]
PASSES_S = [1.0, GRACE_S + 1, STRAY_S / 2, STRAY_S + 1, QUARANTINE_S]
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(UPLOADS), st.sampled_from(range(3))),
        st.tuples(st.sampled_from(ROUNDS), st.none() | st.sampled_from(POINTS)),
        st.tuples(st.just("pass"), st.sampled_from(PASSES_S)),
    ),
    min_size=8,
    max_size=30,
)


class World:
    """A farm in memory."""

    def __init__(self, threads):
        clock = FakeClock()
        self.memory = Memory(clock)
        self.bench = Bench(memory_stores(self.memory, clock))
        self.stores = self.bench.stores
        self.bucket = MemoryContentStore()
        self.verifier = Verifier(self.stores.refs, self.bucket, threads=threads, grace_s=GRACE_S)
        self.count = 0
        #: Objects of ops that are under way.
        self.ops = {}

    async def commit(self, n, info):
        self.count += 1
        owned = await self.stores.flights.join(f"blob:{DIGESTS[n]}", worker="w", token=f"t{self.count}", ttl_s=60.0)
        if not hasattr(owned, "fence"):
            return  # it is present
        blob = BlobRecord(
            digest=DIGESTS[n], key=info.key, size_bytes=len(DATA[n]), etag=info.etag, fence=owned.fence.number
        )
        await self.stores.leases.create(LeaseId("user"), ttl_s=None)
        await self.stores.leases.attach(LeaseId("user"), [blob_resource(DIGESTS[n])])
        await self.stores.flights.commit(owned.fence, blob)

    async def fetch(self, n):
        """Fetch a layer; a loser's object is left behind."""
        await self.commit(n, self.bucket.put(new_key(DIGESTS[n]), DATA[n]))

    async def begin(self, n):
        """Upload an op's layer, held by the op's lease."""
        if n not in self.ops:
            key = built_key()
            await self.stores.leases.create(LeaseId(f"op-{n}"), ttl_s=None)
            await self.stores.leases.attach(LeaseId(f"op-{n}"), [object_resource(key)])
            self.ops[n] = self.bucket.put(key, DATA[n])

    async def end(self, n):
        """Commit an op's layer."""
        if n in self.ops:
            await self.commit(n, self.ops[n])
            await self.kill(n)

    async def kill(self, n):
        """Kill an op: its lease lapses."""
        if self.ops.pop(n, None) is not None:
            await self.stores.leases.delete(LeaseId(f"op-{n}"))

    async def upload(self, n):
        """Upload and be killed: an object without a record, and an upload that nobody ends."""
        self.bucket.put(new_key(DIGESTS[n]), DATA[n])
        self.bucket.begin_upload(built_key())

    async def damage(self, n):
        if (blob := self.memory.blobs.get(DIGESTS[n])) is not None and self.bucket.head(blob.key) is not None:
            self.bucket.put(blob.key, b"damaged")

    async def lose(self, n):
        if (blob := self.memory.blobs.get(DIGESTS[n])) is not None:
            self.bucket.delete(blob.key)

    async def unuse(self, _n):
        await self.stores.leases.delete(LeaseId("user"))

    async def sweep(self):
        current = await due_sweep(self.stores.collect, every_s=0.0)
        await sweep(self.stores.collect, self.bucket, current, stray_s=STRAY_S, pace=Pace(0.0))

    async def repair(self):
        await self.verifier.verify(DIGESTS, repair=True, bytes_per_s=0)

    async def missing(self):
        async def names():
            return DIGESTS

        async def look(digests):
            await make_missing_lazy(self.stores.refs, self.bucket, digests, pace=Pace(0.0))

        await go_round(self.stores.collect, "missing", every_s=0.0, names=names, look=look, most=1)

    async def collect(self):
        await self.bench.collector._store.condemn(DIGESTS, grace_s=GRACE_S)

        async def delete(key):
            named = {one.key for one in (*self.memory.blobs.values(), *self.ops.values())}
            assert key not in named, f"{key} is named, and deleted"
            self.bucket.delete(key)

        await self.bench.collector.delete_due(delete)

    async def hours(self):
        """Let as much time pass as it takes until a stray is gone."""
        await self.sweep()
        self.stores.pass_time(STRAY_S + 1)
        await self.sweep()
        await self.collect()

    async def run(self, step, value):
        if step == "pass":
            self.stores.pass_time(value)
        elif step in ROUNDS:
            plan = None if value is None else FaultPlan.parse(f"{value}=error:UnavailableError")
            with nullcontext() if plan is None else armed(plan, ProcessFaults()):
                try:
                    await getattr(self, step)()
                except UnavailableError:
                    assert plan is not None
        else:
            await getattr(self, step)(value)

    async def settle(self):
        """Let everybody go on, undisturbed, for long enough."""
        for n in range(len(DATA)):
            await self.kill(n)
        for _ in range(3):
            for seconds in (60.0, STRAY_S + 1, QUARANTINE_S):
                self.stores.pass_time(seconds)
                for work in (self.repair, self.missing, self.sweep):
                    await work()
                self.stores.pass_time(GRACE_S + 1)
                await self.collect()

    def check(self):
        named = {blob.key: blob for blob in self.memory.blobs.values()}
        there = {info.key for info in self.bucket.objects("")}
        assert there == set(named)
        assert not [key for key in there if key.startswith(QUARANTINE_PREFIX)]
        assert self.bucket.list_uploads("") == []
        for key, blob in named.items():
            with self.bucket.open(key) as stream:
                buffer = memoryview(bytearray(100))
                assert digest_of(bytes(buffer[: stream.readinto(buffer)])) == blob.digest


@given(steps)
@settings(deadline=None, max_examples=150)
def test_in_the_end_the_bucket_is_what_the_records_name(found):
    """And on the way, nothing is deleted that a record names, or an op that is under way has uploaded."""

    async def run():
        world = World(threads)
        for step, value in found:
            await world.run(step, value)
        await world.settle()
        world.check()

    sure_s, sweeper._SURE_S = sweeper._SURE_S, 0.0
    try:
        with ThreadPoolExecutor(1) as threads:
            asyncio.run(run())
    finally:
        sweeper._SURE_S = sure_s
