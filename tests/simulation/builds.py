"""Builds: jobs that share vertices, on schedulers that die, stop and are cut off.

The scheduler is the real one (:class:`actors.scheduler.SolverScheduler` with :class:`cluster.solver.runner.Solver`);
its stores are across the network, and its ops take time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

from actors.boot import Boot
from actors.scheduler import SolverScheduler, _FencedEvents, _Parts
from cluster.config import Config
from cluster.digest import digest_of
from cluster.errors import ClusterError, ProcessFailedError, UnavailableError
from cluster.graph import encode_definition
from cluster.job import JobEnded, JobId, JobSpec, JobState
from cluster.messages import SessionInfo
from cluster.solver.ports import OpResult
from cluster.solver.runner import Solver
from cluster.solver.values import CacheMap, Result
from cluster.wire import decode_error, encode
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, MemoryKeyStore, SolverMemory
from tests.doubles.solver import Graph, name_of
from tests.simulation.farm import Farm
from tests.simulation.network import Weather
from tests.simulation.services import Remote

_CONFIG = Config()
_CLAIM_TTL_S = _CONFIG.build.claim_ttl_s
_RESTART_S = 1.0
_POLL_S = 0.5
_ENDS_WITHIN_S = 400.0
_FAILING = "fails"


# -- what is watched -------------------------------------------------------------------------------------------


class WatchedJobs:
    """A job store; the watch sees who owns which job, and what is told of it."""

    def __init__(self, watch, jobs, events):
        self._watch = watch
        self._jobs = jobs
        self._events = events
        self.fences = {}
        self.ended = {}

    def __getattr__(self, name):
        return getattr(self._jobs, name)

    async def claim(self, owner, *, ttl_s, most):
        claimed = await self._jobs.claim(owner, ttl_s=ttl_s, most=most)
        for each in claimed:
            job, fence = each.claim.job, each.claim.fence
            self._watch.expect("I10", fence > self.fences.get(job, 0), f"{job} is claimed under fence {fence} again")
            self._watch.expect("I9", job not in self.ended, f"{job} is claimed after its end")
            self.fences[job] = fence
        return claimed

    async def end(self, claim, state, *, error=b"", results=None):
        await self._jobs.end(claim, state, error=error, results=results)
        is_owner = claim.fence == self.fences[claim.job]
        self._watch.expect("I10", is_owner, f"fence {claim.fence} ends {claim.job}, and owns no more")
        outcome = (state, error, dict(results or {}))
        before = self.ended.setdefault(claim.job, outcome)
        self._watch.expect("I10", before == outcome, f"{claim.job} ends twice: {before[0].value}, {state.value}")

    async def publish(self, job, events, *, fence=None):
        await self._events.publish(job, events, fence=fence)
        is_owner = fence is None or fence == self.fences[job]
        self._watch.expect("I10", is_owner, f"fence {fence} tells of {job}, and owns no more")


# -- a scheduler -----------------------------------------------------------------------------------------------


class TimedOps:
    """A :class:`cluster.solver.ports.OpRunner` whose ops take time, and leave results that everyone can load."""

    def __init__(self, run, process, keys):
        self._run = run
        self._process = process
        self._keys = keys

    def try_cache_map(self, vertex):
        return CacheMap(key=digest_of(name_of(vertex).encode()))

    async def cache_map(self, job, vertex):
        return self.try_cache_map(vertex)

    async def load(self, use, record, opts):
        return record.result

    async def content_key(self, use, index, source, opts):
        return digest_of(source.ref.encode())

    async def run(self, use, inputs, keys, opts, *, ignores_cache):
        use.began()
        name = name_of(use.vertex)
        await asyncio.sleep(self._run.seconds[name])
        self._run.runs[name] += 1
        if name in self._run.failing:
            raise ProcessFailedError((name,), 1, ())
        result = Result(ref=name)
        await self._keys.publish(keys, result)
        return OpResult(result=result)

    async def keep(self, job, vertex, result, opts):
        pass

    async def finish(self, job, exportables):
        pass

    async def release(self, hold):
        pass


class _NoCaches:
    """Remote caches that no job names, and a dispatcher that loses nothing."""

    async def read(self, spec):
        pass

    def inline(self, job, ref):
        return ()

    def forget(self, job):
        pass

    async def has_lost(self, error):
        return False

    def of(self, spec, registries):
        return nullcontext()


class Scheduler:
    """One scheduler process."""

    def __init__(self, run, index, start):
        farm = run.farm
        self.name = f"scheduler-{index}"
        self.process = process = farm.loop.process(f"{self.name}/{start}")
        boot = Boot(config=_CONFIG, state_dir="", name=self.name, kind="scheduler", node="n0")
        self.scheduler = SolverScheduler(encode("boot", boot))
        remote = partial(Remote, farm.redis, process)
        jobs, nothing = remote(run.jobs), _NoCaches()
        keys = remote(run.keys)
        told = _FencedEvents(jobs, self.scheduler._runs)
        parts = _Parts(
            stores=SimpleNamespace(leases=remote(farm.redis.leases)),
            jobs=jobs,
            sessions=nothing,
            dispatcher=nothing,
            caches=nothing,
            events=told,
            solver=Solver(TimedOps(run, process, keys), keys, told),
        )
        for work in (self.scheduler._claim_forever, self.scheduler._renew_forever):
            process.spawn(work(parts))


# -- a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildChaos:
    """How often what goes wrong."""

    crashes: int = 0
    pauses: int = 0
    cuts: int = 0
    cancels: int = 0
    #: Vertices that fail.
    failing: int = 0
    span_s: float = 15.0


@dataclass(kw_only=True)
class BuildRun:
    """Some jobs over one graph, built by some schedulers."""

    seed: int
    weather: Weather = field(default_factory=Weather)
    schedulers: int = 2
    jobs_count: int = 3
    vertices: int = 8
    chaos: BuildChaos = field(default_factory=BuildChaos)
    job_store: type = MemoryJobStore

    def __post_init__(self):
        self.farm = Farm(seed=self.seed, machines=0, weather=self.weather)
        redis = self.farm.redis
        memory = SolverMemory(redis.memory.now_s)
        self.events = MemoryJobEvents(memory)
        self.jobs = WatchedJobs(self.farm.watch, self.job_store(memory), self.events)
        self.keys = MemoryKeyStore(memory)
        self.runs = Counter()
        self.seconds = {}
        self.failing = set()
        self.running = []
        self.cancelled = set()

    def run(self):
        """Run it, and check all invariants; violations are the watch's."""
        return self.farm.run(self._run())

    async def _run(self):
        farm, rng = self.farm, self.farm.rng
        graph, vertices = Graph(), []
        for index in range(self.vertices):
            below = rng.sample(vertices, min(len(vertices), rng.randint(0, 2)))
            vertices.append(graph.add(f"v{index}", *below))
            self.seconds[f"v{index}"] = rng.uniform(0.1, 4.0)
        self.failing = {f"v{index}" for index in rng.sample(range(self.vertices), self.chaos.failing)}
        self.running = [Scheduler(self, index, 0) for index in range(self.schedulers)]
        self._plan(rng)
        drivers = [
            farm.loop.process(f"driver-{n}").spawn(
                self._drive(f"job-{n}", graph.definition(rng.choice(vertices)), rng.uniform(0, 5))
            )
            for n in range(self.jobs_count)
        ]
        _, late = await asyncio.wait(drivers, timeout=_ENDS_WITHIN_S)
        farm.watch.expect("I5", not late, f"{len(late)} jobs have not ended after {_ENDS_WITHIN_S:.0f} s")
        for driver in set(drivers) - late:
            driver.result()
        self._check_runs()

    async def _drive(self, job, definition, start_s):
        """Submit a job, and look until it has ended."""
        farm, process = self.farm, self.farm.loop.process(f"driver of {job}")
        jobs = Remote(farm.redis, process, self.jobs)
        await asyncio.sleep(start_s)
        payload = encode_definition(definition)
        spec = JobSpec(
            id=JobId(job),
            definition=digest_of(payload),
            targets=definition.targets,
            session=SessionInfo(session_id=f"session of {job}"),
        )
        await _until_answered(lambda: jobs.submit(spec, payload))
        while not (record := await _until_answered(lambda: jobs.get(spec.id))).state.is_end:
            await _until_answered(lambda: jobs.attend(spec.id))
            if job in self.cancelled:
                await _until_answered(lambda: jobs.request_cancel(spec.id))
            await asyncio.sleep(_POLL_S)
        self._check_end(record, definition)

    def _check_end(self, record, definition):
        """Check how a job ended: nobody fails or cancels another, and the last of its events is its end."""
        watch, job = self.farm.watch, record.id
        fails = {definition.names[v] for v in definition.vertices} & self.failing
        match record.state:
            case JobState.FAILED:
                error = decode_error(record.error)
                is_its_own = bool(fails) and isinstance(error, ProcessFailedError)
                is_excused = isinstance(error, UnavailableError) and not self._is_clear
                watch.expect("I6", is_its_own or is_excused, f"{job} fails, and nothing excuses it: {error!r}")
            case JobState.CANCELLED:
                watch.expect("I6", job in self.cancelled, f"{job} is cancelled, and nobody asked for that")
            case _:
                watch.expect("I2", not fails, f"{job} is done, and {fails} can't be")
        told = self.jobs._jobs._memory.job(job).events
        ends = [event for event in told if isinstance(event, JobEnded)]
        watch.expect("I5", ends == told[-1:], f"{job} has {len(ends)} ends among its {len(told)} events")

    def _check_runs(self):
        """I1 of builds: with one scheduler and nothing that goes wrong, a vertex that jobs share runs once."""
        if self.schedulers == 1 and self.chaos == BuildChaos() and self.weather == Weather():
            again = {name: count for name, count in self.runs.items() if count > 1}
            self.farm.watch.expect("I1", not again, f"{again} ran more than once")

    @property
    def _is_clear(self):
        """Tell whether every message gets through, in time."""
        return not (self.chaos.pauses or self.chaos.cuts or self.weather.loss or self.weather.late)

    # -- what goes wrong ---------------------------------------------------------------------------------------

    def _plan(self, rng):
        chaos, loop = self.chaos, self.farm.loop

        def at(step, *args):
            loop.call_later(rng.uniform(0.5, chaos.span_s), step, *args)

        for _ in range(chaos.crashes):
            at(self._crash, rng.randrange(self.schedulers))
        for _ in range(chaos.pauses):
            at(self._pause, rng.randrange(self.schedulers), rng.uniform(1.0, 2 * _CLAIM_TTL_S))
        for _ in range(chaos.cuts):
            at(self._cut_off, rng.randrange(self.schedulers), rng.uniform(1.0, 2 * _CLAIM_TTL_S), rng.random() < 0.5)
        for _ in range(chaos.cancels):
            at(self.cancelled.add, f"job-{rng.randrange(self.jobs_count)}")

    def _crash(self, index):
        scheduler = self.running[index]
        if scheduler.process.is_alive:
            scheduler.process.kill()
            self.farm.loop.call_later(_RESTART_S, self._restart, index)

    def _restart(self, index):
        start = int(self.running[index].process.name.partition("/")[2]) + 1
        self.running[index] = Scheduler(self, index, start)

    def _pause(self, index, seconds):
        self.farm.pause(self.running[index].process, seconds)

    def _cut_off(self, index, seconds, back_only):
        self.farm.cut_off(self.running[index].process, self.farm.redis.service, seconds, back_only=back_only)


async def _until_answered(ask):
    """Ask until there is an answer."""
    while True:
        try:
            return await ask()
        except ClusterError as exc:
            if not exc.retryable:
                raise
            await asyncio.sleep(_POLL_S)


# -- a broken variant ------------------------------------------------------------------------------------------


class ClaimNotChecked(MemoryJobStore):
    """A job is ended by whoever claimed it once."""

    async def end(self, claim, state, *, error=b"", results=None):
        job = self._memory.job(claim.job)
        job.fence, fence = claim.fence, job.fence
        try:
            await super().end(claim, state, error=error, results=results)
        finally:
            job.fence = fence
