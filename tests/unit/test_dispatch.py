"""Ops by who does them: images and merges stay lazy; all others run once for the farm, and survive their workers."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from actors import dispatch as dispatch_module
from actors import workers as workers_module
from actors.boot import Stores
from actors.dispatch import OpDispatcher, job_lease
from actors.holds import Holds
from actors.job_sessions import JobSessions
from actors.placement import Placement
from actors.remote_caches import RemoteCaches
from actors.session_host import SessionHost
from cluster.cache.runner import CacheManager
from cluster.config import Config, FlightConfig
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    ActorLostError,
    BlobNotFoundError,
    ContainerError,
    InternalError,
    MissingSecretError,
    NeedsRemoteProvidersError,
    NodeDiskError,
    ProcessFailedError,
    SessionGoneError,
    UnavailableError,
)
from cluster.fetch.access import AccessControl
from cluster.graph import (
    BindMount,
    CopyAction,
    DiffOp,
    FileOp,
    ImageOp,
    LocalOp,
    MergeOp,
    RunOp,
    Vertex,
    decode_vertex,
    op_digest,
)
from cluster.job import JobId, JobSpec, layer_stream
from cluster.lease import LeaseId, ref_resource
from cluster.messages import ExtractResult, ResolveResult, SessionInfo
from cluster.op_messages import RunOpResult
from cluster.origin import MAX_ORIGINS, OPEN, Needed, decode_origin, encode_origin
from cluster.provider import FARM, DescHandler
from cluster.ref import BlobRecord, ImageRecord, RefRecord
from cluster.solver.imported import ImportedKeys
from cluster.solver.values import CacheRecord, Result
from cluster.wire import decode, encode
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from storage.memory_solver import MemoryKeyStore, MemoryWhereabouts, SolverMemory
from tests.doubles.fetch import FakeAuthorizer, FakeProber, ManualRenewer, handle, layer_of
from tests.doubles.stores import FakeClock, eventually
from tests.doubles.workers import FakePresence, FakeUse, FakeWorkers

A, B, C, D = (layer_of(name.encode()) for name in "ABCD")
MADE = layer_of(b"made by a command")
APP, OTHER = handle("app"), handle("other")
J1, J2 = JobId("j1"), JobId("j2")
K1, K2 = (digest_of(f"key {n}".encode()) for n in range(2))
CONFIG = b'{"config":{}}'

IMAGE = Vertex(ImageOp(reference="r.example/app:1@" + digest_of(b"manifest")))
RUN = Vertex(RunOp(args=("make",)), (IMAGE.digest,))
MERGE = Vertex(MergeOp(), (IMAGE.digest, RUN.digest))
DIFF = Vertex(DiffOp(), (IMAGE.digest, RUN.digest))


class Bench:
    """A dispatcher over stores and workers in memory."""

    def __init__(self):
        self.config = Config(flight=FlightConfig(poll_s=0.01))
        self.clock = FakeClock()
        self.memory, self.solver_memory = Memory(self.clock), SolverMemory(self.clock)
        self.refs, self.leases = MemoryRefStore(self.memory), MemoryLeaseStore(self.memory)
        self.flights = MemoryFlightStore(self.memory)
        self.renewer = ManualRenewer(self.flights)
        self.prober = FakeProber()
        for provider in (APP, OTHER):
            self.prober.add(provider, *(layer.digest for layer in (A, B, C, D)), readers={"alice"})
        self.access = AccessControl(MemoryProofStore(self.memory), self.prober, proof_ttl_s=100.0)
        self.presence = FakePresence("n0", "n1", "n2")
        self.stores = Stores(
            link=None,
            refs=self.refs,
            leases=self.leases,
            flights=self.flights,
            proofs=None,
            limiter=None,
            traffic=None,
            audit=None,
            progress=None,
            presence=self.presence,
            whereabouts=MemoryWhereabouts(self.solver_memory),
            registry=None,
            buckets=None,
            access=self.access,
            cache=CacheManager(self.refs, self.access),
        )
        self.keys = ImportedKeys(MemoryKeyStore(self.solver_memory))
        self.host = SessionHost()
        self.sessions = JobSessions(self.host, self.config, prefix="sched")
        self.holds = Holds(self.leases, prefix="hold", ttl_s=60.0)
        self.placement = Placement(self.presence, self.stores.whereabouts, ops_per_node=4)
        self.workers = FakeWorkers(self.placement)
        self.caches = RemoteCaches(
            keys=self.keys,
            cache=self.stores.cache,
            refs=self.refs,
            sessions=self.sessions,
            workers=self.workers,
            tell=None,
            deadline_s=10.0,
        )
        #: Cache opts that vertices published, by job.
        self.opts = {}
        self.dispatcher = self.new_dispatcher("s0/1")

    def new_dispatcher(self, name):
        return OpDispatcher(
            name=name,
            config=self.config,
            stores=self.stores,
            keys=self.keys,
            sessions=self.sessions,
            holds=self.holds,
            renewer=self.renewer,
            placement=self.placement,
            workers=self.workers,
            caches=self.caches,
            published=lambda job, _vertex, wanted: {
                opt: payload for opt, payload in self.opts.get(job, {}).items() if opt in wanted
            },
        )

    @asynccontextmanager
    async def jobs(self, *jobs, who="alice"):
        """Have jobs go on."""
        async with asyncio.timeout(30):
            names = {"r.example": f"{who}@r.example"}
            stack = []
            for job in jobs:
                session = SessionInfo(session_id=f"session-{job}", identities=names)
                spec = JobSpec(id=job, definition=K1, targets=(K1,), session=session)
                stack.append(self.sessions.of(spec, []))
                stack[-1].__enter__()
                await self.leases.create(job_lease(job), ttl_s=60.0)
            try:
                yield
            finally:
                for entered in reversed(stack):
                    entered.__exit__(None, None, None)

    async def chain(self, *layers, provider=APP, image_ref="r.example/app:1", config=None):
        """Record a chain of lazy layers, as a pull does; return the result that it is."""
        await self.leases.create(LeaseId("pull"), ttl_s=None)
        records, top = [], None
        for layer in layers:
            top = RefRecord.over(layer, top, image_ref)
            records.append(top)
        known = {layer.digest: (provider,) for layer in layers}
        await self.refs.get_or_create(records, known, lease_id=LeaseId("pull"))
        return Result(ref=top.id, config=config)

    async def built(self, layer, on, lease="pull", origins=(OPEN,)):
        """Record a layer on top of a result as an op worker does; return its ref."""
        await self.leases.create(LeaseId("pull"), ttl_s=None)
        below = None if on is None else (await self.refs.chain(on))[-1].record
        record = replace(RefRecord.over(layer, below), origins=tuple(origins))
        size = layer.size_bytes
        self.memory.blobs[layer.digest] = BlobRecord(digest=layer.digest, key="k", size_bytes=size, etag="e", fence=1)
        await self.refs.get_or_create([record], {layer.digest: (FARM,)}, lease_id=LeaseId(lease))
        return record.id

    async def layers(self, result):
        """Return the digests of a result's layers, lowest first."""
        return [] if result.ref is None else [s.record.blob.digest for s in await self.refs.chain(result.ref)]

    async def held(self, lease_id):
        return set((await self.leases.get(LeaseId(lease_id))).resources)

    async def found(self, *keys):
        return [record.result for record in await self.keys.lookup(keys)]

    def calls(self):
        """Return the names of all calls of workers."""
        workers = [*self.workers.fetchers.values(), *self.workers.performers.values()]
        return [call for worker in workers for call, _ in worker.calls]

    def plan_on_all(self, method, *outcomes):
        """Plan what comes of coming calls, on whichever node; the last one of all that follow."""
        left = list(outcomes)

        async def next_one(request):
            outcome = left[0] if len(left) == 1 else left.pop(0)
            outcome = await outcome(request) if callable(outcome) else outcome
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        for node in self.presence.alive:
            self.workers.op_worker(node).plan(method, next_one)
            self.workers.fetch_worker(node).plan(method, next_one)

    async def run(self, use, *inputs, keys=(K1,), ignores_cache=False, dispatcher=None):
        dispatcher = dispatcher or self.dispatcher
        return await dispatcher.run(use, inputs, keys, {}, ignores_cache=ignores_cache)


@pytest.fixture
async def bench(monkeypatch):
    for module in (dispatch_module, workers_module):
        monkeypatch.setattr(module, "RETRY_PAUSE_S", 0)
    bench = Bench()
    yield bench
    assert not bench.memory.flights
    assert not bench.renewer.owned
    assert bench.placement._running == {}
    await bench.sessions.aclose()


def resolved(*layers, config=CONFIG):
    """Return what a fetch worker says of an image of *layers*."""
    image = ImageRecord(
        name="r.example/app:1",
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(b"manifest"), size_bytes=1),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(config), size_bytes=len(config)),
        platform="linux/amd64",
        layers=layers,
        ref=None,
    )
    handlers = [DescHandler(digest=layer.digest, provider=APP) for layer in layers]
    handlers += [DescHandler(digest=A.digest, provider=OTHER)] if A in layers else []
    return ResolveResult(image=image, config=config, handlers=tuple(handlers))


def ran(ref):
    return RunOpResult(ref=ref)


# -- images -----------------------------------------------------------------------------------------------------------


async def test_an_images_cache_map_publishes_the_ways_to_its_layers(bench):
    """By digest, all of them, and each tells of its progress under the image's vertex, for this job."""
    bench.plan_on_all("resolve_image", resolved(A, B))
    async with bench.jobs(J1):
        found = await bench.dispatcher.cache_map(J1, IMAGE)
    needed = NeedsRemoteProvidersError((A.digest, B.digest)).needed_opts
    assert set(found.opts) == set(needed)
    told = [decode("desc-handlers", list[DescHandler], found.opts[opt]) for opt in needed]
    assert [[h.provider for h in handlers] for handlers in told] == [[APP, OTHER], [APP]]
    assert {h.progress for handlers in told for h in handlers} == {layer_stream(J1, IMAGE.digest)}
    assert bench.memory.records == {}
    ((_, request),) = bench.workers.calls("resolve_image")
    assert (request.lease_id, request.image) == (job_lease(J1), IMAGE.op.reference)
    assert request.session.identities == {"r.example": "alice@r.example"}


async def test_an_image_is_what_its_manifest_and_platform_are(bench):
    """Not what it is called; another platform is another image."""
    keys = []
    for answer in (resolved(A), replace(resolved(A), config=b"{}"), None):
        found = answer or replace(resolved(A), image=replace(resolved(A).image, platform="linux/arm64"))
        bench.plan_on_all("resolve_image", found)
        async with bench.jobs(J1):
            keys.append((await bench.dispatcher.cache_map(J1, IMAGE)).key)
    assert keys[0] == keys[1] != keys[2]


async def test_other_ops_are_what_they_say(bench):
    """Nobody is asked; inputs of which the content counts are named."""
    run = Vertex(RunOp(args=("make",), binds=(BindMount(target="/src", input=1),)), (IMAGE.digest, RUN.digest))
    found = await bench.dispatcher.cache_map(J1, run)
    assert (found.key, found.slow_inputs, found.opts) == (op_digest(run.op), (1,), {})
    assert bench.calls() == []


async def test_an_image_is_refs_and_no_bytes(bench):
    """Made of what was resolved for the job, held for the use, published with its config; no layer moves."""
    bench.plan_on_all("resolve_image", resolved(A, B))
    use = FakeUse(IMAGE)
    async with bench.jobs(J1):
        await bench.dispatcher.cache_map(J1, IMAGE)
        done = await bench.run(use)
    assert await bench.layers(done.result) == [A.digest, B.digest]
    assert done.result.config == CONFIG
    assert await bench.found(K1) == [done.result]
    assert await bench.held("hold-1") == {ref_resource(s.record.id) for s in await bench.refs.chain(done.result.ref)}
    assert (await bench.refs.chain(done.result.ref))[1].record.image_refs == ("r.example/app:1",)
    assert (bench.calls(), use.story) == (["resolve_image"], ["began"])


async def test_an_image_is_resolved_anew_for_who_has_not(bench):
    """What a job resolved goes with it: it may end before the image is used for another."""
    bench.plan_on_all("resolve_image", resolved(A))
    async with bench.jobs(J1, J2):
        await bench.dispatcher.cache_map(J1, IMAGE)
        bench.dispatcher.forget(J1)
        await bench.run(FakeUse(IMAGE, jobs=(J2,)))
    assert {request.lease_id for _, request in bench.workers.calls("resolve_image")} == {job_lease(J1), job_lease(J2)}


async def test_an_image_without_layers_is_an_empty_filesystem(bench):
    """With its config all the same."""
    bench.plan_on_all("resolve_image", resolved())
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(IMAGE))
    assert done.result == Result(ref=None, config=CONFIG)


# -- merges and diffs -------------------------------------------------------------------------------------------------


async def test_a_merge_stays_lazy(bench):
    """Layers upon layers by their records alone; where they came from is kept, and the lowest config counts."""
    inputs = [
        await bench.chain(A, B),
        await bench.chain(C, image_ref="r.example/other:1", provider=OTHER, config=b"first"),
        await bench.chain(D, config=b"second"),
    ]
    use = FakeUse(MERGE)
    async with bench.jobs(J1):
        done = await bench.run(use, *inputs)
    states = await bench.refs.chain(done.result.ref)
    assert [s.record.blob.digest for s in states] == [layer.digest for layer in (A, B, C, D)]
    assert [s.record.image_refs[0] for s in states][1:3] == ["r.example/app:1", "r.example/other:1"]
    assert [s.providers for s in states][1:3] == [(APP,), (OTHER,)]
    assert all(s.is_lazy for s in states)
    assert done.result.config == b"first"
    assert await bench.found(K1) == [done.result]
    assert await bench.held("hold-1") == {ref_resource(s.record.id) for s in states}
    assert (bench.calls(), use.story) == ([], ["began"])


async def test_a_merge_with_nothing_is_the_other_one(bench):
    """Scratch has no layers; nothing and nothing is nothing."""
    chain = await bench.chain(A)
    async with bench.jobs(J1):
        assert (await bench.run(FakeUse(MERGE), None, chain, Result(ref=None))).result.ref == chain.ref
        assert (await bench.run(FakeUse(MERGE), None, Result(ref=None))).result == Result(ref=None)


async def test_a_merge_needs_the_callers_own_access_to_all(bench):
    """What another may read is not opened by putting it on top of something; the error says what would."""
    inputs = [await bench.chain(A), await bench.chain(B)]
    async with bench.jobs(J1, who="mallory"):
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await bench.run(FakeUse(MERGE), *inputs)
    assert caught.value.digests == (A.digest, B.digest)
    assert await bench.found(K1) == []


async def test_what_is_above_a_prefix_is_a_diff_without_a_byte(bench):
    """The upper layers by themselves; as lazy as they were."""
    lower, upper = await bench.chain(A), await bench.chain(A, B, C)
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(DIFF), lower, upper)
        assert await bench.layers(done.result) == [B.digest, C.digest]
        assert (await bench.run(FakeUse(DIFF), upper, upper)).result == Result(ref=None)
        assert (await bench.run(FakeUse(DIFF), None, upper)).result.ref == upper.ref
    states = await bench.refs.chain(done.result.ref)
    assert all(s.is_lazy and s.record.image_refs == ("r.example/app:1",) for s in states)
    assert bench.calls() == []


@pytest.mark.parametrize("lower", [(B,), (A, B, C, D), (A, C)])
async def test_any_other_diff_is_made_on_a_node(bench, lower):
    """There the files are compared: both inputs are brought."""
    lower, upper = await bench.chain(*lower), await bench.chain(A, B, C)
    made = await bench.built(MADE, None)
    bench.plan_on_all("run_op", ran(made))
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(DIFF), lower, upper)
    assert done.result.ref == made
    assert {request.ref_id for _, request in bench.workers.calls("extract")} == {lower.ref, upper.ref}
    ((_, request),) = bench.workers.calls("run_op")
    assert request.inputs == (lower.ref, upper.ref)


# -- by what it is open -----------------------------------------------------------------------------------------------


def needs(*layers, provider=APP, came_from=""):
    """Return the text of the origin of what was made of *layers*."""
    return encode_origin(
        Needed(digest=layer.digest, size_bytes=layer.size_bytes, providers=(provider,), came_from=came_from)
        for layer in layers
    )


def files(*inputs):
    """Return a vertex of a file op over that many inputs."""
    copies = tuple(CopyAction(input=n, sources=("/f",), destination=f"/{n}") for n in range(1, len(inputs)))
    return Vertex(FileOp(actions=copies), tuple(digest_of(f"input {n}".encode()) for n in range(len(inputs))))


async def origins_told(bench, vertex, *inputs, jobs=(J1,)):
    """Run an op over results; return what its worker is told that the layer is open by."""
    bench.plan_on_all("run_op", ran(None))
    async with bench.jobs(*jobs):
        await bench.run(FakeUse(vertex, jobs=jobs), *inputs)
    ((_, request),) = bench.workers.calls("run_op")
    return [decode_origin(text) for text in request.origins]


async def test_what_only_changes_its_base_is_open_by_its_chain(bench):
    """Nothing besides went into it: nothing besides is recorded."""
    assert await origins_told(bench, RUN, await bench.chain(A, B)) == [()]


async def test_what_was_copied_from_is_an_origin(bench):
    """All layers of what was copied from, but those that are in the chain anyway, with where their bytes came from."""
    base, source = await bench.chain(A), await bench.chain(A, B, C)

    async def extract(_request):  # the layers that were lazy come meanwhile
        for layer in (B, C):
            bench.memory.blobs[layer.digest] = BlobRecord(
                digest=layer.digest, key="k", size_bytes=layer.size_bytes, etag="e", fence=1, source=APP.source
            )

    bench.plan_on_all("extract", extract)
    (origin,) = await origins_told(bench, files(base, source), base, source)
    assert sorted(need.digest for need in origin) == sorted([B.digest, C.digest])
    assert {(need.providers, need.came_from) for need in origin} == {((APP,), APP.source)}


async def test_what_was_copied_from_a_copy_has_the_origin_of_the_copy(bench):
    """Through as many stages as there are; what builds made is no origin itself."""
    copied = Result(ref=await bench.built(MADE, None, origins=[needs(A, B)]))
    (origin,) = await origins_told(bench, files(None, copied), None, copied)
    assert encode_origin(origin) == needs(A, B)


async def test_a_difference_is_open_by_both_sides(bench):
    """What it stands on is not in its chain: that it was taken out of it counts."""
    lower, upper = await bench.chain(A), await bench.chain(B)
    (origin,) = await origins_told(bench, DIFF, lower, upper)
    assert encode_origin(origin) == needs(A, B)


async def test_layers_that_are_taken_off_a_base_stay_open_by_it(bench):
    """No byte moves, and the base is not in the new chain: the built layer's record says so."""
    lower = await bench.chain(A)
    upper = Result(ref=await bench.built(MADE, lower.ref, origins=[needs(C)]))
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(DIFF), lower, upper)
    (state,) = await bench.refs.chain(done.result.ref)
    assert state.record.origins == (needs(A, C),)


async def test_a_merge_keeps_what_its_layers_are_open_by(bench):
    """Each on whatever it comes to stand on."""
    copied = Result(ref=await bench.built(MADE, None, origins=[needs(C, provider=OTHER)]))
    async with bench.jobs(J1):
        bench.prober.add(OTHER, C.digest)
        done = await bench.run(FakeUse(MERGE), await bench.chain(A), copied)
    origins = [state.record.origins for state in await bench.refs.chain(done.result.ref)]
    assert origins == [(), (needs(C, provider=OTHER),)]


async def test_of_several_origins_each_job_gets_the_one_that_it_is_shown(bench):
    """What came of the same bytes in two ways is an input: what is made of it is open by the way of each, that first.

    And by the other ways: a job that comes while it is made may be shown one of these alone.
    """
    ways = [needs(A), needs(B, provider=OTHER)]
    copied = Result(ref=await bench.built(MADE, None, origins=ways))
    await bench.access.record(FakeAuthorizer("alice"), OTHER, [B.digest])
    origins = await origins_told(bench, files(None, copied), None, copied, jobs=(J1, J2))
    assert [encode_origin(origin) for origin in origins] == [ways[1], ways[0]]


async def test_of_inputs_with_several_origins_each_pair_will_do(bench):
    """But for what needs all that another pair does, and more."""
    one = Result(ref=await bench.built(MADE, None, origins=[needs(A), needs(B)]))
    other = Result(ref=await bench.built(D, None, origins=[needs(A), needs(C)]))
    origins = await origins_told(bench, files(None, one, other), None, one, other)
    assert [encode_origin(origin) for origin in origins] == [needs(A), needs(B, C)]


async def test_of_too_many_origins_the_jobs_own_is_kept(bench):
    """There are as many as are kept of a ref."""
    many = [layer_of(b"layer %d" % n) for n in range(2 * MAX_ORIGINS)]
    first = Result(ref=await bench.built(layer_of(b"1"), None, origins=[needs(each) for each in many[:MAX_ORIGINS]]))
    second = Result(ref=await bench.built(layer_of(b"2"), None, origins=[needs(each) for each in many[MAX_ORIGINS:]]))
    for each in (many[5], many[-1]):
        await bench.access.record(FakeAuthorizer("alice"), APP, [each.digest])
    origins = await origins_told(bench, files(None, first, second), None, first, second)
    assert len(set(origins)) == MAX_ORIGINS
    assert encode_origin(origins[0]) == needs(many[5], many[-1])


# -- ops on nodes -----------------------------------------------------------------------------------------------------


async def test_an_op_begins_once_its_inputs_are_there(bench):
    """Brought to the node where it runs, without being mounted, each once, held for the use."""
    base, other = await bench.chain(A, B, config=CONFIG), await bench.chain(C)
    use = FakeUse(RUN, jobs=(J1, J2))
    gate, arrived = asyncio.Event(), asyncio.Event()

    async def extract(request):
        arrived.set()
        await gate.wait()
        use.story.append(request.ref_id)

    async def run_op(request):
        use.story.append("ran")
        return ran(None)

    bench.plan_on_all("extract", extract)
    bench.plan_on_all("run_op", run_op)
    async with bench.jobs(J1, J2):
        running = asyncio.create_task(bench.run(use, base, None, other, base, keys=(K1, K2)))
        await arrived.wait()
        assert use.story == []
        gate.set()
        done = await running
    assert set(use.story[:2]) == {base.ref, other.ref}
    assert use.story[2:] == ["began", "ran"]
    ((node, request),) = bench.workers.calls("run_op")
    assert {where for where, _ in bench.workers.calls("extract")} == {node}
    assert not any(extracted.mount for _, extracted in bench.workers.calls("extract"))
    assert (request.inputs, request.keys) == ((base.ref, None, other.ref, base.ref), (K1, K2))
    assert (request.lease_id, request.jobs, request.config) == ("hold-1", (J1, J2), CONFIG)
    assert decode_vertex(request.vertex) == RUN
    assert (done.result, done.was_cached) == (Result(ref=None, config=CONFIG), False)


async def test_layers_are_brought_by_what_any_of_the_jobs_published(bench):
    """So that each job whose image it is sees them move."""
    base = await bench.chain(A, B)
    opt = NeedsRemoteProvidersError((A.digest,)).needed_opts[0]
    handlers = {job: DescHandler(digest=A.digest, provider=APP, progress=f"of {job}") for job in (J1, J2)}
    bench.opts = {job: {opt: encode("desc-handlers", [handler])} for job, handler in handlers.items()}
    async with bench.jobs(J1, J2):
        await bench.run(FakeUse(RUN, jobs=(J1, J2)), base)
    ((_, request),) = bench.workers.calls("extract")
    assert request.handlers == (handlers[J1], handlers[J2])


async def test_one_input_that_cant_be_had_is_the_error(bench):
    """Not a group of errors; and the op has not begun."""
    base, other = await bench.chain(A), await bench.chain(B)
    use = FakeUse(RUN)
    bench.plan_on_all("extract", NeedsRemoteProvidersError((A.digest,)))
    async with bench.jobs(J1):
        with pytest.raises(NeedsRemoteProvidersError):
            await bench.run(use, base, other)
    assert use.story == []


async def test_a_workers_questions_are_answered_while_it_runs(bench):
    """By the jobs that the op is done for; not after it."""
    asked = asyncio.Event()
    bench.plan_on_all("run_op", lambda _request: asked.wait())
    async with bench.jobs(J1):
        running = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await eventually(lambda: bench.workers.calls("run_op"))
        ((node, request),) = bench.workers.calls("run_op")
        worker = bench.workers.op_worker(node)
        asking = asyncio.create_task(worker.ask(request.session.session_id, secret="token"))
        (question,) = await bench.host.next_questions("session-j1", wait_s=10)
        assert question.secret == "token"
        asking.cancel()
        running.cancel()
        await asyncio.wait([running, asking])
    assert len(asyncio.all_tasks()) == 1


async def test_jobs_that_come_to_an_op_hear_of_it(bench, monkeypatch):
    """Each once, also where its worker did not answer at first; nobody twice who was there."""
    monkeypatch.setattr(dispatch_module, "_LOOK_S", 0)
    use = FakeUse(RUN)
    gate = asyncio.Event()

    async def run_op(request):
        await gate.wait()
        return ran(None)

    bench.plan_on_all("run_op", run_op)
    bench.plan_on_all("watch_op", UnavailableError("worker", "busy"), False, True)
    async with bench.jobs(J1, J2):
        running = asyncio.create_task(bench.run(use, None))
        await eventually(lambda: bench.workers.calls("run_op"))
        use.jobs = (J1, J2)
        await eventually(lambda: len(bench.workers.calls("watch_op")) == 3)
        for _ in range(20):
            await asyncio.sleep(0)
        gate.set()
        await running
    ((_, run),) = bench.workers.calls("run_op")
    assert [(r.job, r.run_id) for _, r in bench.workers.calls("watch_op")] == [(J2, run.run_id)] * 3


async def test_the_content_of_an_input_is_digested_where_it_is(bench):
    """On a node to which it was brought, for the jobs it is done for; the op is not begun."""
    base = await bench.chain(A)
    use = FakeUse(RUN)
    async with bench.jobs(J1):
        found = await bench.dispatcher.content_key(use, 1, base, {})
    ((node, request),) = bench.workers.calls("content_key")
    assert [(where, r.ref_id) for where, r in bench.workers.calls("extract")] == [(node, base.ref)]
    assert (request.index, request.input, request.lease_id) == (1, base.ref, "hold-1")
    assert found == digest_of(request.vertex)
    assert use.story == []


async def test_an_empty_input_is_digested_without_being_brought(bench):
    """There is nothing to bring."""
    async with bench.jobs(J1):
        await bench.dispatcher.content_key(FakeUse(RUN), 1, Result(ref=None), {})
    assert bench.calls() == ["content_key"]


# -- once for the farm ------------------------------------------------------------------------------------------------


class Gate:
    """An op that stands still until a test lets it go on."""

    def __init__(self, bench, outcome):
        self.arrived, self.proceed = asyncio.Event(), asyncio.Event()

        async def run_op(request):
            self.arrived.set()
            await self.proceed.wait()
            if isinstance(outcome, BaseException):
                raise outcome
            await bench.keys.publish(request.keys, Result(ref=outcome))
            return ran(outcome)

        self.run_op = run_op


async def wait_at_flight(bench):
    """Wait until another scheduler waits for a flight."""
    await eventually(lambda: any(bench.memory.waiters.values()))
    await eventually(lambda: any(bench.memory.listeners.values()))


async def test_what_another_scheduler_runs_is_waited_for_and_taken(bench):
    """Two schedulers want one vertex: it runs once, and the second finds what the first has published."""
    made = await bench.built(MADE, None)
    gate = Gate(bench, made)
    bench.plan_on_all("run_op", gate.run_op)
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        use = FakeUse(RUN, jobs=(J2,), hold=2)
        second = asyncio.create_task(bench.run(use, None, dispatcher=other))
        await wait_at_flight(bench)
        gate.proceed.set()
        done = await asyncio.gather(first, second)
    assert [each.was_cached for each in done] == [False, True]
    assert done[0].result == done[1].result == Result(ref=made)
    assert len(bench.workers.calls("run_op")) == 1
    assert await bench.held("hold-2") == {ref_resource(made)}
    assert use.story == []
    assert not any(bench.memory.waiters.values())


async def test_what_was_published_meanwhile_is_taken(bench):
    """Between the lookup and the run another had done it; what can't be used of it is passed over."""
    base = await bench.chain(A)
    made = await bench.built(MADE, base.ref)
    await bench.keys.publish([K1], Result(ref=made, config=b"of that"))
    await bench.keys.publish([K1], Result(ref=digest_of(b"collected")))
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(RUN), None)
    assert (done.result, done.was_cached) == (Result(ref=made, config=b"of that"), True)
    assert bench.calls() == []


async def test_what_may_not_be_taken_is_run(bench):
    """Published or not, and with others under way or not: who ignores the cache gets a run of its own."""
    made = await bench.built(MADE, None)
    await bench.keys.publish([K1], Result(ref=made))
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(RUN), None, ignores_cache=True)
    assert (done.result, done.was_cached) == (Result(ref=None), False)


async def test_who_may_not_use_what_was_published_runs_it(bench):
    """Another's result over layers that this job can't read is none for it."""
    secret = await bench.chain(A)
    await bench.keys.publish([K1], secret)
    async with bench.jobs(J1, who="mallory"):
        done = await bench.run(FakeUse(RUN), None)
    assert (done.result, done.was_cached) == (Result(ref=None), False)


async def test_what_the_command_came_to_is_so_for_all_who_wait(bench):
    """It fails once, not once a scheduler; who comes later tries afresh."""
    gate = Gate(bench, ProcessFailedError(("make",), 2, ("oops",)))
    bench.plan_on_all("run_op", gate.run_op, ran(None))
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        gate.proceed.set()
        for task in (first, second):
            with pytest.raises(ProcessFailedError) as caught:
                await task
            assert caught.value.last_lines == ("oops",)
        assert len(bench.workers.calls("run_op")) == 1
        await bench.run(FakeUse(RUN), None)


@pytest.mark.parametrize(
    "error", [ContainerError("mounting", "no overlay"), UnavailableError("s3", "gone"), MissingSecretError("token")]
)
async def test_what_else_went_wrong_is_tried_by_who_waits(bench, error):
    """A node's trouble, or a secret that this job's driver doesn't give, is nothing to another's job."""
    gate = Gate(bench, error)
    bench.plan_on_all("run_op", gate.run_op, ran(None))
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        gate.proceed.set()
        with pytest.raises(type(error)):
            await first
        assert (await second).was_cached is False
    assert len(bench.workers.calls("run_op")) == 2


async def test_who_is_cancelled_takes_it_from_nobody(bench):
    """A waiter goes: the owner goes on. The owner's jobs go: what runs goes on for who waits, held as before."""
    made = await bench.built(MADE, None)
    gate = Gate(bench, made)
    bench.plan_on_all("run_op", gate.run_op)
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        second.cancel()
        await asyncio.wait([second])
        assert not any(bench.memory.waiters.values())
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        first.cancel()
        released = asyncio.create_task(bench.dispatcher.release(1))
        await asyncio.wait([first], timeout=0.05)
        assert not first.done()
        assert "hold-1" in {lease.id for lease in await bench.leases.leases()}
        gate.proceed.set()
        done = await second
        await asyncio.gather(first, released)
    assert (done.result, done.was_cached) == (Result(ref=made), True)
    assert len(bench.workers.calls("run_op")) == 1
    assert "hold-1" not in {lease.id for lease in await bench.leases.leases()}


async def test_what_fails_for_others_only_is_told_to_them(bench):
    """The owner's jobs have gone; what its command came to fails those who wait, and is not run again."""
    gate = Gate(bench, ProcessFailedError(("make",), 2, ()))
    bench.plan_on_all("run_op", gate.run_op)
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        first.cancel()
        gate.proceed.set()
        with pytest.raises(ProcessFailedError):
            await second
        await asyncio.wait([first])
    assert len(bench.workers.calls("run_op")) == 1


async def test_what_nobody_waits_for_any_more_is_stopped(bench, monkeypatch):
    """The owner's jobs go, then those who wait: the run ends, and its flight with it."""
    monkeypatch.setattr(dispatch_module, "_LOOK_S", 0.01)
    gate = Gate(bench, None)
    bench.plan_on_all("run_op", gate.run_op)
    other = bench.new_dispatcher("s1/1")
    async with bench.jobs(J1, J2):
        first = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        second = asyncio.create_task(bench.run(FakeUse(RUN, jobs=(J2,), hold=2), None, dispatcher=other))
        await wait_at_flight(bench)
        first.cancel()
        await asyncio.wait([first], timeout=0.05)
        assert not first.done()
        second.cancel()
        await asyncio.wait([first, second])
        assert first.cancelled()
        gate.proceed.set()
        assert not (await bench.run(FakeUse(RUN, jobs=(J2,), hold=3), None, dispatcher=other)).was_cached
    assert len(bench.workers.calls("run_op")) == 2


async def test_an_owner_that_died_is_replaced(bench):
    """Nobody ends its flight: its lease lapses, and who waits runs the op."""
    await bench.flights.join(f"vertex:{RUN.digest}", worker="dead", token="t", ttl_s=5.0)
    async with bench.jobs(J1):
        running = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await wait_at_flight(bench)
        assert bench.calls() == []
        bench.clock.advance(6)
        assert (await running).was_cached is False


async def test_a_run_that_outlives_its_flight_is_a_result_all_the_same(bench):
    """What it published is true whoever else has run it meanwhile."""
    gate = Gate(bench, None)
    bench.plan_on_all("run_op", gate.run_op)
    async with bench.jobs(J1):
        running = asyncio.create_task(bench.run(FakeUse(RUN), None))
        await gate.arrived.wait()
        bench.clock.advance(100)
        bench.renewer.renew()
        gate.proceed.set()
        assert (await running).result == Result(ref=None)
    bench.memory.flights.clear()


# -- workers that are lost --------------------------------------------------------------------------------------------

LOST = ActorLostError("op worker", "killed")


async def test_a_lost_worker_is_replaced_by_another(bench):
    """On another node, to which the inputs are brought, too."""
    base = await bench.chain(A)
    bench.plan_on_all("run_op", LOST, ran(None))
    use = FakeUse(RUN)
    async with bench.jobs(J1):
        await bench.run(use, base)
    (first, second) = (node for node, _ in bench.workers.calls("run_op"))
    assert first != second
    assert {node for node, _ in bench.workers.calls("extract")} == {first, second}
    assert use.story == ["began", "began"]


async def test_an_op_that_takes_its_workers_with_it_is_given_up(bench):
    """The third time is no bad luck; the error says that, and fails nobody else."""
    bench.plan_on_all("run_op", LOST)
    async with bench.jobs(J1):
        with pytest.raises(ContainerError, match="3 times"):
            await bench.run(FakeUse(RUN), None)
    assert len({node for node, _ in bench.workers.calls("run_op")}) == 3


async def test_long_ops_may_lose_as_many_workers_as_short_ones(bench, monkeypatch):
    """What counts is how often it was lost, not how long it had run by then."""
    now_s = [0.0]
    monkeypatch.setattr(dispatch_module, "time", Time(now_s))

    async def lost_late(request):
        now_s[0] += 3600.0
        raise LOST

    bench.plan_on_all("run_op", lost_late, lost_late, ran(None))
    async with bench.jobs(J1):
        await bench.run(FakeUse(RUN), None)
    assert len(bench.workers.calls("run_op")) == 3


class Time:
    """The time, by hand."""

    def __init__(self, now_s):
        self.now_s = now_s

    def monotonic(self):
        return self.now_s[0]


async def test_what_fails_late_everywhere_is_given_up(bench, monkeypatch):
    """A disk that is full after an hour, on whichever node: three times, not for ever."""
    now_s = [0.0]
    monkeypatch.setattr(dispatch_module, "time", Time(now_s))

    async def full_late(request):
        now_s[0] += 3600.0
        raise NodeDiskError("/var", "no space left on device")

    bench.plan_on_all("run_op", full_late)
    async with bench.jobs(J1):
        with pytest.raises(NodeDiskError):
            await bench.run(FakeUse(RUN), None)
    assert len(bench.workers.calls("run_op")) == 3


async def test_what_a_lost_worker_had_published_is_found(bench):
    """It died between publishing and answering: nothing is run again."""
    made = await bench.built(MADE, None)

    async def published_and_died(request):
        await bench.keys.publish(request.keys, Result(ref=made))
        raise LOST

    bench.plan_on_all("run_op", published_and_died)
    for ignores_cache in (False, True):
        async with bench.jobs(J1):
            done = await bench.run(FakeUse(RUN), None, keys=(K1,), ignores_cache=ignores_cache)
        assert done.result == Result(ref=made)
        bench.solver_memory.keys.clear()
    assert len(bench.workers.calls("run_op")) == 2


async def test_what_was_published_before_is_not_found_by_who_ignores_it(bench):
    """A lost worker makes no cached result fresh: the op is run again."""
    stale, fresh = await bench.built(MADE, None), await bench.built(D, None)
    await bench.keys.publish([K1], Result(ref=stale))
    bench.plan_on_all("run_op", LOST, ran(fresh))
    async with bench.jobs(J1):
        done = await bench.run(FakeUse(RUN), None, ignores_cache=True)
    assert done.result == Result(ref=fresh)


@pytest.mark.parametrize("method", ["extract", "run_op"])
async def test_a_node_whose_disk_is_full_is_passed_over(bench, method):
    """Another may have room; where none has, that is the error, in the end."""
    base = await bench.chain(A)
    full = NodeDiskError("/var", "no space left on device")
    bench.plan_on_all(method, full, None if method == "extract" else ran(None))
    async with bench.jobs(J1):
        await bench.run(FakeUse(RUN), base)
    first, second = (node for node, _ in bench.workers.calls(method))
    assert first != second


async def test_a_node_that_never_has_room_is_given_up(bench, monkeypatch):
    """After a while: with the error that says why."""
    monkeypatch.setattr(dispatch_module, "RETRY_S", 0.005)
    bench.plan_on_all("run_op", NodeDiskError("/var", "no space left on device"))
    async with bench.jobs(J1):
        with pytest.raises(NodeDiskError):
            await bench.run(FakeUse(RUN), None)


@pytest.fixture
def dispatch_clock(monkeypatch):
    """The time that a dispatcher sees."""
    clock = FakeClock()
    monkeypatch.setattr(dispatch_module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.mark.parametrize("method", ["extract", "run_op"])
async def test_an_op_waits_once_for_room_whatever_the_number_of_full_nodes(bench, dispatch_clock, method):
    """The first is waited for; the others are asked for the room that they have. The error says how long it was."""
    told = []

    async def wait_in_vain(request):
        told.append(request.disk_wait_s)
        dispatch_clock.advance(request.disk_wait_s)
        raise NodeDiskError("/var", f"no room; waited {request.disk_wait_s:.0f} s")

    began_s, base = dispatch_clock(), await bench.chain(A)
    bench.plan_on_all(method, wait_in_vain)
    async with bench.jobs(J1):
        with pytest.raises(NodeDiskError, match="waited 120 s"):
            await bench.run(FakeUse(RUN), base)
    assert told == [120.0, 0.0, 0.0, 0.0]
    assert {node for node, _ in bench.workers.calls(method)} == {"n0", "n1", "n2"}
    assert dispatch_clock() - began_s == pytest.approx(120.0)


async def test_what_an_op_waited_for_its_inputs_it_waits_no_more(bench, dispatch_clock):
    """One deadline for all; what it took besides, to bring them, doesn't count."""
    base, other = await bench.chain(A), await bench.chain(B)

    async def extract(request):
        dispatch_clock.advance(1000.0)
        waited_s = 30.0 if request.ref_id == base.ref else 50.0
        return ExtractResult(ref_id=request.ref_id, node="", path="", seconds=1000.0, layers=(), disk_waited_s=waited_s)

    bench.plan_on_all("extract", extract)
    bench.plan_on_all("run_op", ran(None))
    async with bench.jobs(J1):
        await bench.run(FakeUse(files(base, other)), base, other)
    assert [request.disk_wait_s for _, request in bench.workers.calls("extract")] == [120.0, 120.0]
    ((_, request),) = bench.workers.calls("run_op")
    assert request.disk_wait_s == 70.0


async def test_a_scheduler_that_was_silent_tries_again(bench):
    """Its worker took it for gone: the session is there. One that is really gone is the job's end."""

    async def silent(request):
        raise SessionGoneError(request.session.session_id)

    bench.plan_on_all("run_op", silent, ran(None))
    async with bench.jobs(J1):
        await bench.run(FakeUse(RUN), None)
        bench.plan_on_all("run_op", SessionGoneError("session-j1"))
        with pytest.raises(SessionGoneError):
            await bench.run(FakeUse(RUN), None, keys=(K2,))
    assert len(bench.workers.calls("run_op")) == 3


# -- loads and ends ---------------------------------------------------------------------------------------------------


def record(result):
    return CacheRecord(id="r", result=result, created_wall_s=1.0)


async def test_what_builds_made_and_is_gone_is_lost(bench):
    """Not what can be had from a registry, not what is there, and no other error."""
    base = await bench.chain(A)
    await bench.built(MADE, base.ref)
    assert not await bench.dispatcher.has_lost(NeedsRemoteProvidersError((MADE.digest,)))
    del bench.memory.blobs[MADE.digest]
    assert await bench.dispatcher.has_lost(NeedsRemoteProvidersError((A.digest, MADE.digest)))
    assert await bench.dispatcher.has_lost(BlobNotFoundError(MADE.digest, "the content store"))
    assert not await bench.dispatcher.has_lost(NeedsRemoteProvidersError((A.digest,)))
    assert not await bench.dispatcher.has_lost(ProcessFailedError(("make",), 2, ()))


async def test_a_load_holds_all_of_a_result_and_moves_nothing(bench):
    """Lazily, by the access of a job that it is done for."""
    chain = await bench.chain(A, B, config=CONFIG)
    async with bench.jobs(J1):
        assert await bench.dispatcher.load(FakeUse(RUN), record(chain), {}) == chain
    assert await bench.held("hold-1") == {ref_resource(s.record.id) for s in await bench.refs.chain(chain.ref)}
    assert bench.calls() == []


async def test_a_load_uses_what_the_jobs_vertices_published(bench):
    """A layer of which the farm knows no way to it for this caller opens with the job's own."""
    chain = await bench.chain(A, provider=handle("private"))
    needed = NeedsRemoteProvidersError((A.digest,))
    async with bench.jobs(J1):
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await bench.dispatcher.load(FakeUse(RUN), record(chain), {})
        assert caught.value.needed_opts == needed.needed_opts
        opts = {needed.needed_opts[0]: encode("desc-handlers", [DescHandler(digest=A.digest, provider=APP)])}
        assert await bench.dispatcher.load(FakeUse(RUN), record(chain), opts) == chain


async def test_an_empty_result_is_loaded_without_a_hold(bench):
    """There is nothing to hold."""
    async with bench.jobs(J1):
        assert await bench.dispatcher.load(FakeUse(RUN), record(Result(ref=None)), {}) == Result(ref=None)
    assert await bench.leases.get(LeaseId("hold-1")) is None


async def test_a_target_is_kept_by_the_jobs_own_lease(bench):
    """What is held for the use goes; what the job came to stays for its driver."""
    chain = await bench.chain(A, B)
    async with bench.jobs(J1):
        await bench.dispatcher.load(FakeUse(RUN), record(chain), {})
        await bench.dispatcher.keep(J1, RUN, chain, {})
        await bench.dispatcher.keep(J1, RUN, Result(ref=None), {})
        await bench.dispatcher.release(1)
    assert await bench.leases.get(LeaseId("hold-1")) is None
    assert await bench.held(job_lease(J1)) == {ref_resource(s.record.id) for s in await bench.refs.chain(chain.ref)}


async def test_only_images_are_resolved(bench):
    """All else is a bug here, and told as one."""
    with pytest.raises(InternalError):
        await bench.dispatcher._resolve(J1, Vertex(LocalOp(tree=K1)))
