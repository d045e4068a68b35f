"""Verified fakes of what the solver keeps in Redis; see :mod:`storage.memory`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.digest import Digest
from cluster.errors import (
    DeadlineExceededError,
    InternalError,
    JobEndedError,
    JobIdTakenError,
    JobNotFoundError,
    StaleFenceError,
)
from cluster.job import (
    ClaimedJob,
    ClaimState,
    JobClaim,
    JobEnded,
    JobEvent,
    JobId,
    JobRecord,
    JobSpec,
    JobState,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    encode_event,
)
from cluster.messages import ActorRecord, NodeRecord
from cluster.progress import LayerPhase, ProgressItem
from cluster.solver.values import CacheRecord, Result
from cluster.solver_ports import ARRIVING_S, ATTENDED_S, HERE_S, Located
from storage.cache_keys import RECORDS, name_result
from storage.job_events import GIVEN_UP, LOG_BYTES, STEPS
from storage.presence import DRAIN_GONE_S, PRESENCE_TTL_S

#: What one publication is later than the one before at least: a Redis does one script at a time.
_TICK_S = 1e-6
_KEPT_S = 7 * 24 * 3600.0


@dataclass(slots=True)
class _Job:
    """A job, as Redis holds it in several keys."""

    record: JobRecord
    definition: bytes
    #: Until when its owner holds it, or since when nobody does.
    held_s: float
    #: Until when its driver is taken to be there; None: it is detached.
    attended_s: float | None
    fence: int = 0
    events: list[JobEvent] = field(default_factory=list)
    log_bytes: int = 0
    steps: int = 0
    cut: set[Digest] = field(default_factory=set)
    #: What was told last of each layer of each vertex.
    layers: dict[tuple[Digest, str], ProgressItem] = field(default_factory=dict)


class SolverMemory:
    """What one Redis would hold of the solver's."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._last_s = 0.0
        self.fence = 0
        #: Cache key to the records under it, least recently published first.
        self.keys: dict[Digest, list[str]] = {}
        self.records: dict[str, CacheRecord] = {}
        #: Chain ID and node to when it was noted that the node has the snapshot, or is getting it.
        self.here: dict[tuple[Digest, str], float] = {}
        self.arriving: dict[tuple[Digest, str], float] = {}
        #: Node to its runs of ops, each with the time until which it is believed.
        self.ops: dict[str, dict[str, float]] = {}
        #: The nodes as they were announced; and those that drain, each with when it was last one of them.
        self.nodes: list[NodeRecord] = []
        self.draining: dict[str, float] = {}
        #: Actors by name, each with the time until which it is taken to be there.
        self.actors: dict[str, tuple[ActorRecord, float]] = {}
        self._jobs: dict[JobId, _Job] = {}
        self.came = asyncio.Event()

    def now_s(self) -> float:
        """Return the store's time."""
        return self._now_s()

    def stamp_s(self) -> float:
        """Return a time later than any returned before."""
        self._last_s = max(self._now_s(), self._last_s + _TICK_S)
        return self._last_s

    def next_fence(self) -> int:
        """Return a fence number greater than any before."""
        self.fence += 1
        return self.fence

    @property
    def jobs(self) -> dict[JobId, _Job]:
        """Return the jobs, but for those that ended too long ago."""
        since_s = self.now_s() - _KEPT_S
        for job_id, job in list(self._jobs.items()):
            if job.record.ended_wall_s is not None and job.record.ended_wall_s <= since_s:
                del self._jobs[job_id]
        return self._jobs

    def job(self, job_id: JobId) -> _Job:
        """Return a job; JobNotFoundError if it is unknown."""
        if (job := self.jobs.get(job_id)) is None:
            raise JobNotFoundError(job_id)
        return job

    def tell(self, job: _Job, event: JobEvent) -> None:
        """Append an event, and wake those who follow."""
        job.events.append(replace(event, wall_s=self.now_s()))
        self.came.set()
        self.came = asyncio.Event()

    def end(
        self, job: _Job, state: JobState, error: bytes = b"", results: Mapping[Digest, bytes] | None = None
    ) -> None:
        """End a job that goes on."""
        ended_s = self.stamp_s()
        job.record = replace(job.record, state=state, ended_wall_s=ended_s, error=error, results=dict(results or {}))
        self.tell(job, JobEnded(state=state, error=error))


class MemoryKeyStore:
    """Fake of :class:`storage.cache_keys.RedisKeyStore`; it keeps keys for ever."""

    def __init__(self, memory: SolverMemory) -> None:
        self._memory = memory

    async def lookup(self, keys: Sequence[Digest]) -> list[CacheRecord]:
        """Return the records under any of *keys*, most recent first."""
        ids = {record_id for key in keys for record_id in self._memory.keys.get(key, [])}
        found = [self._memory.records[record_id] for record_id in ids if record_id in self._memory.records]
        return sorted(found, key=lambda record: record.created_wall_s, reverse=True)

    async def publish(self, keys: Sequence[Digest], result: Result) -> CacheRecord:
        """Record *result* under each of *keys*."""
        record_id, _ = name_result(result)
        record = CacheRecord(id=record_id, result=result, created_wall_s=self._memory.stamp_s())
        self._memory.records[record_id] = record
        for key in keys:
            others = [other for other in self._memory.keys.get(key, []) if other != record_id]
            self._memory.keys[key] = [*others, record_id][-RECORDS:]
        return record

    async def forget(self, record: CacheRecord) -> bool:
        """Forget a record, unless it was published again."""
        if self._memory.records.get(record.id) != record:
            return False
        del self._memory.records[record.id]
        for ids in self._memory.keys.values():
            if record.id in ids:
                ids.remove(record.id)
        return True


class MemoryJobStore:
    """Fake of :class:`storage.jobs.RedisJobStore`."""

    def __init__(self, memory: SolverMemory) -> None:
        self._memory = memory

    async def submit(self, spec: JobSpec, definition: bytes) -> JobRecord:
        """Record a job with its definition's payload."""
        memory = self._memory
        if (known := memory.jobs.get(spec.id)) is not None:
            if known.record.spec != spec or known.definition != definition:
                raise JobIdTakenError(spec.id)
            return self._read(known)
        job = _Job(
            record=JobRecord(spec=spec, state=JobState.QUEUED, created_wall_s=memory.stamp_s()),
            definition=definition,
            held_s=memory.now_s(),
            attended_s=None if spec.is_detached else memory.now_s() + ATTENDED_S,
        )
        memory.jobs[spec.id] = job
        return self._read(job)

    async def claim(self, owner: str, *, ttl_s: float, most: int) -> list[ClaimedJob]:
        """Claim jobs that nobody holds."""
        now_s, claimed = self._memory.now_s(), []
        jobs = [job for job in self._memory.jobs.values() if not job.record.state.is_end and job.held_s <= now_s]
        for job in sorted(jobs, key=lambda job: job.held_s)[:most]:
            job.fence = self._memory.next_fence()
            job.held_s = now_s + ttl_s
            job.record = replace(job.record, state=JobState.RUNNING, owner=owner)
            claim = JobClaim(job=job.record.id, owner=owner, fence=job.fence)
            claimed.append(ClaimedJob(claim=claim, record=self._read(job), definition=job.definition))
        return claimed

    async def renew(self, claims: Sequence[JobClaim], *, ttl_s: float) -> list[ClaimState]:
        """Hold claimed jobs for longer."""
        return [self._renew(claim, ttl_s) for claim in claims]

    async def end(
        self, claim: JobClaim, state: JobState, *, error: bytes = b"", results: Mapping[Digest, bytes] | None = None
    ) -> None:
        """End a job."""
        job = self._memory.job(claim.job)
        is_owner, ended = job.fence == claim.fence, job.record
        if ended.state.is_end:
            if is_owner and (ended.state, ended.error, ended.results) == (state, error, dict(results or {})):
                return
            raise JobEndedError(claim.job, ended.state.value)
        if not is_owner:
            raise StaleFenceError(f"job:{claim.job}", claim.fence)
        self._memory.end(job, state, error, results)

    async def request_cancel(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled."""
        found = self._memory.job(job)
        if not found.record.state.is_end:
            found.record = replace(found.record, is_cancel_requested=True)
            if found.record.state is JobState.QUEUED:
                self._memory.end(found, JobState.CANCELLED)
        return found.record.state

    async def attend(self, job: JobId) -> JobState:
        """Tell that a job's driver is there."""
        found = self._memory.job(job)
        if found.attended_s is not None:
            found.attended_s = self._memory.now_s() + ATTENDED_S
        return found.record.state

    async def get(self, job: JobId) -> JobRecord:
        """Return a job."""
        return self._read(self._memory.job(job))

    async def find(self, start: str, *, most: int = 100) -> list[JobId]:
        """Return the jobs whose IDs begin with *start*."""
        newest = sorted(self._memory.jobs.values(), key=lambda job: job.record.created_wall_s, reverse=True)
        return [job.record.id for job in newest if job.record.id.startswith(start)][:most]

    async def definition(self, job: JobId) -> bytes:
        """Return the payload of a job's definition."""
        return self._memory.job(job).definition

    async def jobs(self, *, most: int = 100) -> list[JobRecord]:
        """Return the newest jobs."""
        newest = sorted(self._memory.jobs.values(), key=lambda job: job.record.created_wall_s, reverse=True)
        return [self._read(job) for job in newest[:most]]

    def _renew(self, claim: JobClaim, ttl_s: float) -> ClaimState:
        job = self._memory.jobs.get(claim.job)
        if job is None or job.fence != claim.fence or job.record.state.is_end:
            return ClaimState.LOST
        job.held_s = self._memory.now_s() + ttl_s
        if job.record.is_cancel_requested:
            return ClaimState.CANCEL
        return ClaimState.ABANDONED if self._is_abandoned(job) else ClaimState.HELD

    def _is_abandoned(self, job: _Job) -> bool:
        is_gone = job.attended_s is not None and job.attended_s <= self._memory.now_s()
        return is_gone and not job.record.state.is_end

    def _read(self, job: _Job) -> JobRecord:
        return replace(job.record, is_abandoned=self._is_abandoned(job))


class MemoryJobEvents:
    """Fake of :class:`storage.job_events.RedisJobEvents`."""

    def __init__(self, memory: SolverMemory, *, log_bytes: int = LOG_BYTES, steps: int = STEPS) -> None:
        self._memory = memory
        self._log_bytes = log_bytes
        self._steps = steps

    async def publish(self, job: JobId, events: Sequence[JobEvent], *, fence: int | None = None) -> None:
        """Append *events*."""
        if any(isinstance(event, JobEnded) for event in events):
            raise InternalError("the end of a job is told by who ends it")
        found = self._memory.job(job)
        if fence is not None and fence != found.fence:
            raise StaleFenceError(f"job:{job}", fence)
        if found.record.state.is_end:
            return
        for event in events:
            if (kept := self._kept(found, event)) is not None:
                self._memory.tell(found, kept)

    async def told(self, job: JobId) -> list[JobEvent]:
        """Return the job's events so far."""
        return list(self._memory.job(job).events)

    async def follow(self, job: JobId, *, deadline_s: float) -> AsyncIterator[JobEvent]:
        """Yield the job's events from the first one to the last one."""
        events, read = self._memory.job(job).events, 0
        ends_s = asyncio.get_running_loop().time() + deadline_s
        while True:
            came = self._memory.came
            for event in events[read:]:
                read += 1
                yield event
                if isinstance(event, JobEnded):
                    return
            if read < len(events):
                continue
            try:
                async with asyncio.timeout_at(ends_s):
                    await came.wait()
            except TimeoutError as exc:
                raise DeadlineExceededError(f"the end of job {job}", f"it has not ended in {deadline_s:g} s") from exc

    def _kept(self, job: _Job, event: JobEvent) -> JobEvent | None:
        if isinstance(event, VertexLog):
            size = len(encode_event(event)[1])
            if event.vertex in job.cut:
                return None
            if job.log_bytes + size > self._log_bytes:
                job.cut.add(event.vertex)
                return VertexLogDropped(vertex=event.vertex)
            job.log_bytes += size
        elif isinstance(event, VertexLayers):
            key = (event.vertex, event.item.item)
            if not _takes_on(job.layers.get(key), event.item):
                return None
            if not event.item.phase.is_end:
                if job.steps >= self._steps:
                    return None
                job.steps += 1
            job.layers[key] = event.item
        return event


def _takes_on(last: ProgressItem | None, now: ProgressItem) -> bool:
    """Tell whether it is worth telling that a layer has come from *last* to *now*."""
    if last is None:
        return True
    if last.phase.is_end and last.phase not in GIVEN_UP:
        return False
    if now.phase.is_end:
        return not (last.phase in GIVEN_UP and now.phase in GIVEN_UP)
    if last.phase.is_end:
        return True
    if now.phase is not last.phase:
        return now.phase is not LayerPhase.WAITING
    return now.current_bytes > last.current_bytes


class MemoryWhereabouts:
    """Fake of :class:`storage.whereabouts.RedisWhereabouts`."""

    def __init__(self, memory: SolverMemory) -> None:
        self._memory = memory

    async def note_arriving(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node is getting snapshots."""
        self._note(node, chains, self._memory.arriving, self._memory.here)

    async def note_here(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has snapshots."""
        self._note(node, chains, self._memory.here, self._memory.arriving)

    async def note_gone(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has snapshots no more."""
        for chain in chains:
            self._memory.here.pop((chain, node), None)
            self._memory.arriving.pop((chain, node), None)

    async def forget_node(self, node: str) -> None:
        """Forget all snapshots of a node."""
        for notes in (self._memory.here, self._memory.arriving):
            for key in [key for key in notes if key[1] == node]:
                del notes[key]

    async def begin_op(self, node: str, run_id: str, *, ttl_s: float) -> None:
        """Say that an op runs on the node."""
        self._memory.ops.setdefault(node, {})[run_id] = self._memory.now_s() + ttl_s

    async def end_op(self, node: str, run_id: str) -> None:
        """Say that an op runs there no more."""
        self._memory.ops.get(node, {}).pop(run_id, None)

    async def find(self, chains: Sequence[Digest], nodes: Sequence[str]) -> Located:
        """Return what is known."""
        now_s = self._memory.now_s()

        def believed(notes: dict[tuple[Digest, str], float], ttl_s: float) -> dict[Digest, frozenset[str]]:
            never_s = now_s - ttl_s
            return {c: frozenset(n for n in nodes if notes.get((c, n), never_s) > never_s) for c in chains}

        return Located(
            here=believed(self._memory.here, HERE_S),
            arriving=believed(self._memory.arriving, ARRIVING_S),
            running={
                node: sum(until_s > now_s for until_s in self._memory.ops.get(node, {}).values()) for node in nodes
            },
        )

    def _note(
        self,
        node: str,
        chains: Sequence[Digest],
        noted: dict[tuple[Digest, str], float],
        other: dict[tuple[Digest, str], float],
    ) -> None:
        for chain in chains:
            noted[chain, node] = self._memory.now_s()
            other.pop((chain, node), None)


class MemoryPresence:
    """Fake of :class:`storage.presence.Presence`, but for its pulse."""

    def __init__(self, memory: SolverMemory) -> None:
        self._memory = memory

    async def announce(self, actor: ActorRecord) -> None:
        """Say that *actor* is there, for the next few seconds."""
        self._memory.actors[actor.name] = actor, self._memory.now_s() + PRESENCE_TTL_S

    async def actors(self) -> list[ActorRecord]:
        """Return the actors, ``lost`` where one has been silent for too long."""
        now_s = self._memory.now_s()
        judged = (r if until_s > now_s else replace(r, state="lost") for r, until_s in self._memory.actors.values())
        return sorted(judged, key=lambda r: (r.kind, r.name))

    async def announce_nodes(self, nodes: Sequence[NodeRecord]) -> None:
        """Say which nodes the cluster has; one that has been none of them for an hour drains no more."""
        memory, now_s = self._memory, self._memory.now_s()
        memory.nodes = list(nodes)
        named = {node.id for node in nodes}
        seen = {node: now_s if node in named else seen_s for node, seen_s in memory.draining.items()}
        memory.draining = {node: seen_s for node, seen_s in seen.items() if seen_s >= now_s - DRAIN_GONE_S}

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes as they were announced last, and which of them drain."""
        return [replace(node, draining=node.id in self._memory.draining) for node in self._memory.nodes]

    async def drain(self, node: str) -> None:
        """Have a node get nothing new to do, until :meth:`undrain`."""
        self._memory.draining[node] = self._memory.now_s()

    async def undrain(self, node: str) -> bool:
        """Have a node take work again; tell whether it drained."""
        return self._memory.draining.pop(node, None) is not None
