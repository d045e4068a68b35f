"""The audit stream as commands outside the cluster read it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cluster import gateway as calls
from cluster.audit import AuditEntry
from lazyfarm.gateway.link import GatewayLink


class GatewayAudit:
    """Implements :class:`cluster.ports.AuditReader` over the gateway."""

    def __init__(self, link: GatewayLink) -> None:
        self._link = link

    def entries(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept; see the port."""
        return self._link.stream(calls.AUDIT, calls.AuditCall(last_s=last_s))

    def follow(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield the same, and then what comes; see the port."""
        return self._link.stream(calls.AUDIT, calls.AuditCall(last_s=last_s, follow=True))
