"""What a farm has recorded, as commands outside the cluster read it."""

from __future__ import annotations

from cluster.circuit import GivenUp
from cluster.gateway import Named, Nothing
from cluster.graph import Definition, decode_definition
from cluster.job import JobEvent, JobId, decode_event
from cluster.lease import Lease
from cluster.messages import ActorRecord, NodeRecord
from cluster.ref import RefState
from lazyfarm.gateway import reads
from lazyfarm.gateway.farm import GatewayFarm
from lazyfarm.records import FarmRecords, JobDetails, RefDetails


class GatewayRecords(FarmRecords):
    """A farm's records, over its gateway; each method is as the base's."""

    def __init__(self, farm: GatewayFarm) -> None:
        self._farm = farm
        self._link = farm.gateway

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes."""
        return await self._farm.nodes()

    async def actors(self) -> list[ActorRecord]:
        """Return the actors."""
        return await self._link.call(reads.ACTORS, Nothing())

    async def given_up(self) -> list[GivenUp]:
        """Return the registry hosts that the cluster doesn't ask for now."""
        return await self._link.call(reads.GIVEN_UP, Nothing())

    async def refs(self) -> list[RefState]:
        """Return every ref."""
        return await self._farm.refs()

    async def ref(self, name: str) -> RefDetails:
        """Return what is known of a ref."""
        return await self._link.call(reads.REF_DETAILS, Named(name=name))

    async def leases(self) -> list[Lease]:
        """Return the live leases, but for the one that is there because somebody looks."""
        own = self._farm.lease_id()
        return [lease for lease in await self._farm.leases() if lease.id != own]

    async def jobs(self) -> list[JobDetails]:
        """Return the last jobs submitted."""
        return await self._link.call(reads.JOBS, Nothing())

    async def job(self, name: str) -> JobDetails:
        """Return a job."""
        return await self._link.call(reads.JOB_DETAILS, Named(name=name))

    async def definition(self, job: JobId) -> Definition | None:
        """Return what a job is to build."""
        payload = await self._link.call(reads.DEFINITION, Named(name=job))
        return decode_definition(payload) if payload else None

    async def events(self, job: JobId) -> list[JobEvent]:
        """Return what a job's driver was told so far."""
        told = self._link.stream(reads.TOLD, Named(name=job))
        return [decode_event(event.kind, event.payload) async for event in told]
