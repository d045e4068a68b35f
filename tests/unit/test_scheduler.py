"""A scheduler's claims: what it builds, what it lets go of, and how what it built ends in the store."""

import asyncio
from types import SimpleNamespace

import pytest

from actors import scheduler as scheduler_module
from actors.boot import Boot
from actors.dispatch import job_lease
from actors.job_sessions import JobSessions
from actors.scheduler import SolverScheduler, _FencedEvents, _Parts
from cluster.config import BuildConfig, CacheConfig, Config
from cluster.digest import digest_of
from cluster.errors import (
    MalformedPayloadError,
    NeedsRemoteProvidersError,
    ProcessFailedError,
    StaleFenceError,
    UnavailableError,
)
from cluster.graph import encode_definition
from cluster.job import ClaimState, JobEnded, JobId, JobSpec, JobState, JobWarning, VertexEvent, VertexState
from cluster.job_result import InlineEntry, TargetResult, decode_result
from cluster.messages import SessionInfo
from cluster.solver.runner import Solver
from cluster.solver_ports import ATTENDED_S
from cluster.wire import decode_error, encode
from storage.memory import Memory, MemoryLeaseStore
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, SolverMemory
from tests.doubles.solver import FakeKeys, FakeOps, Graph, name_of
from tests.doubles.stores import FakeClock, eventually

#: Renewals come every third of it; what lapses is the store's clock's, which tests move.
CLAIM_TTL_S = 0.015
ANOTHERS_TTL_S = 1000.0
LEASE_TTL_S, KEEP_S = 60.0, 5000.0


class Jobs(MemoryJobStore):
    """A store of jobs that is away when a test says so."""

    def __init__(self, memory):
        super().__init__(memory)
        self.errors = {"claim": [], "renew": [], "end": []}
        self.ends = []
        self.renewals = 0

    def _fail(self, method):
        if self.errors[method]:
            raise self.errors[method].pop(0)

    async def claim(self, owner, *, ttl_s, most):
        self._fail("claim")
        return await super().claim(owner, ttl_s=ttl_s, most=most)

    async def renew(self, claims, *, ttl_s):
        self._fail("renew")
        self.renewals += 1
        return await super().renew(claims, ttl_s=ttl_s)

    async def end(self, claim, state, *, error=b"", results=None):
        self._fail("end")
        self.ends.append((claim.job, state))
        await super().end(claim, state, error=error, results=results)


class Dispatcher:
    """What a scheduler asks of its dispatcher."""

    def __init__(self):
        self.forgotten = []
        #: Errors that are for want of what builds made.
        self.losses = []

    async def has_lost(self, error):
        return error in self.losses

    def forget(self, job):
        self.forgotten.append(job)


class Caches:
    """Remote caches whose reading can be held up."""

    def __init__(self):
        self.read_for = []
        self.forgotten = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.error = None
        self.inlines = {}

    async def read(self, spec):
        self.read_for.append(spec.id)
        self.arrived.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    def inline(self, job, ref):
        return self.inlines.get((job, ref), ())

    def forget(self, job):
        self.forgotten.append(job)


class Bench:
    """One scheduler whose parts are in memory."""

    def __init__(self):
        config = Config(
            build=BuildConfig(claim_ttl_s=CLAIM_TTL_S), cache=CacheConfig(lease_ttl_s=LEASE_TTL_S, keep_s=KEEP_S)
        )
        boot = Boot(config=config, state_dir="", name="scheduler-0", kind="scheduler", node="n0")
        self.scheduler = SolverScheduler(encode("boot", boot))
        self.clock = FakeClock()
        self.memory = SolverMemory(self.clock)
        self.jobs, self.events = Jobs(self.memory), MemoryJobEvents(self.memory)
        self.leases = MemoryLeaseStore(Memory(self.clock))
        self.ops = FakeOps(FakeKeys())
        self.told = _FencedEvents(self.events, self.scheduler._runs)
        self.solver = Solver(self.ops, self.ops.keys, self.told)
        self.dispatcher, self.caches = Dispatcher(), Caches()
        self.sessions = JobSessions(self.scheduler._sessions, config, prefix="scheduler")
        self.parts = _Parts(
            stores=SimpleNamespace(leases=self.leases),
            jobs=self.jobs,
            sessions=self.sessions,
            dispatcher=self.dispatcher,
            caches=self.caches,
            events=self.told,
            solver=self.solver,
        )
        self.graph = Graph()

    def start(self):
        for work in (self.scheduler._claim_forever, self.scheduler._renew_forever):
            self.scheduler._starter.background.spawn(work(self.parts))

    async def submit(self, job="j1", *, name="a", below=(), payload=None, detached=False):
        definition = self.graph.definition(self.graph.add(name, *below))
        payload = encode_definition(definition) if payload is None else payload
        spec = JobSpec(
            id=JobId(job),
            definition=digest_of(payload),
            targets=definition.targets,
            session=SessionInfo(session_id=f"s-{job}"),
            is_detached=detached,
        )
        await self.jobs.submit(spec, payload)
        self.scheduler._poked.set()
        return definition

    async def ended(self, job="j1"):
        """Return a job's record once it has ended and its scheduler has let go of it."""
        async with asyncio.timeout(10):
            async for event in self.events.follow(JobId(job), deadline_s=10):
                if isinstance(event, JobEnded):
                    break
        await self.let_go(job)
        return await self.jobs.get(JobId(job))

    async def let_go(self, job="j1"):
        await eventually(lambda: job in self.caches.forgotten and job not in self.scheduler._runs)

    async def stand_at(self, name):
        """Wait until an op stands at its gate."""
        async with asyncio.timeout(10):
            await self.ops.arrived[name].wait()

    async def claimed_by_another(self, job="j1"):
        """Have another scheduler claim a job, as when this one was stopped for too long."""
        self.clock.advance(CLAIM_TTL_S + 1)
        (claimed,) = await self.jobs.claim("scheduler-1", ttl_s=ANOTHERS_TTL_S, most=16)
        assert claimed.claim.job == job
        return claimed

    def ran(self):
        return [name for call, name, _ in self.ops.calls if call == "run"]

    async def aclose(self):
        await self.scheduler._starter.background.aclose()
        await self.solver.aclose(5)
        await self.sessions.aclose()
        assert self.scheduler._sessions.statistics() == {"sessions": 0}


@pytest.fixture
async def bench(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_LOOK_S", 0.005)
    monkeypatch.setattr(scheduler_module, "_PAUSE_S", 0.001)
    bench = Bench()
    yield bench
    await bench.aclose()


# -- what is built ---------------------------------------------------------------------------------------------------


async def test_a_job_is_claimed_built_and_ended(bench):
    """Its result is recorded under its target, held by its lease, and nothing of it is remembered here."""
    bench.start()
    definition = await bench.submit()
    record = await bench.ended()
    assert (record.state, record.owner) == (JobState.DONE, "scheduler-0")
    assert decode_result(record.results[definition.targets[0]]) == TargetResult(ref="a")
    assert (await bench.leases.get(job_lease(JobId("j1")))).labels == {"owner": "job", "job": "j1"}
    assert bench.dispatcher.forgotten == bench.caches.forgotten == ["j1"]
    assert [e.state for e in await bench.events.told(JobId("j1")) if isinstance(e, VertexEvent)] == [
        VertexState.WAITING,
        VertexState.RUNNING,
        VertexState.COMPLETED,
    ]


async def test_a_jobs_result_says_what_an_inline_cache_is_to_say(bench):
    """For the target that it is of."""
    bench.start()
    bench.caches.inlines["j1", "a"] = (InlineEntry(keys=(digest_of(b"k"),), layers=1),)
    definition = await bench.submit()
    record = await bench.ended()
    assert decode_result(record.results[definition.targets[0]]).inline == bench.caches.inlines["j1", "a"]


@pytest.mark.parametrize(("detached", "keep_s"), [(False, LEASE_TTL_S), (True, KEEP_S)])
async def test_a_detached_jobs_results_are_kept_for_who_comes_for_them(bench, detached, keep_s):
    """An attached one's only until its driver has taken them over."""
    bench.start()
    await bench.submit(detached=detached)
    await bench.ended()
    lease = await bench.leases.get(job_lease(JobId("j1")))
    assert lease.expires_wall_s == bench.clock() + keep_s


async def test_a_job_that_waits_is_found_without_a_word(bench):
    """Drivers say when they submit one; where that is lost it is seen soon. Redis may be away meanwhile."""
    bench.jobs.errors["claim"] = [UnavailableError("redis", "gone")] * 3
    await bench.submit()
    bench.scheduler._poked.clear()
    bench.start()
    assert (await bench.ended()).state is JobState.DONE


async def test_what_an_op_fails_with_is_how_the_job_ends(bench):
    """With its very error, and no results."""
    bench.ops.errors["run", "a"] = ProcessFailedError(("make",), 2, ("oops",))
    bench.start()
    await bench.submit()
    record = await bench.ended()
    assert (record.state, record.results) == (JobState.FAILED, {})
    assert decode_error(record.error).last_lines == ("oops",)


async def test_a_job_whose_input_was_lost_is_built_again(bench):
    """What is gone is known then, and made again; who watches is told why it all begins anew."""
    lost = bench.ops.errors["run", "a"] = NeedsRemoteProvidersError((digest_of(b"gone"),))

    async def has_lost(error):
        bench.ops.errors.clear()
        return error is lost

    bench.dispatcher.has_lost = has_lost
    bench.start()
    await bench.submit()
    assert (await bench.ended()).state is JobState.DONE
    (warning,) = (e for e in await bench.events.told(JobId("j1")) if isinstance(e, JobWarning))
    assert str(lost) in warning.text
    assert bench.ran() == ["a", "a"]


async def test_a_job_that_loses_its_inputs_for_ever_fails(bench):
    """With the last error, after a few times."""
    lost = bench.ops.errors["run", "a"] = NeedsRemoteProvidersError((digest_of(b"gone"),))
    bench.dispatcher.losses.append(lost)
    bench.start()
    await bench.submit()
    record = await bench.ended()
    assert record.state is JobState.FAILED
    assert decode_error(record.error).digests == lost.digests
    assert len(bench.ran()) == 4


async def test_a_job_that_what_it_shared_is_closed_to_is_built_apart(bench, monkeypatch):
    """It came to an op that was made for another, by a way that it may not go: it has it made for itself.

    While the other's build goes on, and keeps its vertices.
    """
    made_for, run, load, keep = {JobId("j1"): set(), JobId("j2"): set()}, bench.ops.run, bench.ops.load, bench.ops.keep

    def check(job, name):
        if name not in made_for[job]:
            raise NeedsRemoteProvidersError((digest_of(b"base"),))

    async def run_for(use, *args, **more):
        for job in use.beneficiaries():
            made_for[job].add(name_of(use.vertex))
        return await run(use, *args, **more)

    async def load_for(use, record, opts):
        for job in use.beneficiaries():
            check(job, name_of(use.vertex))
        return await load(use, record, opts)

    async def keep_for(job, vertex, *args):
        check(job, name_of(vertex))
        await keep(job, vertex, *args)

    for name, step in (("run", run_for), ("load", load_for), ("keep", keep_for)):
        monkeypatch.setattr(bench.ops, name, step)
    bench.ops.gates = {"a": asyncio.Event(), "b": asyncio.Event()}
    bench.start()
    await bench.submit("j1", name="b", below=[bench.graph.add("a")])
    await bench.stand_at("a")
    await bench.submit("j2", name="a")
    await eventually(lambda: bench.solver.has_job(JobId("j2")))
    bench.ops.gates["a"].set()
    assert (await bench.ended("j2")).state is JobState.DONE
    assert bench.ran() == ["a", "b", "a"]
    assert bench.solver.has_job(JobId("j1"))
    (warning,) = (e for e in await bench.events.told(JobId("j2")) if isinstance(e, JobWarning))
    assert "makes its own" in warning.text
    bench.ops.gates["b"].set()
    assert (await bench.ended("j1")).state is JobState.DONE
    assert bench.ran() == ["a", "b", "a"]


async def test_a_job_that_may_not_have_what_it_needs_fails(bench):
    """By itself no less than among others: with the error that says what would open it."""
    closed = bench.ops.errors["keep", "a"] = NeedsRemoteProvidersError((digest_of(b"base"),))
    bench.start()
    await bench.submit()
    record = await bench.ended()
    assert record.state is JobState.FAILED
    assert decode_error(record.error).digests == closed.digests
    assert bench.ran() == ["a"]


async def test_a_definition_that_cant_be_read_fails_its_job(bench):
    """With the error that says why; nothing is asked for its sake, and other jobs go on."""
    bench.start()
    await bench.submit("bad", payload=b"not a definition")
    await bench.submit("good")
    record = await bench.ended("bad")
    assert record.state is JobState.FAILED
    assert isinstance(decode_error(record.error), MalformedPayloadError)
    assert (await bench.ended("good")).state is JobState.DONE
    assert bench.caches.read_for == ["good"]


async def test_a_bug_ends_its_job_and_nothing_else(bench):
    """It is told as one."""
    bench.caches.error = ValueError("surprise")
    bench.start()
    await bench.submit()
    record = await bench.ended()
    assert record.state is JobState.FAILED
    assert "ValueError: surprise" in str(decode_error(record.error))
    bench.caches.error = None
    await bench.submit("j2")
    assert (await bench.ended("j2")).state is JobState.DONE


# -- what is not built -----------------------------------------------------------------------------------------------


async def test_a_job_that_is_to_be_cancelled_is_not_begun(bench):
    """Its former scheduler died before it came to that: it ends as cancelled."""
    await bench.submit()
    await bench.jobs.claim("scheduler-1", ttl_s=0, most=1)
    await bench.jobs.request_cancel(JobId("j1"))
    bench.start()
    assert (await bench.ended()).state is JobState.CANCELLED
    assert (bench.ran(), bench.caches.read_for) == ([], [])


async def test_a_job_whose_driver_is_gone_is_not_begun(bench):
    """Nobody waits for it; a detached one is begun all the same."""
    await bench.submit()
    await bench.submit("j2", name="b", detached=True)
    bench.clock.advance(ATTENDED_S + 1)
    bench.start()
    assert (await bench.ended()).state is JobState.CANCELLED
    assert (await bench.ended("j2")).state is JobState.DONE
    assert bench.ran() == ["b"]


@pytest.mark.parametrize("why", ["cancel", "abandoned"])
async def test_a_job_is_cancelled_while_it_runs(bench, why):
    """As its owner learns when it renews: its ops are stopped."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    if why == "cancel":
        await bench.jobs.request_cancel(JobId("j1"))
    else:
        bench.clock.advance(ATTENDED_S + 1)
    record = await bench.ended()
    assert record.state is JobState.CANCELLED
    assert bench.solver.statistics().running == 0
    assert await bench.leases.get(job_lease(JobId("j1"))) is None


async def test_a_job_is_cancelled_while_its_caches_are_read(bench):
    """At once, however long a registry takes to answer."""
    bench.caches.gate.clear()
    bench.start()
    await bench.submit()
    async with asyncio.timeout(10):
        await bench.caches.arrived.wait()
    await bench.jobs.request_cancel(JobId("j1"))
    assert (await bench.ended()).state is JobState.CANCELLED
    assert bench.ran() == []


# -- claims that are lost ---------------------------------------------------------------------------------------------


async def test_a_job_that_another_has_is_let_go_of(bench):
    """It is stopped here; nothing is told of it, and its end is the other's."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    before = await bench.events.told(JobId("j1"))
    await bench.claimed_by_another()
    await bench.let_go()
    assert bench.jobs.ends == []
    assert await bench.events.told(JobId("j1")) == before
    assert (await bench.jobs.get(JobId("j1"))).state is JobState.RUNNING


async def test_a_job_that_is_lost_while_its_caches_are_read_is_not_begun(bench):
    """It would be built twice, and could not be built here again."""
    bench.caches.gate.clear()
    bench.start()
    await bench.submit()
    async with asyncio.timeout(10):
        await bench.caches.arrived.wait()
    await bench.claimed_by_another()
    await bench.let_go()
    assert (bench.ran(), bench.jobs.ends) == ([], [])


async def test_a_job_that_comes_back_is_built_when_it_has_been_let_go_of(bench, monkeypatch):
    """Claimed by another that died, while here not all is told of its first run: that takes nothing from the second."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    publish, telling, told = bench.told.publish, asyncio.Event(), asyncio.Event()

    async def slow(job, events):
        telling.set()
        await told.wait()
        await publish(job, events)

    monkeypatch.setattr(bench.told, "publish", slow)
    await bench.claimed_by_another()
    async with asyncio.timeout(10):
        await telling.wait()
    bench.clock.advance(ANOTHERS_TTL_S + 1)
    await bench.jobs.attend(JobId("j1"))
    await eventually(lambda: bench.memory.jobs["j1"].record.owner == "scheduler-0")
    renewals = bench.jobs.renewals
    await eventually(lambda: bench.jobs.renewals > renewals)
    assert bench.caches.read_for == ["j1"]
    bench.ops.gates["a"].set()
    told.set()
    assert (await bench.ended()).state is JobState.DONE
    assert bench.caches.forgotten == ["j1", "j1"]


async def test_a_claim_that_lapsed_and_came_back_goes_on(bench):
    """Nobody was faster: the run that goes on has the new claim, and ends the job by it."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.jobs.errors["renew"] = [UnavailableError("redis", "gone")] * 1000
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    first = bench.scheduler._runs["j1"].claim.fence
    bench.clock.advance(CLAIM_TTL_S + 1)
    await eventually(lambda: bench.scheduler._runs["j1"].claim.fence > first)
    bench.ops.gates["a"].set()
    assert (await bench.ended()).state is JobState.DONE
    assert bench.ran() == ["a"]


async def test_only_the_owner_of_a_job_tells_of_it(bench):
    """What is told late, of a job that is another's or unknown here, is dropped before the store has to refuse it."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    await bench.told.publish(JobId("j1"), [JobWarning(text="told")])
    bench.scheduler._runs["j1"].is_lost = True
    await bench.told.publish(JobId("j1"), [JobWarning(text="lost")])
    await bench.told.publish(JobId("unknown"), [JobWarning(text="unknown")])
    told = await bench.events.told(JobId("j1"))
    assert [event.text for event in told if isinstance(event, JobWarning)] == ["told"]
    await bench.claimed_by_another()
    bench.scheduler._runs["j1"].is_lost = False
    with pytest.raises(StaleFenceError):
        await bench.told.publish(JobId("j1"), [JobWarning(text="stale")])


# -- Redis is away -----------------------------------------------------------------------------------------------------


async def test_an_end_is_recorded_when_redis_is_back(bench):
    """However often it has to be tried, as long as the job is this scheduler's."""
    bench.jobs.errors["end"] = [UnavailableError("redis", "gone")] * 3
    bench.start()
    await bench.submit()
    assert (await bench.ended()).state is JobState.DONE
    assert bench.jobs.ends == [("j1", JobState.DONE)]


async def test_an_end_that_comes_too_late_is_given_up(bench):
    """Redis is back, and the job is another's: that is no error here, and it ends nothing."""
    bench.jobs.errors["end"] = [UnavailableError("redis", "gone")] * 1000
    bench.start()
    await bench.submit()
    await eventually(lambda: len(bench.jobs.errors["end"]) < 999)
    claimed = await bench.claimed_by_another()
    bench.jobs.errors["end"].clear()
    await bench.let_go()
    record = await bench.jobs.get(JobId("j1"))
    assert (record.state, record.owner) == (JobState.RUNNING, "scheduler-1")
    await bench.jobs.end(claimed.claim, JobState.CANCELLED)


async def test_renewals_go_on_when_redis_is_back(bench):
    """And keep the job's lease as well as its claim."""
    bench.ops.gates["a"] = asyncio.Event()
    bench.jobs.errors["renew"] = [UnavailableError("redis", "gone")]
    bench.start()
    await bench.submit()
    await bench.stand_at("a")
    bench.clock.advance(LEASE_TTL_S - 1)
    await bench.jobs.attend(JobId("j1"))
    renewals = bench.jobs.renewals
    await eventually(lambda: bench.jobs.renewals > renewals + 1)
    lease = await bench.leases.get(job_lease(JobId("j1")))
    assert lease.expires_wall_s == bench.clock() + LEASE_TTL_S
    (state,) = await bench.jobs.renew([bench.scheduler._runs["j1"].claim], ttl_s=1)
    assert state is ClaimState.HELD
