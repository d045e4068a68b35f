"""Leases of a farm as commands outside the cluster look after them."""

from __future__ import annotations

from collections.abc import Mapping

from cluster import gateway as calls
from cluster.collect.leaks import Leak
from cluster.gateway import Named, Nothing
from cluster.lease import Lease, LeaseId
from lazyfarm.gateway import reads
from lazyfarm.gateway.link import GatewayLink
from lazyfarm.leases import FarmLeases


class GatewayPins(FarmLeases):
    """Leases of one farm, over its gateway: shown, pinned by name, released, looked through; as the base's."""

    def __init__(self, link: GatewayLink) -> None:
        self._link = link

    async def get(self, lease_id: LeaseId) -> Lease:
        """Return a live lease."""
        return await self._link.call(reads.LEASE, Named(name=lease_id))

    async def pin_named(
        self, name: str, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Pin what a name stands for."""
        call = reads.PinNamedCall(name=name, ttl_s=ttl_s, labels=dict(labels or {}))
        return await self._link.call(reads.PIN_NAMED, call)

    async def release(self, lease_id: LeaseId) -> None:
        """Delete a lease."""
        await self._link.call(calls.UNPIN, Named(name=lease_id))

    async def leaks(self) -> list[Leak]:
        """Return the leases that should not be there any more."""
        return await self._link.call(reads.LEAKS, Nothing())
