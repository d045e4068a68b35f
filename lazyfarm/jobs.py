"""A farm's jobs, over its Redis alone: looked up, followed to their end, cancelled. Ray is not joined."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self

from cluster.errors import (
    AmbiguousJobError,
    ClusterError,
    GraphError,
    InternalError,
    JobNotFoundError,
    WireError,
)
from cluster.graph import Definition, decode_definition, decode_targets
from cluster.job import JobEnded, JobEvent, JobId, JobRecord, JobState
from cluster.settings import FarmSettings
from cluster.solver_ports import JobEvents, JobStore
from lazyfarm.redis_only import connection, own_audit
from storage.audit import RedisAudit
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.link import RedisLink

#: Seconds between two words of a driver that it is there: a third of what it is given.
ATTEND_EVERY_S = 10.0
#: Seconds for which a job is followed: as long as one that has ended is known.
_FOLLOW_S = 7 * 86400.0


class FarmJobs(ABC):
    """Jobs of one farm. Every method may raise UnavailableError: Redis, or the gateway, doesn't answer."""

    @abstractmethod
    async def newest(self) -> list[JobRecord]:
        """Return the last jobs submitted, newest first."""

    @abstractmethod
    async def find(self, name: str) -> JobRecord:
        """Return the job that has that ID, or the only one whose ID begins so.

        Raises:
            JobNotFoundError, AmbiguousJobError: it names none, or several.
        """

    @abstractmethod
    async def targets(self, job: JobId) -> tuple[str, ...]:
        """Return what people call a job's targets; by digest where they have no name, empty where that is unknown."""

    @abstractmethod
    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; None where that is unknown."""

    @abstractmethod
    async def told(self, job: JobId) -> list[JobEvent]:
        """Return a job's events so far; JobNotFoundError if it is unknown."""

    @abstractmethod
    async def cancel(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled; return its state after that. JobNotFoundError if it is unknown."""

    @abstractmethod
    def events(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events from the first one to its end; raises as :meth:`follow`."""

    async def follow(self, job: JobId, on_event: Callable[[JobEvent], object]) -> JobEnded:
        """Tell *on_event* of each of a job's events from the first one on; return the last one.

        Raises:
            JobNotFoundError: it is unknown.
            DeadlineExceededError: it has not ended within a week.
        """
        end: JobEnded | None = None
        async for event in self.events(job):
            on_event(event)
            if isinstance(event, JobEnded):
                end = event
        if end is None:
            raise InternalError(f"the events of job {job} ended before the job did")
        return end

    @abstractmethod
    async def attend(
        self, job: JobId, on_event: Callable[[JobEvent], object], *, every_s: float = ATTEND_EVERY_S
    ) -> JobEnded:
        """Follow a job, and keep one that is attached going meanwhile, whatever has become of its driver.

        Raises:
            JobNotFoundError, DeadlineExceededError: as :meth:`follow`.
        """


class RedisJobs(FarmJobs):
    """Those of a farm whose Redis is at hand."""

    def __init__(self, store: JobStore, events: JobEvents) -> None:
        self._store = store
        self._events = events

    @classmethod
    def over(cls, link: RedisLink, keys: Keys, audit: RedisAudit | None = None) -> Self:
        """Return those of a farm whose Redis a client is connected to; *audit* notes what is done to them."""
        return cls(RedisJobStore(link, keys, audit), RedisJobEvents(link, keys))

    async def newest(self) -> list[JobRecord]:
        """Return the last jobs submitted, newest first."""
        return await self._store.jobs()

    async def find(self, name: str) -> JobRecord:
        """Return the job that has that ID, or the only one whose ID begins so; see the base."""
        if not name:
            raise JobNotFoundError(name)
        try:
            return await self._store.get(JobId(name))  # whatever else begins so
        except JobNotFoundError:
            found = await self._store.find(name)
        if len(found) > 1:
            raise AmbiguousJobError(name, len(found))
        if not found:
            raise JobNotFoundError(name)
        return await self._store.get(found[0])

    async def targets(self, job: JobId) -> tuple[str, ...]:
        """Return what people call a job's targets; see the base."""
        try:
            named = decode_targets(await self._store.definition(job))
        except (JobNotFoundError, WireError):
            return ()  # forgotten meanwhile, or of another release
        return tuple(name or target for target, name in named.items())

    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; see the base."""
        try:
            return decode_definition(await self._store.definition(job))
        except (JobNotFoundError, WireError, GraphError):
            return None  # as above

    async def told(self, job: JobId) -> list[JobEvent]:
        """Return a job's events so far; see the base."""
        return await self._events.told(job)

    async def cancel(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled; see the base."""
        return await self._store.request_cancel(job)

    def events(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events from the first one to its end; see the base."""
        return self._events.follow(job, deadline_s=_FOLLOW_S)

    async def attend(
        self, job: JobId, on_event: Callable[[JobEvent], object], *, every_s: float = ATTEND_EVERY_S
    ) -> JobEnded:
        """Follow a job, and keep one that is attached going meanwhile; see the base."""
        attending = asyncio.create_task(self._keep(job, every_s))
        try:
            return await self.follow(job, on_event)
        finally:
            attending.cancel()
            await asyncio.wait({attending})

    async def _keep(self, job: JobId, every_s: float) -> None:
        while True:
            try:
                await self._store.attend(job)
            except JobNotFoundError:
                return
            except ClusterError:
                pass  # Redis is away: who follows says so, if it stays so
            await asyncio.sleep(every_s)


@asynccontextmanager
async def open_jobs(settings: FarmSettings) -> AsyncIterator[FarmJobs]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    async with connection(settings) as (link, keys):
        yield RedisJobs.over(link, keys, own_audit(link, keys, settings.config.audit))
