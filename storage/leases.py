"""Leases in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import LeaseLostError
from cluster.lease import Lease, LeaseId
from cluster.metrics import LEASES_LOST
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink

PINNED = "inf"

_LABELS: Codec[dict[str, str]] = Codec("labels", dict[str, str])


class RedisLeaseStore:
    """Implements :class:`cluster.ports.LeaseStore`; each method is one script, so one atomic step.

    A lease is live by Redis's clock and by one number, its score in the index of expiries; a lapsed one is
    gone for every reader at that instant, and what it leaves is swept by later writes, a little each. A
    pinned lease stays pinned until it is deleted: renewing it does nothing.
    """

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._prefix = keys.prefix

    async def create(self, lease_id: LeaseId, *, ttl_s: float | None, labels: Mapping[str, str] | None = None) -> Lease:
        """Make a lease, or renew the live one of that ID."""
        ttl = PINNED if ttl_s is None else _ms(ttl_s)
        packed = _LABELS.encode(dict(labels or {}))
        return _lease(await self._link.run("lease_create", self._prefix, lease_id, ttl, packed, may_repeat=True))

    async def renew(self, lease_id: LeaseId, *, ttl_s: float) -> None:
        """Move the expiry; LeaseLostError if it is gone."""
        if not await self._link.run("lease_renew", self._prefix, lease_id, _ms(ttl_s), may_repeat=True):
            LEASES_LOST.add()
            raise LeaseLostError(lease_id)

    async def attach(self, lease_id: LeaseId, resources: Sequence[str]) -> None:
        """Hold resources; LeaseLostError if it is gone."""
        if not await self._link.run("lease_attach", self._prefix, lease_id, *resources, may_repeat=True):
            LEASES_LOST.add()
            raise LeaseLostError(lease_id)

    async def get(self, lease_id: LeaseId) -> Lease | None:
        """Return a live lease."""
        found = await self._link.run("lease_get", self._prefix, lease_id, may_repeat=True)
        return None if found is None else _lease(found)

    async def delete(self, lease_id: LeaseId) -> bool:
        """Delete a lease; tell whether there was a live one."""
        return bool(await self._link.run("lease_delete", self._prefix, lease_id))

    async def leases(self) -> list[Lease]:
        """Return the live leases."""
        return [_lease(found) for found in await self._link.run("lease_list", self._prefix, may_repeat=True)]

    async def holders(self, resource: str) -> list[LeaseId]:
        """Return who holds a resource, sorted."""
        found = await self._link.run("lease_holders", self._prefix, resource, may_repeat=True)
        return sorted(LeaseId(lease_id.decode()) for lease_id in found)


def _ms(seconds: float) -> int:
    """Return milliseconds, rounded up: a lease never lives shorter than asked for."""
    return -int(-seconds * 1000 // 1)


def _lease(found: list[Any]) -> Lease:
    lease_id, expires, created, labels, resources = found
    return Lease(
        id=LeaseId(lease_id.decode()),
        expires_wall_s=None if expires == PINNED.encode() else int(expires) / 1000,
        created_wall_s=int(created) / 1000,
        labels=_LABELS.decode(labels),
        resources=tuple(sorted(resource.decode() for resource in resources)),
    )
