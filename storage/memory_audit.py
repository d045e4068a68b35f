"""Verified fake of the audit stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from cluster.audit import AuditEntry
from cluster.config import AuditConfig
from storage.memory import Memory

_LOOK_S = 0.005


class MemoryAudit:
    """Fake of :class:`storage.audit.RedisAudit`."""

    def __init__(self, memory: Memory, config: AuditConfig, *, by: str = "") -> None:
        self._memory = memory
        self._config = config
        self._by = by

    def note(self, *entries: AuditEntry) -> None:
        """Append entries."""
        for entry in entries:
            self._memory.note(replace(entry, by=entry.by or self._by), most=self._config.most_entries)

    async def entries(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept, oldest first."""
        back_s = self._config.retention_s if last_s is None else min(last_s, self._config.retention_s)
        start_s = self._memory.now_s() - back_s
        for entry in [entry for entry in self._memory.audit if entry.wall_s >= start_s]:
            yield entry

    async def follow(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept, then what comes."""
        told = self._memory.audited
        async for entry in self.entries(last_s=last_s):
            yield entry
        while True:
            new = self._memory.audited - told
            told = self._memory.audited
            for entry in list(self._memory.audit)[-new:] if new else ():
                yield entry
            await asyncio.sleep(_LOOK_S)
