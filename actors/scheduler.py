"""The solver scheduler: a shell that takes jobs from Redis and has the solver build them.

Holds no truth: jobs, keys and results are in Redis. One that dies is replaced, by itself restarted or by another:
its jobs' claims lapse, whoever claims them next builds them, and what had run is found by its keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from actors.boot import Boot, Starter, Stores, build_stores, new_token
from actors.dispatch import OpDispatcher, job_lease
from actors.holds import Holds
from actors.job_sessions import JobSessions
from actors.placement import Placement
from actors.remote_caches import RemoteCaches
from actors.session_host import SessionServer
from actors.workers import Workers
from cluster import tracing
from cluster.digest import Digest
from cluster.errors import (
    ClusterError,
    InternalError,
    JobEndedError,
    JobNotFoundError,
    LeaseLostError,
    NeedsRemoteProvidersError,
    StaleFenceError,
)
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.cache_import import ImportedResult
from cluster.graph import Definition, decode_definition
from cluster.job import (
    ClaimedJob,
    ClaimState,
    JobClaim,
    JobEvent,
    JobId,
    JobSpec,
    JobState,
    JobWarning,
    VertexEvent,
    registries_of,
)
from cluster.job_result import TargetResult, encode_result
from cluster.metrics import JOB_SECONDS, JOBS, VERTICES
from cluster.ref import RefId
from cluster.solver.imported import ImportedKeys
from cluster.solver.runner import Solver
from cluster.solver.values import JobDone, JobFailed, JobOutcome, JobStopped, Result
from cluster.tracing import SpanKind
from cluster.wire import decode, encode_error
from storage.cache_keys import RedisKeyStore
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.presence import Presence
from storage.renewer import RedisFlightRenewer

log = structlog.get_logger()

#: Jobs taken at once.
_CLAIM = 16
#: Seconds between looks for jobs that nobody has; drivers say when they submit one.
_LOOK_S = 1.0
#: Renewals of a claim within its time.
_RENEWALS = 3
_PAUSE_S = 0.5
#: Times that a job is built anew because results were lost: each time, what was lost is known for the next.
_MAX_LOSSES = 3
_OUTCOMES = {JobDone: "done", JobFailed: "failed", JobStopped: "cancelled"}


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Everything a scheduler is made of."""

    stores: Stores
    jobs: RedisJobStore
    sessions: JobSessions
    dispatcher: OpDispatcher
    caches: RemoteCaches
    events: _FencedEvents
    solver: Solver


@dataclass(slots=True)
class _Run:
    """A job that this scheduler builds."""

    claim: JobClaim
    spec: JobSpec
    #: Another has it, or it has ended: nothing is told of it any more.
    is_lost: bool = False
    #: It is to end as soon as it can.
    is_stopping: bool = False
    #: Reads the caches that it names, before the solver knows of it.
    reading: asyncio.Task[None] | None = None
    #: All that was done for it here has ended.
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class SolverScheduler(SessionServer):
    """One solver scheduler. Drivers attend it for the sake of their jobs."""

    def __init__(self, boot: bytes) -> None:
        super().__init__()
        self._starter = Starter(decode("boot", Boot, boot))
        self._parts: _Parts | None = None
        self._runs: dict[JobId, _Run] = {}
        self._poked = asyncio.Event()

    async def _started(self) -> _Parts:
        await self._starter.start(self._build)
        if self._parts is None:
            raise RuntimeError("started without parts")
        return self._parts

    async def _build(self) -> Presence:
        boot = self._starter.boot
        config = boot.config
        stores = build_stores(config, name=boot.name)
        keys = Keys(config.farm.name)
        token = new_token()
        sessions = JobSessions(self._sessions, config, prefix=f"scheduler-{token}")
        holds = Holds(stores.leases, prefix=f"hold-{token}", ttl_s=config.cache.lease_ttl_s)
        placement = Placement(stores.presence, stores.whereabouts, ops_per_node=config.build.ops_per_node)
        workers = Workers(placement, farm=config.farm.name, version=boot.version)
        key_store: ImportedKeys[ImportedResult] = ImportedKeys(RedisKeyStore(stores.link, keys))
        events = _FencedEvents(RedisJobEvents(stores.link, keys), self._runs)
        caches = RemoteCaches(
            keys=key_store,
            cache=stores.cache,
            refs=stores.refs,
            sessions=sessions,
            workers=workers,
            tell=events.publish,
            deadline_s=config.flight.deadline_s,
        )
        dispatcher = OpDispatcher(
            name=f"{boot.name}/{token}",
            config=config,
            stores=stores,
            keys=key_store,
            sessions=sessions,
            holds=holds,
            renewer=RedisFlightRenewer(config.redis, keys),
            placement=placement,
            workers=workers,
            caches=caches,
            published=lambda job, vertex, wanted: solver.cache_opts(job, vertex, wanted),  # noqa: PLW0108 - made below
        )
        solver = Solver(dispatcher, key_store, events)
        self._parts = _Parts(
            stores=stores,
            jobs=RedisJobStore(stores.link, keys),
            sessions=sessions,
            dispatcher=dispatcher,
            caches=caches,
            events=events,
            solver=solver,
        )
        for work in (
            holds.renew_forever(),
            placement.renew_forever(),
            self._claim_forever(self._parts),
            self._renew_forever(self._parts),
        ):
            self._starter.background.spawn(work)
        JOBS.set(0)
        return stores.presence

    async def ready(self) -> bool:
        """Build what is needed and say so."""
        await self._started()
        return True

    async def look_for_jobs(self) -> None:
        """Look now for jobs that nobody has."""
        await self._started()
        self._poked.set()

    # -- claims ----------------------------------------------------------------------------------------------------

    async def _claim_forever(self, parts: _Parts) -> None:
        config = self._starter.boot.config.build
        while True:
            self._poked.clear()
            claimed: Sequence[ClaimedJob] = ()
            try:
                claimed = await parts.jobs.claim(self._starter.boot.name, ttl_s=config.claim_ttl_s, most=_CLAIM)
            except ClusterError as exc:
                log.warning("jobs.unclaimed", error=str(exc))
            for job in claimed:
                self._take(parts, job)
            if len(claimed) < _CLAIM:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._poked.wait()

    def _take(self, parts: _Parts, claimed: ClaimedJob) -> None:
        former = self._runs.get(claimed.claim.job)
        if former is not None and not former.is_lost:
            former.claim = claimed.claim  # its claim had lapsed, and nobody was faster
            return
        run = self._runs[claimed.claim.job] = _Run(claimed.claim, claimed.record.spec)
        JOBS.set(len(self._runs))
        self._starter.background.spawn(self._trace_job(parts, run, claimed, former))

    async def _renew_forever(self, parts: _Parts) -> None:
        ttl_s = self._starter.boot.config.build.claim_ttl_s
        lease_ttl_s = self._starter.boot.config.cache.lease_ttl_s
        while True:
            await asyncio.sleep(ttl_s / _RENEWALS)
            runs = [run for run in self._runs.values() if not run.is_lost]
            if not runs:
                continue
            try:
                states = await parts.jobs.renew([run.claim for run in runs], ttl_s=ttl_s)
                leases = (parts.stores.leases.renew(job_lease(run.claim.job), ttl_s=lease_ttl_s) for run in runs)
                await asyncio.gather(*leases, return_exceptions=True)
            except ClusterError as exc:
                log.warning("jobs.unrenewed", error=str(exc), jobs=len(runs))
                continue
            for run, state in zip(runs, states, strict=True):
                if state is ClaimState.HELD:
                    continue
                run.is_lost = state is ClaimState.LOST
                log.info("job.stopping", job=run.claim.job, why=state.value)
                run.is_stopping = True
                if run.reading is not None:
                    run.reading.cancel()
                parts.solver.cancel(run.claim.job)

    # -- one job ---------------------------------------------------------------------------------------------------

    async def _trace_job(self, parts: _Parts, run: _Run, claimed: ClaimedJob, former: _Run | None) -> None:
        """Build a job as a part of its driver's trace."""
        about = {tracing.JOB: run.spec.id}
        with tracing.continuing("job", run.spec.session.traceparent, about, kind=SpanKind.CONSUMER) as span:
            outcome = await self._build_job(parts, run, claimed, former)
            span.put({"lazyfarm.job.outcome": _OUTCOMES[type(outcome)]})
            if isinstance(outcome, JobFailed):
                span.end(outcome.error)

    async def _build_job(self, parts: _Parts, run: _Run, claimed: ClaimedJob, former: _Run | None) -> JobOutcome:
        job = run.claim.job
        if former is not None:
            # t=0  this scheduler is stopped for a while; another claims the job, and dies
            # t=5  this one learns that it has lost the job, and begins to stop what it does for it
            # t=6  it claims the job again: what is known here under its ID is still the first run's to forget
            await former.ended.wait()
        bound = log.bind(job=job, trace=run.spec.session.trace)
        started_s = time.monotonic()
        bound.info("job.started", fence=run.claim.fence, detached=run.spec.is_detached)
        try:
            await ahit(FaultPoint.JOB_CLAIMED)
            outcome = await self._outcome(parts, run, claimed)
            await ahit(FaultPoint.JOB_END_BEFORE)
            await self._end(parts, run, outcome)
        finally:
            parts.dispatcher.forget(job)
            parts.caches.forget(job)
            if self._runs.get(job) is run:
                del self._runs[job]
                JOBS.set(len(self._runs))
            run.ended.set()
        if not run.is_lost:
            JOB_SECONDS.observe(time.monotonic() - started_s, outcome=_OUTCOMES[type(outcome)])
        bound.info("job.complete", outcome=type(outcome).__name__, lost=run.is_lost)
        return outcome

    async def _outcome(self, parts: _Parts, run: _Run, claimed: ClaimedJob) -> JobOutcome:
        spec = run.spec
        if claimed.record.is_cancel_requested or claimed.record.is_abandoned:
            return JobStopped()
        try:
            definition = decode_definition(claimed.definition)
            labels = {"owner": "job", "job": spec.id}
            await parts.stores.leases.create(
                job_lease(spec.id), ttl_s=self._starter.boot.config.cache.lease_ttl_s, labels=labels
            )
            with parts.sessions.of(spec, registries_of(definition, spec.cache_from, spec.cache_to)):
                await self._read_caches(parts, run)
                return await self._solve(parts, run, definition)
        except ClusterError as exc:
            return JobFailed(exc, None)
        except Exception as exc:
            log.exception("job.bug", job=spec.id)
            return JobFailed(InternalError(f"job {spec.id}: {type(exc).__name__}: {exc}"), None)

    async def _read_caches(self, parts: _Parts, run: _Run) -> None:
        """Read the caches that a job names, unless it is to stop."""
        if not run.is_stopping:
            run.reading = asyncio.ensure_future(parts.caches.read(run.spec))
            try:
                await run.reading
            except asyncio.CancelledError:
                if not run.is_stopping:
                    raise

    async def _solve(self, parts: _Parts, run: _Run, definition: Definition) -> JobOutcome:
        """Build a job; again where layers that builds made prove to be gone: then what made them is no hit any more.

        Once more, too, where they are closed to it: others, whose vertices it shared, may be shown more than it is. To
        a job that is built apart, what is a hit to them is a miss, and is made for it.
        """
        spec, losses, is_apart = run.spec, 0, False
        while not run.is_stopping:
            outcome = await parts.solver.solve(spec.id, definition, no_cache=spec.no_cache, is_apart=is_apart)
            losses += 1
            if losses > _MAX_LOSSES or not isinstance(outcome, JobFailed):
                return outcome
            if await parts.dispatcher.has_lost(outcome.error):
                text = f"results are lost, and are made again: {outcome.error}"
            elif isinstance(outcome.error, NeedsRemoteProvidersError) and not is_apart:
                is_apart = True
                text = f"results of others are closed to this build, which makes its own: {outcome.error}"
            else:
                return outcome
            log.warning("job.again", job=spec.id, error=str(outcome.error))
            with contextlib.suppress(ClusterError):
                await parts.events.publish(spec.id, [JobWarning(text=text)])
        return JobStopped()

    async def _end(self, parts: _Parts, run: _Run, outcome: JobOutcome) -> None:
        """Record how a job has ended; while Redis is away, for as long as the job is this scheduler's."""
        state, error, results = _told(parts.caches, run.spec, outcome)
        config = self._starter.boot.config.cache
        keep_s = config.keep_s if run.spec.is_detached else config.lease_ttl_s
        while not run.is_lost:
            try:
                with contextlib.suppress(LeaseLostError):
                    await parts.stores.leases.renew(job_lease(run.claim.job), ttl_s=keep_s)
                await parts.jobs.end(run.claim, state, error=error, results=results)
            except (StaleFenceError, JobEndedError, JobNotFoundError) as exc:
                run.is_lost = True
                log.info("job.lost", job=run.claim.job, error=str(exc))
            except ClusterError as exc:
                log.warning("job.not_ended", job=run.claim.job, error=str(exc))
                await asyncio.sleep(_PAUSE_S)
            else:
                if isinstance(outcome, JobStopped):
                    with contextlib.suppress(ClusterError):  # it lapses by itself
                        await parts.stores.leases.delete(job_lease(run.claim.job))  # there is nothing to hand over
                return


class _FencedEvents:
    """Tells of vertices as the owner of their job."""

    def __init__(self, events: RedisJobEvents, runs: dict[JobId, _Run]) -> None:
        self._events = events
        self._runs = runs

    async def publish(self, job: JobId, events: Sequence[JobEvent]) -> None:
        """See :class:`cluster.solver.ports.JobEvents`."""
        run = self._runs.get(job)
        if run is not None and not run.is_lost:
            for event in events:
                if isinstance(event, VertexEvent) and event.state.is_end:
                    VERTICES.add(how=event.state.value)
            await self._events.publish(job, events, fence=run.claim.fence)


def _told(caches: RemoteCaches, spec: JobSpec, outcome: JobOutcome) -> tuple[JobState, bytes, dict[Digest, bytes]]:
    """Return what is recorded of how a job has ended."""
    match outcome:
        case JobDone(results=results):
            named = zip(spec.targets, results, strict=True)
            return JobState.DONE, b"", {target: _recorded(caches, spec, result) for target, result in named}
        case JobFailed(error=error):
            return JobState.FAILED, encode_error(error), {}
        case JobStopped():
            return JobState.CANCELLED, b"", {}


def _recorded(caches: RemoteCaches, spec: JobSpec, result: Result) -> bytes:
    ref = None if result.ref is None else RefId(result.ref)
    inline = () if ref is None else caches.inline(spec.id, ref)
    return encode_result(TargetResult(ref=ref, config=result.config, inline=inline))
