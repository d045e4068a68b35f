"""Verified fakes of everything that is kept in Redis.

They pass the contract suites that the Redis adapters pass, run in one process, and take their time from the
clock they are given, so that tests move it by hand. State is shared by the stores of one :class:`Memory`,
as it is by those of one Redis.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from cluster import tracing
from cluster.audit import AuditEntry, Operation, absence
from cluster.circuit import BURST_S, BreakerLimits, Circuit, HostCircuit
from cluster.collect.ports import Doomed
from cluster.collect.rounds import Round
from cluster.collect.sweep import NAMELESS, Suspect
from cluster.config import AuditConfig
from cluster.digest import Digest, is_digest
from cluster.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    InternalError,
    LeaseLostError,
    NonAddressableParentError,
    RateLimitedError,
    RefNotFoundError,
    StaleFenceError,
)
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
from cluster.lease import Lease, LeaseId, blob_resource, image_resource, ref_resource
from cluster.origin import merge_origins
from cluster.ports import Slot
from cluster.progress import ProgressItem
from cluster.provider import ProviderHandle
from cluster.quota import ANYBODYS, Budget, Quota, pace_of
from cluster.ref import BlobRecord, ChainUse, ImageRecord, RefId, RefRecord, RefState, RefUsage
from storage.renewer import ThreadFlightRenewer, Waiting

_FIND_LIMIT = 20
_FLIGHT_LEASE_S = 120.0
_OUTCOME_S = 60.0
_DAY_S = 24 * 3600.0
_ASK_S = 0.005
_RECENT_S = 2.0
_LIFT = 4.0


@dataclass(slots=True)
class _Flight:
    """An owner's hold."""

    fence: Fence
    owner: str
    expires_s: float
    is_aborting: bool = False
    current_bytes: int = 0
    total_bytes: int = 0
    trace: str = ""


@dataclass(slots=True)
class _Outcome:
    """How a flight ended, and until when that is known."""

    event: Committed | Failed | Vacated
    expires_s: float


class Memory:
    """What one Redis would hold."""

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self.now_s = now_s
        self.records: dict[RefId, RefRecord] = {}
        self.usages: dict[RefId, RefUsage] = {}
        self.providers: dict[Digest, set[ProviderHandle]] = {}
        self.blobs: dict[Digest, BlobRecord] = {}
        self.images: dict[str, ImageRecord] = {}
        self.images_by_digest: dict[Digest, ImageRecord] = {}
        self.images_by_ref: dict[RefId, ImageRecord] = {}
        self.deleting: dict[Doomed, float] = {}
        self.strays: dict[Suspect, float] = {}
        self.turns: set[str] = set()
        self.rounds: dict[str, Round] = {}
        self.leases: dict[LeaseId, Lease] = {}
        self.epoch = "memory"
        self.last_fence = 0
        self.flights: dict[str, _Flight] = {}
        self.waiters: dict[str, dict[str, float]] = {}
        self.uploads: dict[str, tuple[UploadState, float]] = {}
        self.outcomes: dict[tuple[str, int], _Outcome] = {}
        self.listeners: dict[str, set[asyncio.Queue[FlightEvent]]] = {}
        self.proofs: dict[tuple[str, str, Digest], float] = {}
        self.streams: dict[str, list[ProgressItem]] = {}
        self.hosts: dict[str, _Host] = {}
        self.audit: deque[AuditEntry] = deque()
        #: How many entries there have ever been.
        self.audited = 0

    def note(self, entry: AuditEntry | None, *, most: int) -> None:
        """Append to the audit stream, which has *most* entries at most."""
        if entry is None or not most:
            return
        self.audit.append(replace(entry, wall_s=self.now_s()))
        self.audited += 1
        while len(self.audit) > most:
            self.audit.popleft()

    def is_live(self, lease_id: LeaseId) -> bool:
        """Tell whether a lease is live."""
        lease = self.leases.get(lease_id)
        return lease is not None and (lease.expires_wall_s is None or lease.expires_wall_s > self.now_s())

    def hold(self, lease_id: LeaseId, resources: Iterable[str]) -> None:
        """Hold resources by a lease.

        Raises:
            LeaseLostError: there is no such live lease.
        """
        if not self.is_live(lease_id):
            raise LeaseLostError(lease_id)
        lease = self.leases[lease_id]
        self.leases[lease_id] = replace(lease, resources=tuple(sorted({*lease.resources, *resources})))


class MemoryLeaseStore:
    """Fake of :class:`storage.leases.RedisLeaseStore`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def create(self, lease_id: LeaseId, *, ttl_s: float | None, labels: Mapping[str, str] | None = None) -> Lease:
        """Make a lease, or renew the live one of that ID."""
        now_s = self._memory.now_s()
        expires_s = None if ttl_s is None else now_s + ttl_s
        if self._memory.is_live(lease_id):
            lease = self._extended(self._memory.leases[lease_id], expires_s)
        else:
            lease = Lease(id=lease_id, expires_wall_s=expires_s, created_wall_s=now_s, labels=dict(labels or {}))
        self._memory.leases[lease_id] = lease
        return lease

    async def renew(self, lease_id: LeaseId, *, ttl_s: float) -> None:
        """Move the expiry."""
        if not self._memory.is_live(lease_id):
            raise LeaseLostError(lease_id)
        lease = self._memory.leases[lease_id]
        self._memory.leases[lease_id] = self._extended(lease, self._memory.now_s() + ttl_s)

    async def attach(self, lease_id: LeaseId, resources: Sequence[str]) -> None:
        """Hold resources."""
        self._memory.hold(lease_id, resources)

    async def get(self, lease_id: LeaseId) -> Lease | None:
        """Return a live lease."""
        return self._memory.leases[lease_id] if self._memory.is_live(lease_id) else None

    async def delete(self, lease_id: LeaseId) -> bool:
        """Delete a lease."""
        was_live = self._memory.is_live(lease_id)
        self._memory.leases.pop(lease_id, None)
        return was_live

    async def leases(self) -> list[Lease]:
        """Return the live leases."""
        live = [lease for lease in self._memory.leases.values() if self._memory.is_live(lease.id)]
        return sorted(live, key=lambda lease: (lease.expires_wall_s is None, lease.expires_wall_s or 0.0, lease.id))

    async def holders(self, resource: str) -> list[LeaseId]:
        """Return who holds a resource."""
        return sorted(lease.id for lease in await self.leases() if resource in lease.resources)

    def _extended(self, lease: Lease, expires_s: float | None) -> Lease:
        return lease if lease.expires_wall_s is None else replace(lease, expires_wall_s=expires_s)


class MemoryRefStore:
    """Fake of :class:`storage.refs.RedisRefStore`."""

    def __init__(self, memory: Memory, audit: AuditConfig | None = None) -> None:
        self._memory = memory
        self._audited = audit.most_entries if audit else 0

    async def get_or_create(
        self,
        records: Sequence[RefRecord],
        providers: Mapping[Digest, Sequence[ProviderHandle]],
        *,
        lease_id: LeaseId,
    ) -> list[RefState]:
        """Make or find the records."""
        memory = self._memory
        if not memory.is_live(lease_id):
            raise LeaseLostError(lease_id)
        known = set(memory.records)
        for record in records:
            if record.parent is not None and record.parent not in known:
                raise NonAddressableParentError(record.parent)
            known.add(record.id)
        for digest, handles in providers.items():
            memory.providers.setdefault(digest, set()).update(handles)
        for record in records:
            stored = memory.records.get(record.id)
            if stored is None:
                stored = replace(record, created_wall_s=memory.now_s())
            memory.records[record.id] = replace(
                stored,
                image_refs=tuple(sorted({*stored.image_refs, *record.image_refs})),
                description=stored.description or record.description,
                origins=merge_origins(stored.origins, record.origins),
            )
        await self.use([record.id for record in records], lease_id=lease_id)
        return [self._state(record.id) for record in records]

    async def get(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Look refs up."""
        return [self._state(ref_id) if ref_id in self._memory.records else None for ref_id in ref_ids]

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return the ref and all below it, lowest first."""
        chain: list[RefState] = []
        below: RefId | None = ref_id
        while below is not None:
            if below not in self._memory.records:
                raise RefNotFoundError(below)
            chain.insert(0, self._state(below))
            below = chain[0].record.parent
        return chain

    async def use(self, ref_ids: Sequence[RefId], *, lease_id: LeaseId) -> None:
        """Attach refs to the lease and mark them used."""
        memory = self._memory
        if not memory.is_live(lease_id):
            raise LeaseLostError(lease_id)
        for ref_id in ref_ids:
            if ref_id not in memory.records:
                raise RefNotFoundError(ref_id)
        for ref_id in ref_ids:
            before = memory.usages.get(ref_id)
            count = 1 if before is None else before.usage_count + 1
            memory.usages[ref_id] = RefUsage(last_used_wall_s=memory.now_s(), usage_count=count)
        memory.hold(lease_id, [ref_resource(ref_id) for ref_id in ref_ids])

    async def usage(self, ref_id: RefId) -> RefUsage:
        """Return when and how often a ref was used."""
        if ref_id not in self._memory.usages:
            raise RefNotFoundError(ref_id)
        return self._memory.usages[ref_id]

    async def find(self, prefix: str) -> list[RefId]:
        """Return refs by the start of their ID."""
        start = "sha256:" + prefix.removeprefix("sha256:")
        return sorted(ref_id for ref_id in self._memory.records if ref_id.startswith(start))[:_FIND_LIMIT]

    async def list_refs(self) -> list[RefId]:
        """Return every ref, most recently used first."""
        usages = self._memory.usages
        return sorted(usages, key=lambda ref_id: (usages[ref_id].last_used_wall_s, ref_id), reverse=True)

    async def refs_of_chain(self, chain: Digest) -> list[RefId]:
        """Return the refs with that chain ID."""
        return sorted(ref_id for ref_id, record in self._memory.records.items() if record.chain == chain)

    async def uses_of_chains(self, chains: Sequence[Digest]) -> list[ChainUse]:
        """Return who needs chains."""
        leases = [lease for lease in self._memory.leases.values() if self._memory.is_live(lease.id)]
        found: list[ChainUse] = []
        for chain in chains:
            refs = await self.refs_of_chain(chain)
            held = {ref_resource(ref_id) for ref_id in refs}
            holders = sorted(lease.id for lease in leases if held.intersection(lease.resources))
            found.append(ChainUse(refs=tuple(refs), holders=tuple(holders)))
        return found

    async def put_image(self, image: ImageRecord, *, lease_id: LeaseId) -> ImageRecord:
        """Record an image and attach it to the lease."""
        memory = self._memory
        memory.hold(lease_id, [image_resource(image.name)])
        stored = replace(image, created_wall_s=memory.now_s())
        memory.images[image.name] = stored
        memory.images_by_digest[image.manifest.digest] = stored
        if image.ref is not None:
            memory.images_by_ref[image.ref] = stored
        return stored

    async def image(self, name_or_digest: str) -> ImageRecord | None:
        """Return an image by name or manifest digest."""
        if is_digest(name_or_digest):
            return self._memory.images_by_digest.get(Digest(name_or_digest))
        return self._memory.images.get(name_or_digest)

    async def images(self) -> list[ImageRecord]:
        """Return every image, by name."""
        return [image for _, image in sorted(self._memory.images.items())]

    async def image_of_ref(self, ref_id: RefId) -> ImageRecord | None:
        """Return the image most recently resolved whose top is that ref."""
        return self._memory.images_by_ref.get(ref_id)

    async def blobs(self, digests: Sequence[Digest]) -> list[BlobRecord | None]:
        """Tell which blobs are present."""
        return [self._memory.blobs.get(digest) for digest in digests]

    async def hold_blobs(self, digests: Sequence[Digest], *, lease_id: LeaseId) -> list[BlobRecord | None]:
        """Attach the blobs that are present to the lease, and return them."""
        found = [self._memory.blobs.get(digest) for digest in digests]
        self._memory.hold(lease_id, [blob_resource(blob.digest) for blob in found if blob is not None])
        return found

    async def providers(self, digests: Sequence[Digest]) -> list[tuple[ProviderHandle, ...]]:
        """Return the providers known for each digest."""
        return [self._handles(digest) for digest in digests]

    async def add_providers(self, digest: Digest, providers: Sequence[ProviderHandle]) -> None:
        """Add providers for a digest."""
        self._memory.providers.setdefault(digest, set()).update(providers)

    async def mark_absent(
        self,
        blob: BlobRecord,
        reason: str,  # noqa: ARG002 - the fake keeps no reasons
        *,
        delete_after_s: float | None = None,
    ) -> bool:
        """Turn a blob lazy again, if it is still that very upload."""
        present = self._memory.blobs.get(blob.digest)
        if present is None or present.key != blob.key:
            return False
        del self._memory.blobs[blob.digest]
        if delete_after_s is not None:
            self._memory.deleting[Doomed(blob.digest, blob.key)] = self._memory.now_s() + delete_after_s
        self._memory.note(absence(blob), most=self._audited)
        return True

    def _state(self, ref_id: RefId) -> RefState:
        record = self._memory.records[ref_id]
        digest = record.blob.digest
        return RefState(record=record, present=self._memory.blobs.get(digest), providers=self._handles(digest))

    def _handles(self, digest: Digest) -> tuple[ProviderHandle, ...]:
        return tuple(sorted(self._memory.providers.get(digest, ())))


class MemoryFlightStore:
    """Fake of :class:`storage.flights.RedisFlightStore`.

    What decides who may write is in small methods of its own, so that tests can break one at a time and
    see that it is noticed.
    """

    def __init__(self, memory: Memory, audit: AuditConfig | None = None) -> None:
        self._memory = memory
        self._audited = audit.most_entries if audit else 0

    async def join(self, key: str, *, worker: str, token: str, ttl_s: float) -> JoinOutcome:
        """Join or own the flight of *key*."""
        memory = self._memory
        flight = memory.flights.get(key)
        if flight is not None and flight.fence.token == token and self._is_live(flight) and not flight.is_aborting:
            return Owned(fence=flight.fence, upload=self._upload(key))
        if (joined := await self.join_another(key, worker=worker, ttl_s=ttl_s)) is not None:
            return joined
        if flight is not None:
            self._settle(key, Vacated(fence_number=flight.fence.number))
        fence = Fence(key=key, epoch=memory.epoch, number=self._next_fence(), token=token)
        trace = tracing.current().traceparent
        memory.flights[key] = _Flight(fence=fence, owner=worker, expires_s=memory.now_s() + ttl_s, trace=trace)
        memory.waiters.get(key, {}).pop(worker, None)
        upload = self._upload(key)
        if flight is not None:
            entry = AuditEntry(
                operation=Operation.TAKE_OVER,
                outcome="afresh" if upload is None else "resumed",
                by=worker,
                source=flight.owner,
                digest=_digest(key) if key.startswith("blob:") else "",
                fence=fence.number,
            )
            memory.note(entry, most=self._audited)
        return Owned(fence=fence, upload=upload)

    async def join_another(self, key: str, *, worker: str, ttl_s: float) -> Elsewhere | None:
        """Join another's flight of *key*; None where nobody has one."""
        memory = self._memory
        if (blob := memory.blobs.get(_digest(key))) is not None:
            return Present(blob=blob)
        flight = memory.flights.get(key)
        if flight is None or not self._is_live(flight):
            return None
        now_s = memory.now_s()
        remaining_s = flight.expires_s - now_s
        if flight.is_aborting:
            return Aborting(fence_number=flight.fence.number, lease_remaining_s=remaining_s)
        memory.waiters.setdefault(key, {})[worker] = now_s + ttl_s
        return Joined(
            fence_number=flight.fence.number,
            owner=flight.owner,
            current_bytes=flight.current_bytes,
            total_bytes=flight.total_bytes,
            lease_remaining_s=remaining_s,
            trace=flight.trace,
        )

    async def leave(self, key: str, *, worker: str) -> bool:
        """Stop waiting; tell whether nobody is left waiting."""
        self._memory.waiters.get(key, {}).pop(worker, None)
        if self._is_awaited(key):
            return False
        flight = self._memory.flights.get(key)
        if flight is not None and self._is_live(flight):
            self._publish(key, _progress(flight))
        return True

    async def begin_upload(self, fence: Fence, upload: UploadState) -> None:
        """Record the upload this owner has begun."""
        self._owned(fence)
        self._memory.uploads[fence.key] = (replace(upload, parts=dict(upload.parts)), self._memory.now_s() + _DAY_S)

    async def record_part(self, fence: Fence, number: int, etag: str) -> None:
        """Record one uploaded part."""
        self._owned(fence)
        if (upload := self._upload(fence.key)) is None:
            return
        upload = replace(upload, parts=dict(sorted({**upload.parts, number: etag}.items())))
        self._memory.uploads[fence.key] = (upload, self._memory.now_s() + _DAY_S)

    async def drop_upload(self, fence: Fence) -> None:
        """Forget the recorded upload."""
        self._owned(fence)
        self._memory.uploads.pop(fence.key, None)

    async def report(self, fence: Fence, current_bytes: int, total_bytes: int) -> None:
        """Tell how far the fetch is."""
        flight = self._owned(fence)
        flight.current_bytes, flight.total_bytes = current_bytes, total_bytes
        self._publish(fence.key, _progress(flight))

    async def commit(self, fence: Fence, blob: BlobRecord, *, entry: AuditEntry | None = None) -> None:
        """Make *blob* present and end the flight."""
        if fence.key != blob_resource(blob.digest):
            raise InternalError(f"a flight for {fence.key} commits {blob.digest}")
        memory = self._memory
        present = memory.blobs.get(blob.digest)
        if not self._is_owner(fence) and present is not None and present.key == blob.key:
            return
        self._owned(fence)
        memory.blobs[blob.digest] = blob
        memory.deleting.pop(Doomed(NAMELESS, blob.key), None)
        now_s = memory.now_s()
        lease_id = LeaseId(f"flight:{blob.digest}")
        if not memory.is_live(lease_id):
            memory.leases[lease_id] = Lease(
                id=lease_id, expires_wall_s=None, created_wall_s=now_s, labels={"kind": "flight"}
            )
        memory.leases[lease_id] = replace(memory.leases[lease_id], expires_wall_s=now_s + _FLIGHT_LEASE_S)
        memory.hold(lease_id, [blob_resource(blob.digest)])
        memory.uploads.pop(fence.key, None)
        self._end(fence.key, Committed(fence_number=fence.number, blob=blob))
        memory.waiters.pop(fence.key, None)
        memory.note(entry, most=self._audited)

    async def fail(self, fence: Fence, error: bytes, *, entry: AuditEntry | None = None) -> None:
        """End the flight with an error."""
        self._owned(fence)
        self._end(fence.key, Failed(fence_number=fence.number, error=error))
        self._memory.waiters.pop(fence.key, None)
        self._memory.note(entry, most=self._audited)

    async def vacate(self, fence: Fence, *, entry: AuditEntry | None = None) -> None:
        """Give the ownership up without an outcome."""
        self._owned(fence)
        self._end(fence.key, Vacated(fence_number=fence.number))
        self._memory.note(entry, most=self._audited)

    async def abort_if_unwanted(self, fence: Fence) -> bool:
        """Start aborting if no live waiter is recorded."""
        flight = self._owned(fence)
        if not flight.is_aborting and self._is_awaited(fence.key):
            return False
        flight.is_aborting = True
        self._memory.waiters.pop(fence.key, None)
        return True

    async def outcome(self, key: str, fence_number: int) -> Committed | Failed | Vacated | None:
        """Return how the flight under that fence ended."""
        outcome = self._memory.outcomes.get((key, fence_number))
        return outcome.event if outcome is not None and outcome.expires_s > self._memory.now_s() else None

    async def state(self, key: str) -> dict[str, str | int | float] | None:
        """Return a summary for people."""
        flight = self._memory.flights.get(key)
        if flight is None or not self._is_live(flight):
            return None
        upload = self._upload(key)
        return {
            "fence": flight.fence.number,
            "owner": flight.owner,
            "lease_remaining_s": flight.expires_s - self._memory.now_s(),
            "state": "aborting" if flight.is_aborting else "running",
            "current_bytes": flight.current_bytes,
            "total_bytes": flight.total_bytes,
            "waiters": self._waiting(key),
            "parts": len(upload.parts) if upload else 0,
        }

    async def under_way(self) -> dict[str, dict[str, str | int | float]]:
        """Return a summary of every flight, for people."""
        told = {key: await self.state(key) for key in sorted(self._memory.flights)}
        return {key: flight for key, flight in told.items() if flight is not None}

    @asynccontextmanager
    async def events(self, key: str) -> AsyncIterator[AsyncIterator[FlightEvent]]:
        """Subscribe to a flight's events."""
        queue: asyncio.Queue[FlightEvent] = asyncio.Queue()
        listeners = self._memory.listeners.setdefault(key, set())
        listeners.add(queue)
        try:
            yield _Queued(queue)
        finally:
            listeners.discard(queue)

    # -- what decides; tests break these one at a time ----------------------------------------------------

    def _is_live(self, flight: _Flight) -> bool:
        return flight.expires_s > self._memory.now_s()

    def _is_owner(self, fence: Fence) -> bool:
        flight = self._memory.flights.get(fence.key)
        return flight is not None and flight.fence == fence and self._is_live(flight)

    def _is_awaited(self, key: str) -> bool:
        return self._waiting(key) > 0

    def _next_fence(self) -> int:
        self._memory.last_fence += 1
        return self._memory.last_fence

    def _settle(self, key: str, event: Committed | Failed | Vacated) -> None:
        self._memory.outcomes[key, event.fence_number] = _Outcome(event, self._memory.now_s() + _OUTCOME_S)
        self._publish(key, event)

    def _end(self, key: str, event: Committed | Failed | Vacated) -> None:
        del self._memory.flights[key]
        self._settle(key, event)

    def _upload(self, key: str) -> UploadState | None:
        upload, expires_s = self._memory.uploads.get(key, (None, 0.0))
        return upload if expires_s > self._memory.now_s() else None

    # -- the rest -------------------------------------------------------------------------------------------

    def renew(self, fence: Fence, ttl_s: float) -> bool:
        """Renew an ownership; tell whether it still was one."""
        if not self._is_owner(fence):
            return False
        self._memory.flights[fence.key].expires_s = self._memory.now_s() + ttl_s
        return True

    def renew_waiting(self, key: str, worker: str, ttl_s: float) -> bool:
        """Renew a waiter's record; tell whether there was one."""
        waiters = self._memory.waiters.get(key, {})
        if worker not in waiters:
            return False
        waiters[worker] = self._memory.now_s() + ttl_s
        return True

    def _owned(self, fence: Fence) -> _Flight:
        if not self._is_owner(fence):
            raise StaleFenceError(fence.key, fence.number)
        return self._memory.flights[fence.key]

    def _waiting(self, key: str) -> int:
        return sum(until_s > self._memory.now_s() for until_s in self._memory.waiters.get(key, {}).values())

    def _publish(self, key: str, event: FlightEvent) -> None:
        for queue in self._memory.listeners.get(key, ()):
            queue.put_nowait(event)


class _Queued(AsyncIterator[FlightEvent]):
    def __init__(self, queue: asyncio.Queue[FlightEvent]) -> None:
        self._queue = queue

    async def __anext__(self) -> FlightEvent:
        return await self._queue.get()


class MemoryFlightRenewer(ThreadFlightRenewer):
    """The renewing thread over a :class:`MemoryFlightStore`."""

    def __init__(self, flights: MemoryFlightStore) -> None:
        super().__init__(_MemoryRenewals(flights))


class _MemoryRenewals:
    def __init__(self, flights: MemoryFlightStore) -> None:
        self._flights = flights

    def renew(self, kept: Sequence[tuple[Fence | Waiting, float]], timeout_s: float) -> list[bool]:  # noqa: ARG002 - at once
        return [
            self._flights.renew(what, ttl_s)
            if isinstance(what, Fence)
            else self._flights.renew_waiting(what.key, what.worker, ttl_s)
            for what, ttl_s in kept
        ]

    def close(self) -> None:
        pass


class MemoryProofStore:
    """Fake of :class:`storage.proofs.RedisProofStore`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def record(self, identity: str, source: str, digests: Sequence[Digest], *, ttl_s: float) -> None:
        """Record what *identity* has read in *source*."""
        for digest in digests:
            proof = (identity, source, digest)
            expires_s = self._memory.now_s() + ttl_s
            self._memory.proofs[proof] = max(expires_s, self._memory.proofs.get(proof, 0.0))

    async def proven(
        self, pairs: Sequence[tuple[str, str]], digests: Sequence[Digest]
    ) -> list[frozenset[tuple[str, str]]]:
        """Return, for each digest, which of *pairs* have a live proof of it."""
        now_s, proofs = self._memory.now_s(), self._memory.proofs
        return [frozenset(p for p in pairs if proofs.get((*p, digest), 0.0) > now_s) for digest in digests]


@dataclass(slots=True, kw_only=True)
class _Quota:
    """What little is left of one budget."""

    every_s: float = 0.0
    #: When the last of those that have a turn may ask, until when nobody may, and when all is there again.
    last_s: float = 0.0
    hold_until_s: float = 0.0
    until_s: float = 0.0
    turns: dict[str, float] = field(default_factory=dict)

    def wait_s(self, slot: str, now_s: float, patience_s: float) -> float:
        """Return the seconds until a request may be made; it gets a turn if that is within its patience."""
        if self.until_s <= now_s or self.hold_until_s > now_s:
            return max(0.0, self.hold_until_s - now_s)
        turn_s = self.turns.get(slot)
        if turn_s is None:
            turn_s = min(self.until_s, max(now_s, self.last_s + self.every_s))
            if turn_s - now_s <= patience_s:
                self.turns[slot] = self.last_s = turn_s
        return max(0.0, turn_s - now_s)


#: Of a budget of which enough is left.
_NO_QUOTA = _Quota()


@dataclass(slots=True)
class _Host:
    """What is known of one host."""

    circuit: HostCircuit
    slots: int = 0
    limit: float | None = None
    not_before_s: float = 0.0
    halved_s: float = -10.0
    queue: deque[str] = field(default_factory=deque)
    quotas: dict[Budget, _Quota] = field(default_factory=dict)
    #: What 429s have brought the rate down to, and where that ends if none is configured.
    rate: float | None = None
    lift_at: float = math.inf
    #: Tokens, None for a full bucket, and requests of late, each for less as it gets older: as of ``asked_s``.
    tokens: float | None = None
    recent: float = 0.0
    asked_s: float = 0.0

    def pass_time(self, now_s: float, rate: float) -> float:
        """Bring tokens and recent requests up to date; return the tokens."""
        passed_s, capacity = max(0.0, now_s - self.asked_s), max(1.0, rate)
        tokens = capacity if self.tokens is None else min(capacity, self.tokens + passed_s * rate)
        self.tokens = tokens if rate else 1.0
        self.recent *= math.exp(-passed_s / _RECENT_S)
        self.asked_s = now_s
        return self.tokens


class MemoryHostLimiter:
    """Fake of :class:`storage.limits.RedisHostLimiter`."""

    def __init__(
        self,
        memory: Memory,
        limit: Callable[[str], int] = lambda _host: 12,
        rate: Callable[[str], float] = lambda _host: 0.0,
        breaker: BreakerLimits | None = None,
        quota_pace_s: float = 10.0,
    ) -> None:
        self._memory = memory
        self._configured = limit
        self._configured_rate = rate
        self._breaker = breaker or BreakerLimits(failures=5, open_s=5.0)
        self._quota_pace_s = quota_pace_s
        self._hosts = memory.hosts

    @asynccontextmanager
    async def slot(self, host: str, *, deadline_s: float, budget: Budget = ANYBODYS) -> AsyncIterator[Slot]:
        """Hold one of the host's slots."""
        state, slot = self._host(host), Slot(host, secrets.token_hex(8), budget=budget)
        give_up_s = time.monotonic() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                # The test's clock wakes nobody.
                while not self._is_its_turn(state, slot, give_up_s - time.monotonic()):  # noqa: ASYNC110
                    await asyncio.sleep(_ASK_S)
        except TimeoutError as exc:
            raise DeadlineExceededError(f"a request slot for {host}", f"none came free in {deadline_s:g} s") from exc
        finally:
            if slot.name in state.queue:
                state.queue.remove(slot.name)
            state.quotas.get(budget, _NO_QUOTA).turns.pop(slot.name, None)
        self._ask(host, state)
        state.slots += 1
        try:
            yield replace(slot, is_probe=state.circuit.begun(slot.name, self._memory.now_s()))
        finally:
            state.slots -= 1
            state.circuit.left(slot.name, self._memory.now_s())

    async def quoted(self, slot: Slot, quotas: Sequence[Quota]) -> None:
        """Record what is left."""
        state, now_s = self._host(slot.host), self._memory.now_s()
        pace = pace_of(quotas, slowest_s=self._quota_pace_s)
        known = state.quotas.pop(slot.budget, None)
        if pace is not None:
            state.quotas[slot.budget] = _Quota(
                every_s=pace.every_s,
                last_s=max(now_s, known.last_s if known else 0.0),
                hold_until_s=now_s + pace.hold_s,
                until_s=now_s + pace.for_s,
                turns=known.turns if known else {},
            )

    def _is_its_turn(self, state: _Host, slot: Slot, patience_s: float) -> bool:
        now_s = self._memory.now_s()
        self._raise_if_given_up(slot.host, state, slot.name)
        quota_s = state.quotas.get(slot.budget, _NO_QUOTA).wait_s(slot.name, now_s, patience_s)
        wait_s = max(state.not_before_s - now_s, quota_s)
        if wait_s > patience_s:
            raise RateLimitedError(f"a request to {slot.host}", f"it allows none for {wait_s:.0f} s", wait_s)
        if quota_s > 0:
            if slot.name in state.queue:
                state.queue.remove(slot.name)
            return False
        if slot.name not in state.queue:
            state.queue.append(slot.name)
        return self._is_free(slot.host, state, slot.name)

    async def throttled(self, slot: Slot, retry_after_s: float) -> None:
        """Record a 429."""
        host, state = slot.host, self._host(slot.host)
        now_s = self._memory.now_s()
        state.not_before_s = max(state.not_before_s, now_s + retry_after_s)
        if now_s - state.halved_s > BURST_S:
            state.limit = max(1.0, self._limit(host) / 2)
            state.halved_s = now_s
            self._slow_down(host, state)
        state.circuit.answered(slot.name)

    async def succeeded(self, slot: Slot) -> None:
        """Record an answer."""
        host = slot.host
        limit, state = self._limit(host), self._host(host)
        state.limit = limit + 1 / limit
        if state.rate is not None:
            state.rate += 1 / state.rate
            if state.rate >= (self._configured_rate(host) or state.lift_at):
                state.rate = None
        state.circuit.answered(slot.name)

    async def failed(self, slot: Slot, failure: str) -> None:
        """Record a failure."""
        self._host(slot.host).circuit.failed(slot.name, failure, self._memory.now_s())

    def _host(self, host: str) -> _Host:
        if host not in self._hosts:
            self._hosts[host] = _Host(HostCircuit(self._breaker))
        return self._hosts[host]

    def _limit(self, host: str) -> float:
        limit = self._host(host).limit
        return self._configured(host) if limit is None else min(limit, self._configured(host))

    def _rate(self, host: str, state: _Host) -> float:
        return self._configured_rate(host) if state.rate is None else state.rate

    def _is_free(self, host: str, state: _Host, place: str) -> bool:
        """Tell whether it is *place*'s turn; raises CircuitOpenError where the host was given up."""
        self._raise_if_given_up(host, state, place)
        now_s = self._memory.now_s()
        rate, before = self._rate(host, state), state.queue.index(place)
        tokens = state.pass_time(now_s, rate)
        has_token = not rate or tokens >= before + 1
        return now_s >= state.not_before_s and has_token and before < int(self._limit(host)) - state.slots

    def _raise_if_given_up(self, host: str, state: _Host, place: str) -> None:
        circuit, now_s = state.circuit, self._memory.now_s()
        if not circuit.admits(place, now_s):
            retry_in_s = circuit.retry_s - now_s if circuit.state is Circuit.OPEN else 0.0
            raise CircuitOpenError(host, now_s - circuit.opened_s, circuit.last_failure, retry_in_s)

    def _ask(self, host: str, state: _Host) -> None:
        rate = self._rate(host, state)
        tokens = state.pass_time(self._memory.now_s(), rate)
        state.tokens = tokens - 1 if rate else tokens
        state.recent += 1

    def _slow_down(self, host: str, state: _Host) -> None:
        configured, rate = self._configured_rate(host) or math.inf, self._rate(host, state)
        state.tokens = min(1.0, state.pass_time(self._memory.now_s(), rate))
        asked = min(rate or math.inf, state.recent / _RECENT_S)
        state.rate = min(configured, max(1.0, asked / 2))
        state.lift_at = _LIFT * state.rate


class MemoryProgressStore:
    """Fake of :class:`storage.progress.RedisProgressStore`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._came = asyncio.Event()

    async def publish(self, streams: Sequence[str], item: ProgressItem) -> None:
        """Append *item* to each of *streams*."""
        for stream in streams:
            self._memory.streams.setdefault(stream, []).append(item)
        self._came.set()
        self._came = asyncio.Event()

    async def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield the stream's items from its start, then live, until it ends."""
        read = 0
        while True:
            came = self._came
            for item in self._memory.streams.get(stream, [])[read:]:
                read += 1
                if item.item == "":
                    return
                yield item
            if read == len(self._memory.streams.get(stream, [])):
                await came.wait()


def _digest(key: str) -> Digest:
    return Digest(key.removeprefix("blob:"))


def _progress(flight: _Flight) -> Progressed:
    return Progressed(
        fence_number=flight.fence.number, current_bytes=flight.current_bytes, total_bytes=flight.total_bytes
    )
