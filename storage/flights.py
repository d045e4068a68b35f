"""Flights in Redis: the cluster-wide single-flight lock."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack

from cluster import tracing, wire
from cluster.audit import AuditEntry
from cluster.errors import InternalError, StaleFenceError, UnknownVersionError, WireError
from cluster.flight.values import (
    Aborting,
    Committed,
    Elsewhere,
    Failed,
    Fence,
    FlightEvent,
    Joined,
    JoinOutcome,
    Owned,
    Present,
    Progressed,
    UploadState,
    Vacated,
)
from cluster.lease import LeaseId, blob_resource
from cluster.metrics import (
    COMMITTED_BYTES,
    FLIGHT_ACQUIRE_SECONDS,
    FLIGHT_ENDS,
    FLIGHT_JOINS,
    FLIGHT_TAKE_OVERS,
    FLIGHT_WRITES_REFUSED,
)
from cluster.ref import BlobRecord
from storage.audit import RedisAudit, noted
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink
from storage.protocol import Argument
from storage.refs import BLOB

#: Seconds that a flight's own lease holds what it committed: time for every waiter to hold it itself.
FLIGHT_LEASE_S = 120

_PROGRESSED: Codec[Progressed] = Codec("progressed", Progressed)
_COMMITTED: Codec[Committed] = Codec("committed", Committed)
_FAILED: Codec[Failed] = Codec("failed", Failed)
_VACATED: Codec[Vacated] = Codec("vacated", Vacated)
_LABELS: Codec[dict[str, str]] = Codec("labels", dict[str, str])


def flight_lease_id(digest: str) -> LeaseId:
    """Name the lease that holds a blob from its commit until its waiters hold it."""
    return LeaseId(f"flight:{digest}")


class RedisFlightStore:
    """Implements :class:`cluster.ports.FlightStore`; each method is one script, so one atomic step.

    An owner writes only while Redis's clock says that its hold has not lapsed, and only as (epoch, fence,
    token), compared for equality:

    - *fence* rises by one counter a farm, so owners are ordered;
    - *epoch* is drawn once a data set, so a number that is given again after the data were lost is no
      number of before;
    - *token* is the owner's own, so a number that is given again because a fail-over lost the counter's last
      steps doesn't make two owners one.

    What an owner uploaded outlives it by a day; an outcome is kept for 60 s, under its fence number only, so
    that it reaches who waited and nobody else.
    """

    def __init__(self, link: RedisLink, keys: Keys, audit: RedisAudit | None = None) -> None:
        self._link = link
        self._keys = keys
        self._prefix = keys.prefix
        self._audit = audit

    async def join(self, key: str, *, worker: str, token: str, ttl_s: float) -> JoinOutcome:
        """Join or own the flight of *key*; safe to repeat with the same token."""
        reply = await self._join(key, worker, token, ttl_s)
        match reply:
            case [b"owned", epoch, number, upload, parts, is_taken_over]:
                if is_taken_over:
                    FLIGHT_TAKE_OVERS.add(upload="resumed" if upload else "none")
                fence = Fence(key=key, epoch=epoch.decode(), number=int(number), token=token)
                return Owned(fence=fence, upload=_upload(upload, parts))
            case _:
                return _elsewhere(reply)

    async def join_another(self, key: str, *, worker: str, ttl_s: float) -> Elsewhere | None:
        """Join another's flight of *key*; None where nobody has one."""
        reply = await self._join(key, worker, "", ttl_s)
        return None if reply == [b"free"] else _elsewhere(reply)

    async def _join(self, key: str, worker: str, token: str, ttl_s: float) -> list[Any]:
        began_s = time.monotonic()
        reply: list[Any] = await self._link.run(
            "flight_join",
            self._prefix,
            key,
            worker,
            token,
            round(ttl_s * 1000),
            secrets.token_hex(8),
            wire.VERSION,
            self._audit.limits if self._audit else "",
            tracing.current().traceparent,
            may_repeat=True,
        )
        FLIGHT_ACQUIRE_SECONDS.observe(time.monotonic() - began_s)
        FLIGHT_JOINS.add(outcome=reply[0].decode())
        return reply

    async def leave(self, key: str, *, worker: str) -> bool:
        """Stop waiting; tell whether nobody is left waiting."""
        return bool(await self._link.run("flight_leave", self._prefix, key, worker, wire.VERSION, may_repeat=True))

    async def begin_upload(self, fence: Fence, upload: UploadState) -> None:
        """Record the upload this owner has begun."""
        parts = [argument for part in upload.parts.items() for argument in part]
        await self._own("flight_upload", fence, upload.key, upload.upload_id, upload.part_bytes, *parts)

    async def record_part(self, fence: Fence, number: int, etag: str) -> None:
        """Record one uploaded part."""
        await self._own("flight_part", fence, number, etag)

    async def drop_upload(self, fence: Fence) -> None:
        """Forget the recorded upload."""
        await self._own("flight_upload", fence)

    async def report(self, fence: Fence, current_bytes: int, total_bytes: int) -> None:
        """Tell how far the fetch is."""
        event = Progressed(fence_number=fence.number, current_bytes=current_bytes, total_bytes=total_bytes)
        await self._own("flight_report", fence, current_bytes, total_bytes, _PROGRESSED.encode(event))

    async def commit(self, fence: Fence, blob: BlobRecord, *, entry: AuditEntry | None = None) -> None:
        """Make *blob* present and end the flight; a repetition that finds it done is content."""
        if fence.key != blob_resource(blob.digest):
            raise InternalError(f"a flight for {fence.key} commits {blob.digest}")
        await self._own(
            "flight_commit",
            fence,
            blob.key,
            BLOB.encode(blob),
            _COMMITTED.encode(Committed(fence_number=fence.number, blob=blob)),
            flight_lease_id(blob.digest),
            FLIGHT_LEASE_S * 1000,
            _LABELS.encode({"kind": "flight"}),
            *noted(self._audit, entry),
        )
        FLIGHT_ENDS.add(how="committed")
        COMMITTED_BYTES.add(blob.size_bytes)

    async def fail(self, fence: Fence, error: bytes, *, entry: AuditEntry | None = None) -> None:
        """End the flight with an error for those who wait now."""
        event = Failed(fence_number=fence.number, error=error)
        await self._own("flight_end", fence, _FAILED.encode(event), 0, *noted(self._audit, entry), may_repeat=False)
        FLIGHT_ENDS.add(how="failed")

    async def vacate(self, fence: Fence, *, entry: AuditEntry | None = None) -> None:
        """Give the ownership up without an outcome."""
        event = Vacated(fence_number=fence.number)
        await self._own("flight_end", fence, _VACATED.encode(event), 1, *noted(self._audit, entry), may_repeat=False)
        FLIGHT_ENDS.add(how="vacated")

    async def abort_if_unwanted(self, fence: Fence) -> bool:
        """Start aborting if no live waiter is recorded."""
        return await self._own("flight_abort", fence) == 1

    async def outcome(self, key: str, fence_number: int) -> Committed | Failed | Vacated | None:
        """Return how the flight under that fence ended."""
        value = await self._link.execute("GET", self._keys.outcome(key, fence_number), may_repeat=True)
        event = None if value is None else _event(value)
        if isinstance(event, Progressed):
            raise InternalError(f"progress is recorded as the outcome of {key}")
        return event

    async def state(self, key: str) -> dict[str, str | int | float] | None:
        """Return a summary for people."""
        found = await self._link.run("flight_state", self._prefix, key, may_repeat=True)
        return None if found is None else _told(found)

    async def under_way(self) -> dict[str, dict[str, str | int | float]]:
        """Return a summary of every flight, for people."""
        found = await self._link.run("flight_list", self._prefix, may_repeat=True)
        return {key.decode(): _told(told) for key, *told in sorted(found)}

    @asynccontextmanager
    async def events(self, key: str) -> AsyncIterator[AsyncIterator[FlightEvent]]:
        """Subscribe to a flight's events."""
        async with self._link.subscribe(self._keys.events(key)) as messages:
            yield _Events(messages)

    async def _own(self, name: str, fence: Fence, *args: Argument, may_repeat: bool = True) -> int:
        """Run a script of the owner's; StaleFenceError if it owns no more."""
        reply: int = await self._link.run(
            name, self._prefix, fence.key, fence.epoch, fence.number, fence.token, *args, may_repeat=may_repeat
        )
        stale = -1 if name == "flight_abort" else 0
        if reply == stale:
            FLIGHT_WRITES_REFUSED.add()
            raise StaleFenceError(fence.key, fence.number)
        return reply


class _Events(AsyncIterator[FlightEvent]):
    """A channel's messages as events; what another release says, and is not understood, is left to the poll."""

    def __init__(self, messages: AsyncIterator[bytes]) -> None:
        self._messages = messages

    async def __anext__(self) -> FlightEvent:
        while True:
            message = await anext(self._messages)
            try:
                return _event(message)
            except WireError:
                continue


_EVENTS: dict[str, Codec[Any]] = {codec.kind: codec for codec in (_PROGRESSED, _COMMITTED, _FAILED, _VACATED)}


def _told(found: list[Any]) -> dict[str, str | int | float]:
    """Return what a script tells of a flight (lib/flight.lua), by name."""
    number, owner, left_ms, aborting, current, total, waiters, parts = found
    return {
        "fence": int(number),
        "owner": owner.decode(),
        "lease_remaining_s": left_ms / 1000,
        "state": "aborting" if aborting == b"1" else "running",
        "current_bytes": int(current),
        "total_bytes": int(total),
        "waiters": waiters,
        "parts": parts,
    }


def _event(payload: bytes) -> FlightEvent:
    for codec in _EVENTS.values():
        if payload.startswith(wire.header(codec.kind)):
            event: FlightEvent = codec.decode(payload)
            return event
    version, kind, *_ = msgpack.unpackb(payload)
    raise UnknownVersionError(kind, version)


def _elsewhere(reply: list[Any]) -> Elsewhere:
    match reply:
        case [b"present", blob]:
            return Present(blob=BLOB.decode(blob))
        case [b"joined", number, owner, current, total, left_ms, trace]:
            return Joined(
                fence_number=int(number),
                owner=owner.decode(),
                current_bytes=int(current),
                total_bytes=int(total),
                lease_remaining_s=left_ms / 1000,
                trace=trace.decode(),
            )
        case [b"aborting", number, left_ms]:
            return Aborting(fence_number=int(number), lease_remaining_s=left_ms / 1000)
        case _:
            raise InternalError(f"flight_join answered {reply!r}")


def _upload(fields: list[bytes] | None, parts: list[bytes]) -> UploadState | None:
    if fields is None:
        return None
    key, upload_id, part_bytes = fields
    numbers, etags = parts[::2], parts[1::2]
    return UploadState(
        key=key.decode(),
        upload_id=upload_id.decode(),
        part_bytes=int(part_bytes),
        parts={int(number): etag.decode() for number, etag in sorted(zip(numbers, etags, strict=True))},
    )
