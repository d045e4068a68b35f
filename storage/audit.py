"""The audit stream in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from cluster.audit import AuditEntry
from cluster.config import AuditConfig
from cluster.errors import UnavailableError, WireError
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink

#: Entries read at once.
_READ = 1000
#: Seconds that one blocking read lasts; far below the link's deadline.
_BLOCK_S = 2.0
#: Seconds that Redis may be away while somebody follows, and a breath between.
_AWAY_S = 300.0
_PAUSE_S = 0.2

_ENTRY: Codec[AuditEntry] = Codec("audit", AuditEntry)


class RedisAudit:
    """Implements :class:`cluster.ports.AuditLog` with one Redis stream.

    What changes nothing else in Redis is noted without waiting: what was noted within one tick of the event loop goes
    out as one command, with whatever else does. What is noted of a step that a script takes goes with that script.

    Args:
        link: Where to.
        keys: The farm's.
        config: How much is kept, and how long.
        by: Who writes.
    """

    def __init__(self, link: RedisLink, keys: Keys, config: AuditConfig, *, by: str = "") -> None:
        self._link = link
        self._keys = keys
        self._by = by
        self._retention_s = config.retention_s
        #: As scripts take them (lua/lib/audit.lua).
        self.limits = f"{config.most_entries} {round(config.retention_s * 1000)}" if config.most_entries else ""
        self._waiting: list[bytes] = []

    def note(self, *entries: AuditEntry) -> None:
        """Append entries, soon. Nobody waits for it, and what is lost with a connection stays lost."""
        if not self.limits or not entries:
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting += [self.payload(entry) for entry in entries]

    def payload(self, entry: AuditEntry) -> bytes:
        """Return an entry as it is kept."""
        return _ENTRY.encode(entry if entry.by else replace(entry, by=self._by))

    def _send(self) -> None:
        payloads, self._waiting = self._waiting, []
        self._link.run_soon("audit_note", self._keys.prefix, self.limits, *payloads)

    async def entries(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept, oldest first."""
        start = await self._start(last_s)
        while True:
            command = ("XRANGE", self._keys.audit, start, "+", "COUNT", _READ)
            read = await self._link.execute(*command, may_repeat=True)
            for entry_id, fields in read:
                if (entry := _entry(entry_id, fields)) is not None:
                    yield entry
            if len(read) < _READ:
                return
            start = b"(" + read[-1][0]

    async def newest(self, most: int, *, after: str = "") -> tuple[str, list[AuditEntry]]:
        """Return the newest entries, oldest first, and what to give as *after* for those that come then.

        Args:
            most: Entries, at most: what is older is left out.
            after: What an earlier call returned; "": from the first that is kept.
        """
        first = f"({after}" if after else str(await self._start(None))
        found: list[AuditEntry] = []
        last, end = after, "+"
        while most > 0:
            command = ("XREVRANGE", self._keys.audit, end, first, "COUNT", min(most, _READ))
            read = await self._link.execute(*command, may_repeat=True)
            if not read:
                break
            if end == "+":
                last = read[0][0].decode()
            found += [entry for entry_id, fields in read if (entry := _entry(entry_id, fields)) is not None]
            most -= len(read)
            end = f"({read[-1][0].decode()}"
        return last, found[::-1]

    async def follow(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept, oldest first, then what comes, for ever; Redis may be away for a while."""
        # XREAD gives what comes after an ID, and that of the first millisecond may be wanted.
        last: bytes = b"%d-0" % max(0, await self._start(last_s) - 1)
        # A blocking read holds up whatever comes after it on its connection.
        link = self._link.clone()
        block_ms = int(min(_BLOCK_S, link.address.timeout_s / 3) * 1000)
        away_since_s: float | None = None
        try:
            while True:
                command = ("XREAD", "COUNT", _READ, "BLOCK", block_ms, "STREAMS", self._keys.audit, last)
                try:
                    read = await link.execute(*command, may_repeat=True)
                except UnavailableError:
                    away_since_s = away_since_s or time.monotonic()
                    if time.monotonic() - away_since_s > _AWAY_S:
                        raise
                    await asyncio.sleep(_PAUSE_S)
                    continue
                away_since_s = None
                for last, fields in read[0][1] if read else ():
                    if (entry := _entry(last, fields)) is not None:
                        yield entry
        finally:
            await link.close()

    async def _start(self, last_s: float | None) -> int:
        """Return the milliseconds from which on entries are wanted and may be shown, by Redis's clock."""
        seconds, microseconds = await self._link.execute("TIME", may_repeat=True)
        back_s = self._retention_s if last_s is None else min(last_s, self._retention_s)
        return max(0, round((int(seconds) + int(microseconds) / 1e6 - back_s) * 1000))


def noted(audit: RedisAudit | None, entry: AuditEntry | None) -> tuple[str, bytes]:
    """Return the two arguments of a script that notes an entry with its step: limits and payload; of none, empty."""
    return (audit.limits, audit.payload(entry)) if audit and audit.limits and entry else ("", b"")


def _entry(entry_id: bytes, fields: Sequence[bytes]) -> AuditEntry | None:
    """Return an entry, at the time in its ID; None for what another release wrote and is not understood here."""
    try:
        entry = _ENTRY.decode(fields[1])
    except WireError:
        return None
    return replace(entry, wall_s=int(entry_id.partition(b"-")[0]) / 1000)
