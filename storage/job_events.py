"""Streams of jobs' events in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from cluster import wire
from cluster.errors import (
    DeadlineExceededError,
    InternalError,
    JobNotFoundError,
    StaleFenceError,
    UnavailableError,
    WireError,
)
from cluster.job import (
    JobEnded,
    JobEvent,
    JobId,
    JobWarning,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    decode_event,
    encode_event,
)
from cluster.progress import LayerPhase, ProgressItem
from storage.keys import Keys
from storage.link import RedisLink
from storage.protocol import Argument

#: Bytes of log events that a job's stream keeps.
LOG_BYTES = 16 << 20
#: Steps of layers, but for their ends, that it keeps.
STEPS = 20_000
#: Ends of layers that say nothing of others who wait for the same one.
GIVEN_UP = frozenset({LayerPhase.CANCELLED, LayerPhase.FAILED})
#: Events read at once.
_READ = 500
#: Seconds that one blocking read lasts; far below the link's deadline.
_BLOCK_S = 2.0
#: Seconds that Redis may be away while somebody looks on: a restart or a fail-over takes less. And a breath between.
_AWAY_S = 300.0
_PAUSE_S = 0.2


class RedisJobEvents:
    """Implements :class:`cluster.solver_ports.JobEvents` with one Redis stream a job."""

    def __init__(self, link: RedisLink, keys: Keys, *, log_bytes: int = LOG_BYTES, steps: int = STEPS) -> None:
        self._link = link
        self._keys = keys
        self._log_bytes = log_bytes
        self._steps = steps

    async def publish(self, job: JobId, events: Sequence[JobEvent], *, fence: int | None = None) -> None:
        """Append *events*."""
        limits = ("" if fence is None else fence, self._log_bytes, self._steps, wire.VERSION)
        told = [part for event in events for part in _arguments(event)]
        match await self._link.run("job_tell", self._keys.prefix, job, *limits, *told, may_repeat=True):
            case b"unknown":
                raise JobNotFoundError(job)
            case b"stale":
                raise StaleFenceError(f"job:{job}", fence or 0)

    async def told(self, job: JobId) -> list[JobEvent]:
        """Return the job's events so far."""
        await self._check(job)
        events, start = [], b"-"
        while True:
            command = ("XRANGE", self._keys.job_events(job), start, "+", "COUNT", _READ)
            read = await self._link.execute(*command, may_repeat=True)
            events += [event for entry_id, fields in read if (event := _event(entry_id, fields)) is not None]
            if len(read) < _READ:
                return events
            start = b"(" + read[-1][0]

    async def follow(self, job: JobId, *, deadline_s: float) -> AsyncIterator[JobEvent]:
        """Yield the job's events from the first one to the last one, and a warning where Redis is away meanwhile."""
        ends_s = time.monotonic() + deadline_s
        key = self._keys.job_events(job)
        last = b"0"
        # A blocking read holds up whatever comes after it on its connection.
        link = self._link.clone()
        block_s = min(_BLOCK_S, link.address.timeout_s / 3)
        try:
            await self._check(job)
            away_since_s: float | None = None
            while (left_s := ends_s - time.monotonic()) > 0:
                block_ms = max(1, int(min(block_s, left_s) * 1000))  # 0 would be for ever
                command = ("XREAD", "COUNT", _READ, "BLOCK", block_ms, "STREAMS", key, last)
                try:
                    read = await link.execute(*command, may_repeat=True)
                    if not read:
                        await self._check(job)  # Redis may have lost its data: then nothing would ever come
                except UnavailableError as exc:
                    # The job goes on while Redis is away, and so does who looks on.
                    if away_since_s is None:
                        away_since_s = time.monotonic()
                        yield JobWarning(text=f"{exc}; waiting for it", wall_s=time.time())
                    elif time.monotonic() - away_since_s > _AWAY_S:
                        raise
                    await asyncio.sleep(_PAUSE_S)
                    continue
                away_since_s = None
                if not read:
                    continue
                for last, fields in read[0][1]:
                    if (event := _event(last, fields)) is None:
                        continue
                    yield event
                    if isinstance(event, JobEnded):
                        return
            raise DeadlineExceededError(f"the end of job {job}", f"it has not ended in {deadline_s:g} s")
        finally:
            await link.close()

    async def _check(self, job: JobId) -> None:
        if not await self._link.execute("EXISTS", self._keys.job(job), may_repeat=True):
            raise JobNotFoundError(job)


def _arguments(event: JobEvent) -> tuple[Argument, ...]:
    """Return what the script wants to know of an event."""
    match event:
        case VertexLog():
            about: tuple[str, str, str] = ("log", event.vertex, "")
        case VertexLayers(item=item):
            about = ("layer", f"{event.vertex} {item.item}", _standing(item))
        case VertexEvent() | VertexLogDropped():
            about = ("state", event.vertex, "")
        case JobWarning():
            about = ("state", "", "")
        case JobEnded():
            raise InternalError("the end of a job is told by who ends it")
    return (*about, *encode_event(event))


def _standing(item: ProgressItem) -> str:
    if not item.phase.is_end:
        return f"step {item.phase.value} {item.current_bytes}"
    return "given-up" if item.phase in GIVEN_UP else "reached"


def _event(entry_id: bytes, fields: list[bytes]) -> JobEvent | None:
    """Return an entry's event, at the time in its ID; None for what another release wrote and is unknown here."""
    _, kind, _, payload = fields
    try:
        event = decode_event(kind.decode(), payload)
    except WireError:
        return None
    return replace(event, wall_s=int(entry_id.partition(b"-")[0]) / 1000)
