"""Remote caches of jobs: what can't be read is a warning and a miss, what is read is lazy, what is written is all."""

import asyncio
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace

import pytest

from actors import workers as workers_module
from actors.job_sessions import JobSessions
from actors.placement import Placement
from actors.remote_caches import RemoteCaches
from actors.session_host import SessionHost
from cluster.cache.runner import CacheManager
from cluster.cache_options import BucketCache, CacheKind, CacheMode, CacheSource, CacheTarget
from cluster.config import Config
from cluster.digest import digest_of
from cluster.errors import AccessDeniedError, ActorLostError, NeedsRemoteProvidersError, UnavailableError
from cluster.fetch.access import AccessControl
from cluster.job import JobId, JobSpec, JobWarning
from cluster.job_result import InlineEntry
from cluster.lease import LeaseId, ref_resource
from cluster.messages import ExportCacheResult, ImportCacheResult, SessionInfo
from cluster.provider import DescHandler
from cluster.ref import RefRecord
from cluster.remote_cache import CacheEntry, ExportCandidate, RemoteCache
from cluster.solver.imported import ImportedKeys
from cluster.solver.values import Exportable, Result
from storage.memory import Memory, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from storage.memory_solver import MemoryKeyStore, MemoryWhereabouts, SolverMemory
from tests.doubles.fetch import FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock
from tests.doubles.workers import FakePresence, FakeWorkers

A, B, C = (layer_of(name.encode()) for name in "ABC")
CACHE, OTHER = handle("cache"), handle("other")
J1, J2 = JobId("j1"), JobId("j2")
K1, K2, K3 = (digest_of(f"key {n}".encode()) for n in range(3))
V1, V2, V3 = (digest_of(f"vertex {n}".encode()) for n in range(3))
LEASE = LeaseId("l1")
FROM = CacheSource(kind=CacheKind.REGISTRY, ref="r.example/cache:1")
FROM_S3 = CacheSource(kind=CacheKind.S3, bucket=BucketCache(bucket="caches", prefix="app", name="main"))
TO = CacheTarget(kind=CacheKind.REGISTRY, ref="r.example/to:1")
TO_ALL = CacheTarget(kind=CacheKind.REGISTRY, ref="r.example/all:1", mode=CacheMode.MAX)
INLINE = CacheTarget(kind=CacheKind.INLINE)

#: K1 is A, K2 is A and B, K3 is an empty filesystem.
HELD = ImportCacheResult(
    cache=RemoteCache.of(
        [
            CacheEntry(keys=(K1,), layers=(A,), config=b"{}"),
            CacheEntry(keys=(K2,), layers=(A, B)),
            CacheEntry(keys=(K3,), layers=()),
        ]
    ),
    handlers=tuple(DescHandler(digest=layer.digest, provider=CACHE) for layer in (A, B)),
)


class Bench:
    def __init__(self, *, max_keys=1000):
        clock = FakeClock()
        memory = Memory(clock)
        self.memory = memory
        self.refs, self.leases = MemoryRefStore(memory), MemoryLeaseStore(memory)
        self.prober = FakeProber()
        self.prober.add(CACHE, A.digest, B.digest, readers={"alice"})
        access = AccessControl(MemoryProofStore(memory), self.prober, proof_ttl_s=100.0)
        self.farm = MemoryKeyStore(SolverMemory(clock))
        self.keys = ImportedKeys(self.farm, max_keys=max_keys)
        self.sessions = JobSessions(SessionHost(), Config(), prefix="sched")
        presence = FakePresence("n0")
        self.workers = FakeWorkers(Placement(presence, MemoryWhereabouts(SolverMemory(clock)), ops_per_node=1))
        self.worker = self.workers.fetch_worker("n0")
        self.told = defaultdict(list)
        self.caches = RemoteCaches(
            keys=self.keys,
            cache=CacheManager(self.refs, access),
            refs=self.refs,
            sessions=self.sessions,
            workers=self.workers,
            tell=self.tell,
            deadline_s=10.0,
        )
        self.stack = ExitStack()

    async def tell(self, job, events):
        self.told[job] += events

    def begin(self, job, *, who="alice", sources=(), targets=(), wanted=(V1,)):
        session = SessionInfo(session_id=f"s-{job}", identities={"r.example": f"{who}@r.example"})
        spec = JobSpec(
            id=job, definition=V1, targets=wanted, session=session, cache_from=tuple(sources), cache_to=tuple(targets)
        )
        self.stack.enter_context(self.sessions.of(spec, []))
        return spec

    async def read(self, job, *sources, **more):
        """Have a job go on that reads *sources*."""
        spec = self.begin(job, sources=sources, **more)
        await self.caches.read(spec)
        return spec

    async def load(self, key, job=J1):
        (record,) = await self.keys.lookup([key])
        return await self.caches.load(record, self.sessions.authorizer([job]), LEASE)

    async def chain(self, *layers):
        """Record a chain of layers that the farm knows; return its refs' IDs, lowest first."""
        records, top = [], None
        for layer in layers:
            top = RefRecord.over(layer, top)
            records.append(top)
        await self.refs.get_or_create(records, {layer.digest: (CACHE,) for layer in layers}, lease_id=LEASE)
        return [record.id for record in records]

    def warnings(self, job=J1):
        assert all(isinstance(event, JobWarning) for event in self.told[job])
        return [event.text for event in self.told[job]]

    def exported(self):
        """Return what was exported, by target."""
        return {request.target: request for request in self.worker.requests("export_cache")}


@pytest.fixture
async def bench(monkeypatch):
    monkeypatch.setattr(workers_module, "RETRY_PAUSE_S", 0)
    bench = Bench()
    await bench.leases.create(LEASE, ttl_s=60.0)
    yield bench
    bench.stack.close()
    await bench.sessions.aclose()


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UnavailableError("registry", "gone"), AccessDeniedError("cache", "r.example", "no")])
async def test_a_cache_that_cant_be_read_is_a_warning_and_a_miss(bench, error):
    """The job goes on, and is told which one and why; another cache is used all the same."""

    async def one_of_two(request):
        if request.source == FROM:
            raise error
        return HELD

    bench.worker.plan("import_cache", one_of_two)
    await bench.read(J1, FROM, FROM_S3)
    (warning,) = bench.warnings()
    assert FROM.name in warning
    assert str(error) in warning
    assert await bench.keys.lookup([K1])


async def test_what_a_worker_warns_of_is_told(bench):
    """There was no cache there: nothing is found, nothing has failed."""
    bench.worker.plan("import_cache", ImportCacheResult(cache=RemoteCache(), warning="nothing is cached there"))
    await bench.read(J1, FROM)
    assert bench.warnings() == ["nothing is cached there"]
    assert await bench.keys.lookup([K1]) == []


async def test_a_worker_that_is_lost_is_no_miss(bench):
    """It is being restarted: the cache is read by another, or by it."""
    bench.worker.plan("import_cache", ActorLostError("worker", "killed"), HELD)
    await bench.read(J1, FROM)
    assert (len(await bench.keys.lookup([K1])), bench.warnings()) == (1, [])


async def test_what_is_too_large_is_left_out_and_told(bench):
    """Memory is bounded over all jobs; what there is room for is used."""
    bench.keys._max_keys = 2
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM)
    (warning,) = bench.warnings()
    assert "1 results of it are not used" in warning
    assert await bench.keys.lookup([K2])


async def test_a_job_without_caches_asks_nobody(bench):
    """And is told nothing."""
    await bench.read(J1)
    assert (bench.worker.calls, bench.warnings()) == ([], [])


async def test_ways_to_imported_layers_are_for_the_jobs_that_imported_them(bench):
    """Several caches' ways to one layer, each once; nothing of other jobs or of other layers."""
    other = ImportCacheResult(cache=HELD.cache, handlers=(DescHandler(digest=A.digest, provider=OTHER),))

    async def by_source(request):
        return HELD if request.source == FROM else other

    bench.worker.plan("import_cache", by_source)
    await bench.read(J1, FROM, FROM_S3)
    await bench.read(J2, FROM)
    found = bench.caches.handlers([J1, J2], [A.digest, C.digest])
    assert {handler.provider for handler in found} == {CACHE, OTHER}
    assert len(found) == 2
    assert [handler.provider for handler in bench.caches.handlers([J2], [A.digest])] == [CACHE]


# -- loading ----------------------------------------------------------------------------------------------------------


async def test_an_imported_result_is_refs_and_no_bytes(bench):
    """Made when it is loaded, and not before; held; and the farm's own from then on, under its keys."""
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM)
    assert bench.memory.records == {}
    (record,) = await bench.keys.lookup([K2])
    assert bench.caches.is_imported(record)
    result = await bench.load(K2)
    states = await bench.refs.chain(result.ref)
    assert [s.record.blob.digest for s in states] == [A.digest, B.digest]
    assert all(s.is_lazy and s.providers == (CACHE,) for s in states)
    assert set((await bench.leases.get(LEASE)).resources) == {ref_resource(s.record.id) for s in states}
    (own,) = await bench.farm.lookup([K2])
    assert own.result == result
    assert not bench.caches.is_imported(own)
    assert await bench.farm.lookup([K1]) == []


async def test_an_imported_result_keeps_its_config_and_may_be_empty(bench):
    """Which has nothing to make."""
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM)
    assert (await bench.load(K1)).config == b"{}"
    assert await bench.load(K3) == Result(ref=None)


async def test_who_loads_proves_its_own_access(bench):
    """What one job imported is found by others, and opens nothing to them."""
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM)
    bench.begin(J2, who="mallory")
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.load(K2, J2)
    assert caught.value.digests == (A.digest, B.digest)
    assert await bench.farm.lookup([K2]) == []


async def test_an_import_ends_with_its_job(bench):
    """Nothing of it is remembered; what was looked up before is gone, and what was loaded is the farm's."""
    bench.worker.plan("import_cache", HELD)
    spec = await bench.read(J1, FROM, targets=[INLINE])
    (record,) = await bench.keys.lookup([K2])
    result = await bench.load(K1)
    await bench.caches.write(J1, [Exportable(vertex=V1, keys=(K1,), result=result)], [], LEASE)
    assert bench.caches.inline(J1, result.ref)
    for _ in range(2):
        bench.caches.forget(J1)
    assert await bench.caches.load(record, bench.sessions.authorizer([J1]), LEASE) is None
    assert [r.result for r in await bench.keys.lookup([K1, K2])] == [result]
    assert bench.caches.handlers([J1], [A.digest]) == ()
    assert bench.caches.inline(J1, result.ref) == ()
    await bench.caches.write(spec.id, [Exportable(vertex=V1, keys=(K1,), result=result)], [], LEASE)
    assert bench.worker.requests("export_cache") == []


# -- writing ----------------------------------------------------------------------------------------------------------


async def test_every_cache_is_written_with_all_that_has_a_result(bench):
    """By their keys, and which of them were asked for; with all ways to their layers, each once."""
    a, ab = await bench.chain(A, B)
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM, targets=[TO, TO_ALL], wanted=(V2,))
    passed = [DescHandler(digest=C.digest, provider=OTHER), HELD.handlers[0]]
    exportables = [
        Exportable(vertex=V1, keys=(K1,), result=Result(ref=a)),
        Exportable(vertex=V2, keys=(K2,), result=Result(ref=ab, config=b"{}")),
        Exportable(vertex=V3, keys=(K3,), result=Result(ref=None)),
    ]
    await bench.caches.write(J1, exportables, passed, LEASE)
    exported = bench.exported()
    assert exported.keys() == {TO, TO_ALL}
    for request in exported.values():
        assert request.candidates == (
            ExportCandidate(keys=(K1,), ref=a),
            ExportCandidate(keys=(K2,), ref=ab, config=b"{}", is_target=True),
            ExportCandidate(keys=(K3,), ref=None),
        )
        assert request.handlers == (*passed, HELD.handlers[1])
        assert request.lease_id == LEASE


async def test_what_nothing_needed_is_written_where_all_is_wanted(bench):
    """A build that was spared a vertex would leave it out of its cache: the farm's result, or an imported one."""
    (a,) = await bench.chain(A)
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM, targets=[TO_ALL], wanted=(V3,))
    await bench.farm.publish([K1], Result(ref=a))
    exportables = [
        Exportable(vertex=V1, keys=(K1,), result=None),
        Exportable(vertex=V2, keys=(K2,), result=None),
        Exportable(vertex=V3, keys=(digest_of(b"unknown"),), result=None),
    ]
    await bench.caches.write(J1, exportables, [], LEASE)
    first, second = bench.exported()[TO_ALL].candidates
    assert first == ExportCandidate(keys=(K1,), ref=a)
    assert [s.record.blob.digest for s in await bench.refs.chain(second.ref)] == [A.digest, B.digest]


async def test_what_nothing_needed_is_not_looked_for_where_little_is_wanted(bench):
    """Only targets and what they consist of are written then."""
    (a,) = await bench.chain(A)
    await bench.farm.publish([K1], Result(ref=a))
    await bench.read(J1, targets=[TO])
    await bench.caches.write(J1, [Exportable(vertex=V2, keys=(K1,), result=None)], [], LEASE)
    assert bench.exported()[TO].candidates == ()


async def test_what_cant_be_passed_on_is_left_out(bench):
    """Imported, and not for this job: the others are written."""
    bench.worker.plan("import_cache", HELD)
    await bench.read(J1, FROM)
    await bench.read(J2, who="mallory", targets=[TO_ALL])
    exportables = [
        Exportable(vertex=V1, keys=(K2,), result=None),
        Exportable(vertex=V2, keys=(K3,), result=Result(ref=None)),
    ]
    await bench.caches.write(J2, exportables, [], LEASE)
    assert [candidate.keys for candidate in bench.exported()[TO_ALL].candidates] == [(K3,)]


async def test_a_cache_that_cant_be_written_fails_the_job(bench):
    """It was asked for; what its worker only warns of is told."""
    bench.worker.plan("export_cache", ExportCacheResult(target=TO.name, digest=None, warning="no room"))
    await bench.read(J1, targets=[TO])
    await bench.caches.write(J1, [], [], LEASE)
    assert bench.warnings() == [f"{TO.name}: no room"]
    bench.worker.plan("export_cache", UnavailableError("registry", "gone"))
    with pytest.raises(UnavailableError):
        await bench.caches.write(J1, [], [], LEASE)


async def test_a_failure_that_is_to_be_ignored_is_a_warning(bench):
    """Also where no worker came to it; the other caches are written."""

    async def one_fails(request):
        if request.target.ignores_error:
            raise UnavailableError("registry", "gone")
        return ExportCacheResult(target=request.target.name, digest=K1)

    bench.worker.plan("export_cache", one_fails)
    ignored = replace(TO, ignores_error=True)
    await bench.read(J1, targets=[ignored, TO_ALL])
    await bench.caches.write(J1, [], [], LEASE)
    (warning,) = bench.warnings()
    assert warning.startswith(f"{TO.name}: ")
    assert "gone" in warning
    assert bench.exported().keys() == {ignored, TO_ALL}


async def test_a_cache_that_cant_be_written_leaves_no_other_behind(bench):
    """The job has failed: nothing is done for it any more when that is known."""
    failing = asyncio.Event()

    async def one_hangs(request):
        if request.target == TO:
            await failing.wait()
            raise UnavailableError("registry", "gone")
        failing.set()
        await asyncio.Event().wait()

    bench.worker.plan("export_cache", one_hangs)
    await bench.read(J1, targets=[TO, TO_ALL])
    with pytest.raises(UnavailableError):
        await bench.caches.write(J1, [], [], LEASE)
    assert len(asyncio.all_tasks()) == 1


async def test_an_inline_cache_says_which_layers_are_which_result(bench):
    """By how many of the target's lowest layers they are; what is no part of it is left out. Nothing is written."""
    a, ab, abc = await bench.chain(A, B, C)
    (c,) = await bench.chain(C)
    await bench.read(J1, targets=[INLINE], wanted=(V3,))
    exportables = [
        Exportable(vertex=V1, keys=(K1,), result=Result(ref=a, config=b"{}")),
        Exportable(vertex=V2, keys=(K2,), result=Result(ref=c)),
        Exportable(vertex=V2, keys=(K2,), result=Result(ref=None)),
        Exportable(vertex=V3, keys=(K3,), result=Result(ref=abc)),
    ]
    await bench.caches.write(J1, exportables, [], LEASE)
    assert bench.caches.inline(J1, abc) == (
        InlineEntry(keys=(K1,), layers=1, config=b"{}"),
        InlineEntry(keys=(K3,), layers=3),
    )
    assert bench.caches.inline(J1, ab) == bench.caches.inline(J2, abc) == ()
    assert bench.worker.calls == []


async def test_a_job_that_writes_no_cache_asks_nobody(bench):
    """Nor one that is unknown here."""
    await bench.read(J1)
    for job in (J1, J2):
        await bench.caches.write(job, [Exportable(vertex=V1, keys=(K1,), result=Result(ref=None))], [], LEASE)
    assert bench.worker.calls == []
