"""What a farm has recorded, read from Redis alone: for commands that only look, which never join Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.cache.names import find_ref
from cluster.circuit import GivenUp
from cluster.errors import NoLayersError
from cluster.graph import Definition
from cluster.job import JobEvent, JobId, JobRecord
from cluster.lease import Lease, LeaseId, ref_resource
from cluster.messages import ActorRecord, NodeRecord
from cluster.ref import ImageRecord, RefState, RefUsage
from cluster.settings import FarmSettings
from lazyfarm.jobs import FarmJobs
from lazyfarm.redis_only import connected
from storage.circuits import Circuits
from storage.leases import RedisLeaseStore
from storage.presence import Presence
from storage.refs import RedisRefStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefDetails:
    """All that is recorded of one ref."""

    state: RefState
    #: It and all below it, lowest first.
    chain: tuple[RefState, ...]
    #: Live leases that hold it.
    leases: tuple[LeaseId, ...]
    usage: RefUsage
    #: Images whose top it is, by name.
    images: tuple[ImageRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDetails:
    """A job, and what it is to build."""

    record: JobRecord
    #: What people call its targets.
    targets: tuple[str, ...]


class FarmRecords:
    """Blocking, read-only face of a farm's Redis; moves nothing and marks nothing used."""

    def __init__(self, settings: FarmSettings) -> None:
        """Connect when first used.

        Raises:
            FarmNotRunningError: the settings name no Redis.
        """
        self._link, keys = connected(settings)
        self._runner = asyncio.Runner()
        self._refs = RedisRefStore(self._link, keys)
        self._leases = RedisLeaseStore(self._link, keys)
        self._presence = Presence(self._link, keys)
        self._circuits = Circuits(self._link, keys)
        self._jobs = FarmJobs.over(self._link, keys)

    def close(self) -> None:
        """Disconnect."""
        self._run(self._link.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def nodes(self) -> list[NodeRecord]:
        """Return the nodes as the supervisor last saw them."""
        return self._run(self._presence.nodes())

    def actors(self) -> list[ActorRecord]:
        """Return the actors, ``lost`` where one has been silent for too long."""
        return self._run(self._presence.actors())

    def given_up(self) -> list[GivenUp]:
        """Return the registry hosts that the cluster doesn't ask for now, longest ago first."""
        return self._run(self._circuits.given_up())

    def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""
        return self._run(self._all_refs())

    async def _all_refs(self) -> list[RefState]:
        states = await self._refs.get(await self._refs.list_refs())
        return [state for state in states if state is not None]

    def images(self) -> list[ImageRecord]:
        """Return every image that was resolved, by name."""
        return self._run(self._refs.images())

    def ref(self, name: str) -> RefDetails:
        """Return what is known of a ref, by ID, first digits, or image.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
        """
        return self._run(self._details(name))

    async def _details(self, name: str) -> RefDetails:
        image, ref_id = await find_ref(self._refs, name)
        if ref_id is None:
            raise NoLayersError(image.name if image is not None else name)
        chain = await self._refs.chain(ref_id)
        images = [image for image in await self._refs.images() if image.ref == ref_id]
        return RefDetails(
            state=chain[-1],
            chain=tuple(chain),
            leases=tuple(await self._leases.holders(ref_resource(ref_id))),
            usage=await self._refs.usage(ref_id),
            images=tuple(images),
        )

    def leases(self) -> list[Lease]:
        """Return the live leases."""
        return self._run(self._leases.leases())

    def jobs(self) -> list[JobDetails]:
        """Return the last jobs submitted, newest first."""
        return self._run(self._newest_jobs())

    async def _newest_jobs(self) -> list[JobDetails]:
        jobs = await self._jobs.newest()
        targets = await asyncio.gather(*(self._jobs.targets(job.id) for job in jobs))
        return [JobDetails(record=job, targets=named) for job, named in zip(jobs, targets, strict=True)]

    def job(self, name: str) -> JobDetails:
        """Return a job, by its ID or how that begins.

        Raises:
            JobNotFoundError, AmbiguousJobError: it names none, or several.
        """
        return self._run(self._job(name))

    async def _job(self, name: str) -> JobDetails:
        record = await self._jobs.find(name)
        return JobDetails(record=record, targets=await self._jobs.targets(record.id))

    def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; None where that is unknown."""
        return self._run(self._jobs.definition(job))

    def events(self, job: JobId) -> list[JobEvent]:
        """Return what a job's driver was told so far; JobNotFoundError if it is unknown."""
        return self._run(self._jobs.told(job))
