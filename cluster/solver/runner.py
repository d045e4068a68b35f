"""The solver on an event loop: performs what :class:`cluster.solver.state.SolverState` decides, and decides nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, assert_never

import structlog

from cluster import tracing, wire
from cluster.digest import Digest
from cluster.errors import ClusterError, DeadlineExceededError, InternalError, UnavailableError
from cluster.graph import Definition, Vertex
from cluster.job import JobId, VertexEvent, VertexState
from cluster.solver.ports import JobEvents, KeyStore, OpRunner
from cluster.solver.state import SolverState, SolverStatistics
from cluster.solver.values import (
    Answer,
    Began,
    CacheMap,
    ComputeContentKey,
    ContentKeyed,
    EndJob,
    Event,
    Exportable,
    Failed,
    Found,
    GetCacheMap,
    HoldId,
    Instruction,
    JobCancelled,
    JobOutcome,
    JobSubmitted,
    Keep,
    Kept,
    Load,
    Loaded,
    LookUp,
    Mapped,
    NotLoadable,
    Publish,
    Ran,
    Release,
    Report,
    Run,
    Stop,
    Stopped,
    TaskId,
)
from cluster.tracing import NOTHING, Span

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: Events that are told together: the port takes some hundreds.
_TOLD_AT_ONCE = 500

#: Instructions that are answered.
_Ask = GetCacheMap | LookUp | Load | ComputeContentKey | Run | Keep
#: What their spans are called.
_SPANS = {
    GetCacheMap: "cache map",
    LookUp: "cache lookup",
    Load: "load",
    ComputeContentKey: "content key",
    Run: "run",
    Keep: "keep",
}


@dataclass(frozen=True, slots=True)
class _Use:
    """A :class:`cluster.solver.ports.VertexUse`."""

    vertex: Vertex
    job: JobId
    hold: HoldId
    beneficiaries: Callable[[], tuple[JobId, ...]]
    began: Callable[..., None]


@dataclass(slots=True, eq=False)
class _Watch:
    """Who waits for a job, and what is still to be told of it."""

    ended: asyncio.Future[JobOutcome]
    untold: list[VertexEvent] = field(default_factory=list)
    #: What the job is a part of, and the spans of its vertices that are under way.
    span: Span = NOTHING
    vertices: dict[Digest, Span] = field(default_factory=dict)
    #: The job has come to this, once all of it is told.
    outcome: JobOutcome | None = None
    teller: asyncio.Task[None] | None = None

    def of(self, vertex: Digest) -> Span:
        """Return the span of a vertex, which begins with what is first asked or told of it."""
        if self.span is NOTHING:
            return NOTHING
        found = self.vertices.get(vertex)
        if found is None:
            found = self.vertices[vertex] = tracing.start("vertex", self.span, {tracing.VERTEX: vertex})
        return found

    def end_spans(self) -> None:
        """End what others' work began anew after its end for this job."""
        while self.vertices:
            self.vertices.popitem()[1].end()


class Solver:
    """Builds definitions, for many jobs at once, on one event loop.

    Args:
        ops: Carries ops out.
        keys: Finds results by keys.
        events: Is told of every vertex.
        max_running: Most ops that run at once.
        max_running_per_job: Most of them on one job's behalf.
        max_asking: Most other calls (cache maps, lookups, loads, content keys) at once.
    """

    def __init__(
        self,
        ops: OpRunner,
        keys: KeyStore,
        events: JobEvents,
        *,
        max_running: int = 64,
        max_running_per_job: int = 32,
        max_asking: int = 128,
    ) -> None:
        self._ops = ops
        self._keys = keys
        self._events = events
        self._max_asking = max_asking
        self._state = SolverState(max_running=max_running, max_running_per_job=max_running_per_job)
        self._jobs: dict[JobId, _Watch] = {}
        #: What is being done, by task.
        self._tasks: dict[TaskId, asyncio.Task[Answer]] = {}
        #: What is not begun yet, by task, in order.
        self._waiting: dict[TaskId, _Ask] = {}
        #: The spans of runs that are under way, and the jobs that they are told to, by vertex.
        self._runs: dict[Digest, tuple[JobId, Span]] = {}
        #: How many of the tasks are no runs.
        self._asking = 0
        #: What nobody's answer depends on: further keys, releases, tellers.
        self._chores: set[asyncio.Task[None]] = set()
        self._inbox: deque[Event] = deque()
        self._closed: UnavailableError | None = None

    def submit(
        self, job: JobId, definition: Definition, *, no_cache: Sequence[Digest] = (), is_apart: bool = False
    ) -> None:
        """Begin a job, sharing no vertex with others if *is_apart*; :meth:`wait` tells how it ends.

        Raises:
            UnavailableError: this solver is closed.
            InternalError: a job of that ID goes on.
        """
        if self._closed is not None:
            raise self._closed
        if job in self._jobs:
            raise InternalError(f"job {job} is submitted while it goes on")
        self._jobs[job] = _Watch(asyncio.get_running_loop().create_future(), span=tracing.current())
        self._feed(JobSubmitted(job, definition, frozenset(no_cache), is_apart))

    async def wait(self, job: JobId) -> JobOutcome:
        """Return how a job that goes on has ended, when all of it is told. Its cancellation does not end the job.

        Raises:
            UnavailableError: no such job goes on here, or this solver was closed.
        """
        watch = self._jobs.get(job)
        if watch is None:
            raise UnavailableError(f"job {job}", "it does not go on in this scheduler")
        return await asyncio.shield(watch.ended)

    async def solve(
        self, job: JobId, definition: Definition, *, no_cache: Sequence[Digest] = (), is_apart: bool = False
    ) -> JobOutcome:
        """Submit a job and wait for its end."""
        self.submit(job, definition, no_cache=no_cache, is_apart=is_apart)
        return await self.wait(job)

    def cancel(self, job: JobId) -> None:
        """Let a job end as cancelled; does nothing where it has ended."""
        self._feed(JobCancelled(job))

    def has_job(self, job: JobId) -> bool:
        """Tell whether a job goes on, or has not been told of to its end."""
        return job in self._jobs

    def cache_opts(self, job: JobId, vertex: Digest, wanted: Sequence[str]) -> dict[str, bytes]:
        """Return what is found of the opts *wanted*, from *vertex* down; nothing once the job has ended."""
        return self._state.cache_opts(job, vertex, wanted)

    def exportable(self, job: JobId) -> tuple[Exportable, ...]:
        """Return what an export of the job's cache may say, while its results are being kept; else nothing."""
        return self._state.exportable(job)

    def statistics(self) -> SolverStatistics:
        """Return a snapshot."""
        return self._state.statistics()

    async def aclose(self, deadline_s: float) -> None:
        """Let go of all jobs, without an outcome and without telling of them, and stop what is under way. Idempotent.

        Raises:
            DeadlineExceededError: something did not end within *deadline_s* seconds; it was cancelled.
        """
        self._closed = self._closed or UnavailableError("solver", "it is being closed")
        watches, self._jobs = self._jobs, {}
        for watch in watches.values():
            watch.end_spans()
            if not watch.ended.done():
                watch.ended.set_exception(self._closed)
                watch.ended.exception()  # it may be that nobody waits
        for job in self._state.jobs():
            self._feed(JobCancelled(job))
        await asyncio.sleep(0)  # answers that are there already come in
        under_way = {*self._tasks.values(), *self._chores}
        if not under_way:
            return
        _, stuck = await asyncio.wait(under_way, timeout=deadline_s)
        for task in stuck:
            task.cancel()
        if stuck:
            raise DeadlineExceededError("solver", f"{len(stuck)} task(s) did not end within {deadline_s:g} s")

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<Solver: {now.jobs} jobs, {now.edges} vertices, {now.running} running, {now.tasks} tasks>"

    # -- events and instructions ----------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """Give the state an event, and perform what it instructs; an event that comes of that waits for its turn."""
        self._inbox.append(event)
        while self._inbox:
            for instruction in self._state.handle(self._inbox.popleft()):
                self._perform(instruction)
        self._begin_waiting()

    def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case Run():
                self._begin(instruction)
            case GetCacheMap() | LookUp() | Load() | ComputeContentKey() | Keep():
                self._waiting[instruction.task] = instruction
            case Stop(task):
                self._stop(task)
            case Report():
                self._report(instruction)
            case EndJob(job, outcome):
                if (watch := self._jobs.get(job)) is not None:
                    watch.outcome = outcome
                    self._tell(job, watch)
            case Publish(keys, result):
                self._chore("publish", self._keys.publish(keys, result))
            case Release(hold):
                self._chore("release", self._ops.release(hold))
            case _:
                assert_never(instruction)

    def _stop(self, task: TaskId) -> None:
        if self._waiting.pop(task, None) is not None:
            self._inbox.append(Stopped(task))
        elif (doing := self._tasks.get(task)) is not None:
            doing.cancel()
        # Else its answer is there, and comes with the loop's next turn.

    def _begin_waiting(self) -> None:
        while self._waiting and self._asking < self._max_asking:
            ask = self._waiting.pop(next(iter(self._waiting)))
            self._asking += 1
            if isinstance(ask, GetCacheMap) and (known := self._try_cache_map(ask)) is not None:
                # No task for what takes no waiting: graphs have thousands of these. But not all of them in one turn of
                # the loop either, on which claims are renewed and sessions answered meanwhile.
                asyncio.get_running_loop().call_soon(self._on_known, Mapped(ask.task, known))
            else:
                self._begin(ask)

    def _try_cache_map(self, ask: GetCacheMap) -> CacheMap | None:
        try:
            return self._ops.try_cache_map(ask.vertex)
        except Exception:  # noqa: BLE001 - it is asked for again by a task, whose answer a bug is
            return None

    def _on_known(self, answer: Mapped) -> None:
        self._asking -= 1
        self._feed(answer)

    def _begin(self, ask: _Ask) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(ask))
        self._tasks[ask.task] = task
        # A callback, not a `finally` in the coroutine: a task that is cancelled before its first step never
        # enters its body, and would never answer.
        task.add_done_callback(partial(self._on_done, ask))

    def _on_done(self, ask: _Ask, task: asyncio.Task[Answer]) -> None:
        del self._tasks[ask.task]
        if isinstance(ask, Run):
            self._runs.pop(ask.vertex.digest, None)
        else:
            self._asking -= 1
        if task.cancelled():
            error = InternalError(f"{type(ask).__name__} was cancelled while it was waited for")
            # Where it was told to stop, any answer is its end.
            self._feed(Failed(ask.task, error))
            return
        self._feed(task.result())

    # -- what is asked --------------------------------------------------------------------------------------------

    async def _answer(self, ask: _Ask) -> Answer:
        """Do what is asked; whatever comes of it is an answer, so that it neither ends the loop nor hangs a job."""
        try:
            with tracing.within(self._span_for(ask)), tracing.span(_SPANS[type(ask)]) as span:
                if isinstance(ask, Run) and span is not NOTHING:
                    self._runs[ask.vertex.digest] = ask.job, span
                answer = await self._ask(ask)
                if isinstance(answer, Ran):
                    span.put({"lazyfarm.cached": answer.was_cached})
                elif isinstance(answer, Found):
                    span.put({"lazyfarm.records": len(answer.records)})
                return answer
        except ClusterError as exc:
            return Failed(ask.task, exc)
        except Exception as exc:  # noqa: BLE001 - a bug in an op must end its jobs, not hang them
            _log.exception("solver.bug", asked=type(ask).__name__)
            return Failed(ask.task, InternalError(f"{type(ask).__name__}: {type(exc).__name__}: {exc}"))

    def _span_for(self, ask: _Ask) -> Span:
        """Return the span of the vertex that something is asked for, in the trace of the job that wants it first."""
        if not tracing.is_installed():
            return NOTHING
        job = next(iter(self._state.beneficiaries(ask.task)), None) if isinstance(ask, LookUp) else ask.job
        watch = None if job is None else self._jobs.get(job)
        if watch is None:
            return NOTHING
        vertex = self._state.vertex_of(ask.task)
        return watch.span if vertex is None else watch.of(vertex)

    async def _ask(self, ask: _Ask) -> Answer:
        match ask:
            case GetCacheMap(task, job, vertex):
                return Mapped(task, await self._ops.cache_map(job, vertex))
            case LookUp(task, keys):
                return Found(task, tuple(await self._keys.lookup(keys)))
            case Load():
                return await self._load(ask)
            case ComputeContentKey():
                key = partial(self._ops.content_key, self._use(ask), ask.index, ask.input)
                return ContentKeyed(ask.task, await self._with_opts(ask.job, ask.vertex, key))
            case Run():
                run = partial(self._ops.run, self._use(ask), ask.inputs, ask.keys, ignores_cache=ask.ignores_cache)
                ran = await self._with_opts(ask.job, ask.vertex, run)
                return Ran(ask.task, ran.result, ran.was_cached)
            case Keep(task, job, results):
                for vertex, result in results:
                    await self._with_opts(job, vertex, partial(self._ops.keep, job, vertex, result))
                await self._ops.finish(job, self.exportable(job))
                return Kept(task)
            case _:
                assert_never(ask)

    async def _load(self, ask: Load) -> Answer:
        load = partial(self._ops.load, self._use(ask), ask.record)
        try:
            result = await self._with_opts(ask.job, ask.vertex, load)
        except ClusterError as exc:
            _log.warning("solver.not_loadable", vertex=ask.vertex.digest, record=ask.record.id, error=str(exc))
            return NotLoadable(ask.task)
        return NotLoadable(ask.task) if result is None else Loaded(ask.task, result)

    def _use(self, ask: Load | ComputeContentKey | Run) -> _Use:
        return _Use(
            ask.vertex,
            ask.job,
            ask.hold,
            beneficiaries=partial(self._state.beneficiaries, ask.task),
            began=lambda node="": self._feed(Began(ask.task, node)),
        )

    async def _with_opts(self, job: JobId, vertex: Vertex, call: Callable[[Mapping[str, bytes]], Awaitable[T]]) -> T:
        """Call, and once more with the cache opts that the first call lacked, where any are found."""
        try:
            return await call({})
        except ClusterError as exc:
            opts = self._state.cache_opts(job, vertex.digest, exc.needed_opts) if exc.needed_opts else {}
            if not opts:
                raise
        return await call(opts)

    # -- what is told ---------------------------------------------------------------------------------------------

    def _report(self, report: Report) -> None:
        watch = self._jobs.get(report.job)
        if watch is None:
            return
        error = b"" if report.error is None else wire.encode_error(report.error)
        event = VertexEvent(vertex=report.vertex, name=report.name, state=report.state, error=error, node=report.node)
        watch.untold.append(event)
        if watch.span is not NOTHING:
            self._trace(report, watch)
        self._tell(report.job, watch)

    def _trace(self, report: Report, watch: _Watch) -> None:
        """Have a vertex's span begin, move on and end with what is reported of it."""
        span = watch.of(report.vertex)
        if report.state is VertexState.RUNNING:
            if report.node:
                span.put({tracing.NODE: report.node})
            job, run = self._runs.get(report.vertex, (report.job, NOTHING))
            if job != report.job:
                span.link(run.traceparent)  # one run for several jobs is told in one's trace
        elif report.state.is_end:
            del watch.vertices[report.vertex]
            span.put({"lazyfarm.vertex.name": report.name, "lazyfarm.vertex.state": report.state.value})
            span.end(report.error if report.state is not VertexState.CANCELLED else asyncio.CancelledError())

    def _tell(self, job: JobId, watch: _Watch) -> None:
        if watch.teller is None:
            watch.teller = self._chore("tell", self._tell_all(job, watch))

    async def _tell_all(self, job: JobId, watch: _Watch) -> None:
        """Tell of a job, in order and many events at a time, until there is nothing to tell; then end it if it has."""
        while watch.untold:
            events, watch.untold = watch.untold[:_TOLD_AT_ONCE], watch.untold[_TOLD_AT_ONCE:]
            try:
                await self._events.publish(job, events)
            except Exception as exc:  # noqa: BLE001 - the job is worth more than what is seen of it
                _log.warning("solver.untold", job=job, events=len(events), error=str(exc))
        watch.teller = None
        if watch.outcome is not None and self._jobs.get(job) is watch:
            del self._jobs[job]
            watch.end_spans()
            watch.ended.set_result(watch.outcome)

    def _chore(self, what: str, doing: Awaitable[object]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(_do_chore(what, doing))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task


async def _do_chore(what: str, doing: Awaitable[object]) -> None:
    try:
        await doing
    except ClusterError as exc:
        _log.warning("solver.chore_failed", chore=what, error=str(exc))
    except Exception:  # noqa: BLE001 - nobody awaits it: said here or nowhere
        _log.exception("solver.bug", asked=what)
