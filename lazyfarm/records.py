"""What a farm has recorded, read from Redis alone: for commands that only look, which never join Ray."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from cluster.cache.names import find_ref
from cluster.circuit import GivenUp
from cluster.errors import NoLayersError
from cluster.graph import Definition
from cluster.job import JobEvent, JobId, JobRecord
from cluster.lease import Lease, LeaseId, ref_resource
from cluster.messages import ActorRecord, NodeRecord
from cluster.ports import LeaseStore, RefStore
from cluster.ref import ImageRecord, RefState, RefUsage
from cluster.settings import FarmSettings
from lazyfarm.jobs import FarmJobs, RedisJobs
from lazyfarm.redis_only import connection
from storage.circuits import Circuits
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.presence import Presence
from storage.refs import RedisRefStore


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


class FarmRecords(ABC):
    """What a farm has recorded; moves nothing and marks nothing used.

    Every method may raise UnavailableError: Redis, or the gateway, doesn't answer.
    """

    @abstractmethod
    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes as the supervisor last saw them."""

    @abstractmethod
    async def actors(self) -> list[ActorRecord]:
        """Return the actors, ``lost`` where one has been silent for too long."""

    @abstractmethod
    async def given_up(self) -> list[GivenUp]:
        """Return the registry hosts that the cluster doesn't ask for now, longest ago first."""

    @abstractmethod
    async def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""

    @abstractmethod
    async def ref(self, name: str) -> RefDetails:
        """Return what is known of a ref, by ID, first digits, or image.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
        """

    @abstractmethod
    async def leases(self) -> list[Lease]:
        """Return the live leases."""

    @abstractmethod
    async def jobs(self) -> list[JobDetails]:
        """Return the last jobs submitted, newest first."""

    @abstractmethod
    async def job(self, name: str) -> JobDetails:
        """Return a job, by its ID or how that begins.

        Raises:
            JobNotFoundError, AmbiguousJobError: it names none, or several.
        """

    @abstractmethod
    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; None where that is unknown."""

    @abstractmethod
    async def events(self, job: JobId) -> list[JobEvent]:
        """Return what a job's driver was told so far; JobNotFoundError if it is unknown."""


class RedisRecords(FarmRecords):
    """Those of a farm whose Redis is at hand."""

    def __init__(
        self, refs: RefStore, leases: LeaseStore, presence: Presence, circuits: Circuits, jobs: FarmJobs
    ) -> None:
        self._refs = refs
        self._leases = leases
        self._presence = presence
        self._circuits = circuits
        self._jobs = jobs

    @classmethod
    def over(cls, link: RedisLink, keys: Keys) -> Self:
        """Return those of a farm whose Redis a client is connected to."""
        return cls(
            RedisRefStore(link, keys),
            RedisLeaseStore(link, keys),
            Presence(link, keys),
            Circuits(link, keys),
            RedisJobs.over(link, keys),
        )

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes as the supervisor last saw them."""
        return await self._presence.nodes()

    async def actors(self) -> list[ActorRecord]:
        """Return the actors, ``lost`` where one has been silent for too long."""
        return await self._presence.actors()

    async def given_up(self) -> list[GivenUp]:
        """Return the registry hosts that the cluster doesn't ask for now, longest ago first."""
        return await self._circuits.given_up()

    async def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""
        states = await self._refs.get(await self._refs.list_refs())
        return [state for state in states if state is not None]

    async def ref(self, name: str) -> RefDetails:
        """Return what is known of a ref, by ID, first digits, or image; see the base."""
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

    async def leases(self) -> list[Lease]:
        """Return the live leases."""
        return await self._leases.leases()

    async def jobs(self) -> list[JobDetails]:
        """Return the last jobs submitted, newest first."""
        jobs = await self._jobs.newest()
        targets = await asyncio.gather(*(self._jobs.targets(job.id) for job in jobs))
        return [JobDetails(record=job, targets=named) for job, named in zip(jobs, targets, strict=True)]

    async def job(self, name: str) -> JobDetails:
        """Return a job, by its ID or how that begins; see the base."""
        record = await self._jobs.find(name)
        return JobDetails(record=record, targets=await self._jobs.targets(record.id))

    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build; see the base."""
        return await self._jobs.definition(job)

    async def events(self, job: JobId) -> list[JobEvent]:
        """Return what a job's driver was told so far; see the base."""
        return await self._jobs.told(job)


@asynccontextmanager
async def open_records(settings: FarmSettings) -> AsyncIterator[FarmRecords]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    async with connection(settings) as (link, keys):
        yield RedisRecords.over(link, keys)
