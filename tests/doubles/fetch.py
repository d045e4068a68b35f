"""Doubles for everything around a fetch: sources, staging, transfers, renewers, registries, snapshotters."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.descriptor import Descriptor
from cluster.digest import Digest, digest_of
from cluster.errors import AccessDeniedError, ClusterError, LayerError, StaleFenceError, UnavailableError
from cluster.fetch.runner import Caller, Fetched
from cluster.flight.values import Fence, UploadState
from cluster.lease import LeaseId
from cluster.ports import AppliedLayer, Authorization, Authorizer, AuthRequest
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord
from storage.memory import MemoryFlightStore
from storage.memory_blobs import MemoryStream

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
HANDLE = ProviderHandle(registry="r.example", repository="app")


def layer_of(data: bytes, *, diff: str | None = None, **more) -> Descriptor:
    """Return the descriptor of a layer whose blob is *data*."""
    return Descriptor(
        media_type=more.pop("media_type", LAYER),
        digest=digest_of(data),
        size_bytes=len(data),
        diff_id=digest_of((diff or f"diff of {digest_of(data)}").encode()),
        **more,
    )


def handle(repository: str, registry: str = "r.example") -> ProviderHandle:
    return ProviderHandle(registry=registry, repository=repository)


class FakeAuthorizer:
    """A caller with a name, the same at every registry."""

    def __init__(self, name: str = "alice") -> None:
        self.name = name

    def identity(self, registry: str) -> str:
        return f"{self.name}@{registry}"

    async def authorize(self, request: AuthRequest) -> Authorization | None:
        return None


# -- the byte path ---------------------------------------------------------------------------------------


class MemoryStaging:
    """A staging file in memory that says how it ended."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)
        self.frontier = 0
        self.error = None
        self.is_discarded = False

    def pwrite(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def advance(self, frontier: int) -> None:
        assert frontier >= self.frontier, "the frontier went back"
        self.frontier = frontier

    def fail(self, error) -> None:
        self.error = error

    def discard(self) -> None:
        self.is_discarded = True


@dataclass
class Fault:
    """What one answer of a source does instead of its work."""

    #: Raised by the open itself.
    at_open: Exception | None = None
    #: After so many bytes of the answer …
    after: int = 0
    #: … this is raised, or, where it is None, the answer ends.
    then: Exception | None = None


class FakeSource:
    """One blob at one place, with a fault for each of its first answers."""

    def __init__(self, data: bytes, name: str = "r.example/app", *, faults: Sequence[Fault | None] = ()) -> None:
        self.data = data
        self.name = self.origin = name
        self.faults = list(faults)
        #: False: answers a range with all of it, and status 200.
        self.ranges = True
        #: Raised for each range, if set.
        self.range_error: Exception | None = None
        self.total_bytes: int | None = len(data)
        self.opened: list[tuple[int, int | None]] = []
        self.served_bytes = 0
        #: Called with (offset, count) before bytes are handed out, in the reader's thread.
        self.on_read: Callable[[int, int], None] = lambda _offset, _count: None
        self._lock = threading.Lock()

    @contextmanager
    def open(self, offset: int, length: int | None) -> Iterator[FakeResponse]:
        is_range = offset > 0 or length is not None
        with self._lock:
            self.opened.append((offset, length))
            fault = self.faults.pop(0) if self.faults else None
        if fault is not None and fault.at_open is not None:
            raise fault.at_open
        if is_range and self.range_error is not None:
            raise self.range_error
        if is_range and self.ranges:
            end = len(self.data) if length is None else offset + length
            yield FakeResponse(self, offset, end, 206, fault)
        else:
            yield FakeResponse(self, 0, len(self.data), 200, fault)


class FakeResponse:
    """One answer of a :class:`FakeSource`."""

    def __init__(self, source: FakeSource, offset: int, end: int, status: int, fault: Fault | None) -> None:
        self.status = status
        self.total_bytes = source.total_bytes
        self._source = source
        self._at = offset
        self._end = min(end, len(source.data))
        self._fault = fault
        self._fault_at = None if fault is None else offset + fault.after

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), self._end - self._at)
        if self._fault_at is not None:
            count = min(count, self._fault_at - self._at)
            if not count:
                if self._fault.then is not None:
                    raise self._fault.then
                return 0
        self._source.on_read(self._at, count)
        buffer[:count] = self._source.data[self._at : self._at + count]
        self._at += count
        with self._source._lock:
            self._source.served_bytes += count
        return count


class FakeJournal:
    """What a flight would be told; loses its fence when told to."""

    def __init__(self) -> None:
        self.upload: UploadState | None = None
        self.parts: dict[int, str] = {}
        self.reports: list[tuple[int, int]] = []
        self.dropped = 0
        #: Name of the call that finds the flight lost, and all after it.
        self.lost_at: str | None = None
        self._is_lost = False

    def _check(self, call: str) -> None:
        self._is_lost = self._is_lost or call == self.lost_at
        if self._is_lost:
            raise StaleFenceError("blob:x", 1)

    def begin_upload(self, upload: UploadState) -> None:
        self._check("begin_upload")
        self.upload, self.parts = upload, {}

    def record_part(self, number: int, etag: str) -> None:
        self._check("record_part")
        self.parts[number] = etag

    def drop_upload(self) -> None:
        self._check("drop_upload")
        self.upload, self.parts = None, {}
        self.dropped += 1

    def report(self, current_bytes: int, total_bytes: int) -> None:
        self._check("report")
        self.reports.append((current_bytes, total_bytes))


# -- flights ---------------------------------------------------------------------------------------------


class ManualRenewer:
    """Renews only when told to; one a process, over the memory flight store."""

    def __init__(self, flights: MemoryFlightStore) -> None:
        self._flights = flights
        self.owned: dict[Fence, tuple[float, Callable[[], None]]] = {}
        self.waiting: dict[str, tuple[str, float]] = {}
        self.is_dead = False

    def keep(self, fence: Fence, *, ttl_s: float, on_lost: Callable[[], None]) -> None:
        self.owned[fence] = (ttl_s, on_lost)

    def keep_waiting(self, key: str, *, worker: str, ttl_s: float) -> None:
        self.waiting[key] = (worker, ttl_s)

    def drop(self, fence: Fence) -> None:
        self.owned.pop(fence, None)

    def drop_waiting(self, key: str) -> None:
        self.waiting.pop(key, None)

    def renew(self) -> None:
        """Renew all, as the thread would; tell owners what they have lost."""
        if self.is_dead:
            return
        for fence, (ttl_s, on_lost) in list(self.owned.items()):
            if not self._flights.renew(fence, ttl_s):
                on_lost()
        for key, (worker, ttl_s) in list(self.waiting.items()):
            self._flights.renew_waiting(key, worker, ttl_s)

    def lose(self) -> None:
        """Tell every owner of this process that it has lost its flight."""
        for _ttl_s, on_lost in list(self.owned.values()):
            on_lost()

    def close(self) -> None:
        self.owned.clear()
        self.waiting.clear()


class FakeTransfers:
    """Scripted transfers of one process: each arrives, waits for its turn, then ends as planned."""

    def __init__(self, name: str = "w") -> None:
        self.name = name
        self.fetches: list[FakeFetch] = []
        self.arrived = asyncio.Event()
        #: How coming fetches end, in order; None or nothing left: well.
        self.plan: list[BaseException | None] = []
        #: True: fetches wait for ``proceed``.
        self.holds = True
        self.settled: list[bool] = []

    async def fetch(
        self,
        descriptor: Descriptor,
        callers: Callable[[], Sequence[Caller]],
        fence: Fence,
        upload: UploadState | None,
        report: Callable[[int, int], None],
    ) -> Fetched:
        fetch = FakeFetch(descriptor, callers, fence, upload, report)
        fetch.asked = tuple(callers())
        self.fetches.append(fetch)
        outcome = self.plan.pop(0) if self.plan else None
        self.arrived.set()
        try:
            if self.holds:
                await fetch.proceed.wait()
            if outcome is not None:
                raise outcome
        except asyncio.CancelledError:
            fetch.was_cancelled = True
            raise
        finally:
            fetch.is_over = True
        blob = BlobRecord(
            digest=descriptor.digest,
            key=f"blobs/{descriptor.digest}/{self.name}-{len(self.fetches)}",
            size_bytes=descriptor.size_bytes,
            etag="etag",
            fence=fence.number,
            source=fetch.came_from,
        )
        return Fetched(blob=blob, bytes_fetched=descriptor.size_bytes, source=f"registry of {self.name}")

    def settle(self, fetched: Fetched, *, committed: bool) -> None:
        self.settled.append(committed)

    def open(self) -> None:
        """Let all fetches go on, and all that come."""
        self.holds = False
        for fetch in self.fetches:
            fetch.proceed.set()

    async def arrival(self, number: int = 1) -> FakeFetch:
        """Wait for the *number*-th fetch."""
        async with asyncio.timeout(5):
            while len(self.fetches) < number:
                self.arrived.clear()
                await self.arrived.wait()
        return self.fetches[number - 1]


@dataclass(eq=False)
class FakeFetch:
    """One run of a transfer."""

    descriptor: Descriptor
    callers: Callable[[], Sequence[Caller]]
    fence: Fence
    upload: UploadState | None
    report: Callable[[int, int], None]
    asked: tuple[Caller, ...] = ()
    #: Which repository its bytes are said to have come from.
    came_from: str = ""
    proceed: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: bool = False
    is_over: bool = False


def caller_of(
    lease_id: str,
    *,
    name: str = "alice",
    providers: Mapping[Digest, Sequence[ProviderHandle]] | None = None,
    progress: tuple[str, ...] = (),
    own_progress: Mapping[Digest, tuple[str, ...]] | None = None,
    is_live: Callable[[], bool] = lambda: True,
    tenant: str = "",
) -> Caller:
    return Caller(
        authorizer=FakeAuthorizer(name),
        lease_id=LeaseId(lease_id),
        providers=providers or {},
        tenant=tenant,
        progress=progress,
        own_progress=own_progress or {},
        is_live=is_live,
    )


# -- registries ------------------------------------------------------------------------------------------


class FakeProber:
    """Registries as far as HEAD goes: who may see which blob where."""

    def __init__(self) -> None:
        #: (registry/repository, digest) to the names that may read it; None: everybody.
        self.blobs: dict[tuple[str, Digest], set[str] | None] = {}
        #: Sources that don't answer.
        self.silent: set[str] = set()
        self.asked: list[tuple[str, Digest]] = []
        #: Sizes that are told; of all others, 1.
        self.sizes: dict[Digest, int] = {}

    def add(self, provider: ProviderHandle, *digests: Digest, readers: set[str] | None = None) -> None:
        for digest in digests:
            self.blobs[provider.source, digest] = readers

    async def blob_exists(self, handle: ProviderHandle, digest: Digest, authorizer: Authorizer) -> int | None:
        self.asked.append((handle.source, digest))
        if handle.source in self.silent:
            raise UnavailableError(handle.registry, "it is silent")
        if (handle.source, digest) not in self.blobs:
            return None
        readers = self.blobs[handle.source, digest]
        # As a session says who it is: by name, in these tests.
        if readers is not None and authorizer.identity(handle.registry).partition("@")[0] not in readers:
            raise AccessDeniedError(handle.repository, handle.registry, "403")
        return self.sizes.get(digest, 1)


class OpenDoors:
    """Lets everybody have everything."""

    async def admit(self, authorizer, blob, providers, came_from) -> None:
        return None


# -- a node ----------------------------------------------------------------------------------------------


class FakeLocalBlob:
    """A blob on this node: its bytes, and whether they turn out right."""

    def __init__(self, data: bytes, error: ClusterError | None = None) -> None:
        self.data = data
        self.error = error

    def open(self) -> MemoryStream:
        return MemoryStream(self.data)

    async def verified(self) -> None:
        if self.error is not None:
            raise self.error


class FakeLocalBlobs:
    """This node's blobs: what comes for a digest, in order; the last one stays."""

    def __init__(self) -> None:
        self.coming: dict[Digest, list[FakeLocalBlob]] = {}
        self.present: set[Digest] = set()
        self.gets: list[Digest] = []
        self._changed = asyncio.Event()

    def has(self, digest: Digest) -> bool:
        return False

    def put(self, digest: Digest, *blobs: FakeLocalBlob) -> None:
        self.coming[digest] = list(blobs)
        self._wake()

    async def get(self, digest: Digest, tenants: Iterable[str] = ()) -> FakeLocalBlob:
        while digest not in self.present or not self.coming.get(digest):
            await self._changed.wait()
        self.gets.append(digest)
        coming = self.coming[digest]
        return coming.pop(0) if len(coming) > 1 else coming[0]

    def note_present(self, blob: BlobRecord, tenant: str = "") -> None:
        self.present.add(blob.digest)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class FakeSnapshotter:
    """Snapshots as chain IDs; a layer whose bytes start with ``bad`` can't be unpacked."""

    name = "fake"

    def __init__(self) -> None:
        self.published: list[Digest] = []
        self.begun: list[Digest] = []
        #: Chains that wait for their event, in their thread, before they are published.
        self.gates: dict[Digest, threading.Event] = {}
        self.mounted: list[tuple[Digest, str]] = []

    def has(self, chain: Digest) -> bool:
        return chain in self.published

    def use(self, chain: Digest) -> bool:
        return self.has(chain)

    def apply(self, *, chain, parent, layer, stream, await_parent, spend) -> AppliedLayer:
        self.begun.append(chain)
        buffer = memoryview(bytearray(4))
        while not (gate := self.gates.get(chain, _OPEN)).is_set():
            stream.readinto(buffer[:0])
            gate.wait(0.005)
        count = stream.readinto(buffer)
        if bytes(buffer[:count]).startswith(b"bad"):
            raise LayerError(layer.digest, "", "its bytes are bad")
        await_parent()
        assert parent is None or parent in self.published, "published before its parent"
        was_published = chain not in self.published
        if was_published:
            self.published.append(chain)
        return AppliedLayer(
            diff_id=layer.diff_id, tar_bytes=count, content_bytes=count, entries=1, was_published=was_published
        )

    def mount(self, chain: Digest, name: str) -> Path:
        self.mounted.append((chain, name))
        return Path("/mnt") / name


class FakeArriving:
    """What arrives on this node: nothing, until the test says so."""

    def __init__(self) -> None:
        self.coming: dict[Digest, FakeComing] = {}
        self.asked = asyncio.Event()
        self.changed = asyncio.Event()

    async def follow(self, digest: Digest) -> FakeComing:
        self.asked.set()
        while digest not in self.coming:
            await self.changed.wait()
        return self.coming[digest]

    def come(self, digest: Digest, *origins: ProviderHandle) -> FakeComing:
        self.coming[digest] = blob = FakeComing(origins)
        self.changed.set()
        return blob


class FakeComing:
    """A blob that arrives, and what becomes of it."""

    def __init__(self, origins: Sequence[ProviderHandle]) -> None:
        self.origins = frozenset(origins)
        self.verdict: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.opened = 0

    def open(self) -> io.BytesIO:
        self.opened += 1
        return io.BytesIO(b"")

    async def verified(self) -> None:
        await asyncio.shield(self.verdict)


_OPEN = threading.Event()
_OPEN.set()
