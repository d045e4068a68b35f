"""Jobs as commands outside the cluster follow them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from cluster.graph import Definition
from cluster.job import JobEnded, JobEvent, JobId, JobRecord, JobState
from lazyfarm.builds import Builds
from lazyfarm.gateway.records import GatewayRecords
from lazyfarm.jobs import ATTEND_EVERY_S, FarmJobs


class GatewayJobs(FarmJobs):
    """Jobs of one farm, over its gateway."""

    def __init__(self, builds: Builds, records: GatewayRecords) -> None:
        self._builds = builds
        self._records = records

    async def find(self, name: str) -> JobRecord:
        """Return the job that has that ID, or the only one whose ID begins so; see the base."""
        return await self._builds.find_job(name)

    async def cancel(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled; see the base."""
        return await self._builds.cancel_job(job)

    def events(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events from the first one to its end; see the base."""
        return self._builds.follow_job(job)

    async def attend(
        self,
        job: JobId,
        on_event: Callable[[JobEvent], object],
        *,
        every_s: float = ATTEND_EVERY_S,  # noqa: ARG002 - the gateway has its own
    ) -> JobEnded:
        """Follow a job, and keep one that is attached going meanwhile; see the base."""
        async with self._builds.attending_job(job, {}):
            return await self.follow(job, on_event)

    async def newest(self) -> list[JobRecord]:
        """Return the last jobs submitted, newest first."""
        return [job.record for job in await self._records.jobs()]

    async def targets(self, job: JobId) -> tuple[str, ...]:
        """Return what people call a job's targets; see the base."""
        return (await self._records.job(job)).targets

    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; see the base."""
        return await self._records.definition(job)

    async def told(self, job: JobId) -> list[JobEvent]:
        """Return a job's events so far; see the base."""
        return await self._records.events(job)
