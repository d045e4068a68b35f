"""Leases of a driver outside the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster import gateway as calls
from cluster.gateway import Nothing
from cluster.lease import Lease, LeaseId
from lazyfarm.gateway.link import GatewayLink


class GatewayLeases:
    """Implements :class:`cluster.ports.LeaseStore` over the gateway, for leases that a driver makes."""

    def __init__(self, link: GatewayLink) -> None:
        self._link = link

    async def create(self, lease_id: LeaseId, *, ttl_s: float | None, labels: Mapping[str, str] | None = None) -> Lease:
        """Make a lease, or renew the live one of that ID."""
        call = calls.LeaseCall(id=lease_id, ttl_s=ttl_s, labels=dict(labels or {}))
        return await self._link.call(calls.LEASE_CREATE, call)

    async def renew(self, lease_id: LeaseId, *, ttl_s: float) -> None:
        """Move the expiry; LeaseLostError if it is gone."""
        await self._link.call(calls.LEASE_RENEW, calls.LeaseCall(id=lease_id, ttl_s=ttl_s))

    async def attach(self, lease_id: LeaseId, resources: Sequence[str]) -> None:
        """Hold resources; LeaseLostError if it is gone."""
        await self._link.call(calls.LEASE_ATTACH, calls.LeaseCall(id=lease_id, resources=tuple(resources)))

    async def get(self, lease_id: LeaseId) -> Lease | None:
        """Return a live lease."""
        return next((lease for lease in await self.leases() if lease.id == lease_id), None)

    async def delete(self, lease_id: LeaseId) -> bool:
        """Delete a lease; tell whether there was a live one."""
        return await self._link.call(calls.LEASE_DELETE, calls.LeaseCall(id=lease_id))

    async def leases(self) -> list[Lease]:
        """Return the live leases."""
        return await self._link.call(calls.LEASES, Nothing())

    async def holders(self, resource: str) -> list[LeaseId]:
        """Return who holds a resource."""
        return [lease.id for lease in await self.leases() if resource in lease.resources]
