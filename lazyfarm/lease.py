"""Leases that a driver keeps: renewed while it lives, and said to be lost once they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from cluster.errors import ClusterError, InvalidArgumentError, LeaseLostError
from cluster.lease import LeaseId
from cluster.ports import LeaseStore


async def renew_until_lost(leases: LeaseStore, lease_id: LeaseId, *, ttl_s: float) -> LeaseLostError:
    """Renew a lease three times a lifetime; return the error once it is gone. Ends otherwise by cancellation."""
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            await leases.renew(lease_id, ttl_s=ttl_s)
        except LeaseLostError as exc:
            return exc
        except ClusterError:
            continue  # Redis is away: the next round, or the lease's expiry, decides


class FarmLease:
    """A lease that a driver holds while a ``with`` body runs."""

    def __init__(self, store: LeaseStore, lease_id: LeaseId) -> None:
        self._store = store
        self._renewal: asyncio.Task[LeaseLostError] | None = None
        self.id = lease_id

    def __repr__(self) -> str:
        return f"<FarmLease {self.id}>"

    async def attach(self, resources: Sequence[str]) -> None:
        """Hold more by it.

        Raises:
            LeaseLostError: it is gone: what it held may be collected.
        """
        self.raise_if_lost()
        await self._store.attach(self.id, resources)

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError once the lease is gone: what it held may be collected."""
        if self._renewal is not None and self._renewal.done() and not self._renewal.cancelled():
            raise self._renewal.result()

    @contextlib.asynccontextmanager
    async def held(self, *, ttl_s: float, labels: Mapping[str, str] | None) -> AsyncIterator[None]:
        """Make the lease, keep it while the body runs, and delete it; at worst it lapses by itself.

        Raises:
            InvalidArgumentError: *ttl_s* is not above 0.
        """
        if not ttl_s > 0:
            raise InvalidArgumentError("ttl_s", f"{ttl_s:g}", "a lease lives for more than 0 seconds")
        await self._store.create(self.id, ttl_s=ttl_s, labels=labels)
        self._renewal = asyncio.create_task(renew_until_lost(self._store, self.id, ttl_s=ttl_s))
        try:
            yield
        finally:
            self._renewal.cancel()
            # What the body raised is told, not that the lease can't be deleted: it lapses.
            with contextlib.suppress(ClusterError):
                await asyncio.shield(self._store.delete(self.id))
