"""What a scheduler holds for uses of vertices: a lease each, renewed until it is let go of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import structlog

from cluster.errors import ClusterError, LeaseLostError
from cluster.lease import LeaseId
from cluster.ports import LeaseStore

log = structlog.get_logger()

_RENEWALS = 3


class Holds:
    """Leases by name, made when they are first asked for. When the scheduler dies they lapse.

    Args:
        leases: Where they are.
        prefix: Begins their names; no other process's do.
        ttl_s: Seconds that each lives without being renewed.
    """

    def __init__(self, leases: LeaseStore, *, prefix: str, ttl_s: float) -> None:
        self._leases = leases
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._held: dict[str, asyncio.Task[LeaseId]] = {}

    def __repr__(self) -> str:
        return f"<Holds {self._prefix}: {len(self._held)}>"

    async def lease(self, name: str, labels: Mapping[str, str] | None = None) -> LeaseId:
        """Return the lease of *name*, live."""
        making = self._held.get(name)
        if making is None or (making.done() and (making.cancelled() or making.exception() is not None)):
            making = self._held[name] = asyncio.ensure_future(self._make(LeaseId(f"{self._prefix}-{name}"), labels))
        return await asyncio.shield(making)

    async def _make(self, lease_id: LeaseId, labels: Mapping[str, str] | None) -> LeaseId:
        await self._leases.create(lease_id, ttl_s=self._ttl_s, labels=labels)
        return lease_id

    async def release(self, name: str) -> None:
        """Let go of what is held under *name*; does nothing where that is nothing."""
        making = self._held.pop(name, None)
        if making is not None:
            with contextlib.suppress(ClusterError):
                await self._leases.delete(await making)

    async def renew_forever(self) -> None:
        """Renew all of them, until cancelled."""
        while True:
            await asyncio.sleep(self._ttl_s / _RENEWALS)
            made = [(name, task) for name, task in self._held.items() if _is_made(task)]
            renewals = (self._leases.renew(task.result(), ttl_s=self._ttl_s) for _, task in made)
            for (name, task), lost in zip(made, await asyncio.gather(*renewals, return_exceptions=True), strict=True):
                # One that was let go of meanwhile is gone, too; another may have its name by now.
                if isinstance(lost, LeaseLostError) and self._held.get(name) is task:
                    # Redis lost it, or the process was paused: what it held may be collected, its user will miss it.
                    log.warning("hold.lost", lease=task.result())
                    del self._held[name]


def _is_made(task: asyncio.Task[LeaseId]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
