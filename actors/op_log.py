"""What one run of an op says, for the jobs that it is done for: also for those that come to it later."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import structlog

from cluster.digest import Digest
from cluster.errors import ClusterError
from cluster.job import JobId, VertexLog, VertexLogDropped
from cluster.solver_ports import JobEvents
from storage.containers.logs import LogLine

_log = structlog.get_logger()

#: What is kept for jobs that come later, in characters; the start of it is, as of a job's stream.
_KEPT = 1 << 20
#: Events that are told at once: a script of the store runs by itself.
_AT_ONCE = 256


class OpLog:
    """Tells jobs what an op says, in order, each from the op's start.

    What can't be told is dropped: the op is worth more than what is seen of it.
    """

    def __init__(self, vertex: Digest, events: JobEvents, jobs: Iterable[JobId]) -> None:
        self._vertex = vertex
        self._events = events
        self._jobs = dict.fromkeys(jobs)
        self._said: list[VertexLog] = []
        self._room = _KEPT
        #: Something was said that is not kept.
        self._is_cut = False
        #: Nobody comes in between while something is told.
        self._order = asyncio.Lock()

    async def tell(self, lines: Sequence[LogLine]) -> None:
        """Tell lines to all jobs."""
        if not lines:
            return
        events = self._events_of(lines)
        async with self._order:
            if self._room > 0:
                self._said += events
                self._room -= sum(len(event.text) for event in events)
            else:
                self._is_cut = True
            await asyncio.gather(*(self._publish(job, events) for job in self._jobs))

    async def add(self, job: JobId) -> None:
        """Tell a further job all that was said so far, and what comes."""
        async with self._order:
            if job in self._jobs:
                return
            self._jobs[job] = None
            cut = [VertexLogDropped(vertex=self._vertex)] if self._is_cut else []
            await self._publish(job, [*self._said, *cut])

    def _events_of(self, lines: Sequence[LogLine]) -> list[VertexLog]:
        """Return lines as few events: neighbours of one stream together."""
        events: list[VertexLog] = []
        text = ""
        for line, following in zip(lines, [*lines[1:], None], strict=True):
            text += line.text + ("" if line.is_partial else "\n")
            if following is None or following.stream is not line.stream:
                events.append(VertexLog(vertex=self._vertex, stream=line.stream, text=text))
                text = ""
        return events

    async def _publish(self, job: JobId, events: Sequence[VertexLog | VertexLogDropped]) -> None:
        try:
            for start in range(0, len(events), _AT_ONCE):
                await self._events.publish(job, events[start : start + _AT_ONCE])
        except ClusterError as exc:
            _log.warning("op_log.untold", job=job, events=len(events), error=str(exc))
