"""Binds the byte path to one flight: sources as callers, the store, the journal."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from cluster import tracing
from cluster.audit import handle_of
from cluster.descriptor import Descriptor
from cluster.digest import Digest, digest_of, hex_of
from cluster.errors import (
    AccessDeniedError,
    BlobDamagedError,
    BlobNotFoundError,
    ChallengedError,
    ClusterError,
    DeadlineExceededError,
    NeedsRemoteProvidersError,
    SessionGoneError,
    StaleFenceError,
    UnavailableError,
)
from cluster.fetch.runner import Caller, Fetched
from cluster.flight.values import Fence, UploadState
from cluster.ports import (
    Authorization,
    AuthRequest,
    ByteStream,
    ContentStore,
    FlightStore,
    HostLimiter,
    ObjectInfo,
    ObjectReader,
    Slot,
)
from cluster.provider import S3_KIND, ProviderHandle
from cluster.quota import Budget, Quota, RequestKind
from cluster.ref import BlobRecord
from storage.bucket_caches import BucketCaches
from storage.local_blobs import ArrivingBlob, NodeBlobs
from storage.registry.blob import BlobResponse, BlobSource
from storage.registry.calls import tell
from storage.registry.endpoint import Endpoint
from storage.registry.spans import STATUS, request_span
from storage.transfer import (
    BlobTransfer,
    BufferPool,
    Source,
    SourceResponse,
    TransferLimits,
    Transferred,
    TransferStoppedError,
)

T = TypeVar("T")

#: Seconds that one question of a byte thread to the event loop may take: a token server may be slow.
_ASK_TIMEOUT_S = 90.0
_SLOT_DEADLINE_S = 600.0


def new_key(digest: Digest) -> str:
    """Return an object key that no other upload has: a late writer can then spoil only its own object."""
    return f"blobs/sha256/{hex_of(digest)}/{secrets.token_hex(8)}"


class _Bridge:
    """Lets a byte thread ask the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def ask(self, question: Coroutine[object, object, T], timeout_s: float = _ASK_TIMEOUT_S) -> T:
        future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as exc:
            future.cancel()
            raise DeadlineExceededError("the worker's event loop", f"no answer in {timeout_s:.0f} s") from exc
        except concurrent.futures.CancelledError as exc:
            raise UnavailableError("the worker's event loop", "it is closing") from exc

    def tell(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)


class _RegistrySource:
    """One blob at one endpoint, read as one caller; asks for credentials when the registry does."""

    def __init__(
        self,
        endpoint: Endpoint,
        descriptor: Descriptor,
        caller: Caller,
        *,
        origin: str,
        blobs: BlobSource,
        limiter: HostLimiter,
        bridge: _Bridge,
    ) -> None:
        self.name = endpoint.source
        self.origin = origin
        self.caller = caller
        #: Who the caller is to this registry.
        self.identity = caller.authorizer.identity(endpoint.registry)
        self._endpoint = endpoint
        self._descriptor = descriptor
        self._blobs = blobs
        self._limiter = limiter
        self._bridge = bridge

    @contextlib.contextmanager
    def open(self, offset: int, length: int | None) -> Iterator[SourceResponse]:
        registry = self._endpoint.registry
        budget = Budget(kind=RequestKind.BLOB, account=self.identity)
        holding = self._limiter.slot(registry, deadline_s=_SLOT_DEADLINE_S, budget=budget)
        with tracing.span("wait for a turn", {"lazyfarm.registry": registry}):
            slot = self._bridge.ask(holding.__aenter__(), _SLOT_DEADLINE_S + 10)
        try:
            url = self._endpoint.blob_url(self._descriptor.digest)
            # From the question, through what redirects and challenges it takes, to the last byte.
            with (
                request_span("GET", url, registry=registry) as span,
                self._open_authorized(slot, offset, length) as response,
            ):
                span.put({STATUS: response.status, "lazyfarm.offset": offset})
                try:
                    yield response
                except UnavailableError as exc:
                    self._tell(slot, exc)
                    raise
            self._tell(slot, None, response.quotas)
        finally:
            self._bridge.ask(holding.__aexit__(None, None, None))

    def _open_authorized(self, slot: Slot, offset: int, length: int | None) -> BlobResponse:
        """Open with what is known, and once more with what the challenge asks for, refreshed if it was refused."""
        authorization = self._authorize(challenge=None, was_refused=False)
        for last in (False, False, True):
            try:
                return self._opened(slot, offset, length, authorization)
            except ChallengedError as exc:
                if last:
                    break
                authorization = self._authorize(challenge=exc.challenge, was_refused=authorization is not None)
        raise AccessDeniedError(
            f"{self._endpoint.repository}@{self._descriptor.digest}", self._endpoint.registry, "401 after a refresh"
        )

    def _opened(self, slot: Slot, offset: int, length: int | None, authorization: Authorization | None) -> BlobResponse:
        try:
            response = self._blobs.open(
                self._endpoint,
                self._descriptor.digest,
                offset=offset,
                length=length,
                size_bytes=self._descriptor.size_bytes,
                authorization=authorization.header if authorization else None,
            )
        except ClusterError as exc:
            self._tell(slot, exc)
            raise
        if slot.is_probe:
            # All wait for a probe: not for as long as a layer takes.
            self._tell(slot, None)
        return response

    def _tell(self, slot: Slot, outcome: ClusterError | None, left: Sequence[Quota] = ()) -> None:
        self._bridge.ask(tell(self._limiter, slot, outcome, left))

    def _authorize(self, *, challenge: str | None, was_refused: bool) -> Authorization | None:
        return self._bridge.ask(
            self.caller.authorizer.authorize(
                AuthRequest(
                    registry=self._endpoint.registry,
                    plain_http=self._endpoint.plain_http,
                    scopes=(f"repository:{self._endpoint.repository}:pull",),
                    challenge=challenge,
                    was_refused=was_refused,
                )
            )
        )


class _BucketSource:
    """One blob of a cache in a bucket; the farm's own credentials read it, whoever the caller is."""

    def __init__(self, handle: ProviderHandle, descriptor: Descriptor, buckets: BucketCaches) -> None:
        self.name = self.origin = handle.source
        self._handle = handle
        self._descriptor = descriptor
        self._buckets = buckets

    def open(self, offset: int, length: int | None) -> AbstractContextManager[SourceResponse]:
        return self._buckets.open(self._handle, self._descriptor.digest, offset, length)


class _FlightJournal:
    """:class:`storage.transfer.Journal` over a flight."""

    def __init__(
        self, flights: FlightStore, fence: Fence, bridge: _Bridge, on_report: Callable[[int, int], None]
    ) -> None:
        self._flights = flights
        self._fence = fence
        self._bridge = bridge
        self._on_report = on_report

    def begin_upload(self, upload: UploadState) -> None:
        self._bridge.ask(self._flights.begin_upload(self._fence, upload))

    def record_part(self, number: int, etag: str) -> None:
        self._bridge.ask(self._flights.record_part(self._fence, number, etag))

    def drop_upload(self) -> None:
        self._bridge.ask(self._flights.drop_upload(self._fence))

    def report(self, current_bytes: int, total_bytes: int) -> None:
        self._bridge.tell(lambda: self._on_report(current_bytes, total_bytes))
        try:
            self._bridge.ask(self._flights.report(self._fence, current_bytes, total_bytes))
        except StaleFenceError:
            raise
        except UnavailableError:
            pass  # progress is a courtesy: the renewer decides whether the flight is lost


class ThreadedTransfers:
    """:class:`cluster.fetch.runner.Transfers` over the byte path's threads."""

    def __init__(
        self,
        *,
        store: ContentStore,
        flights: FlightStore,
        sources: BlobSource,
        buckets: BucketCaches,
        limiter: HostLimiter,
        blobs: NodeBlobs,
        threads: concurrent.futures.Executor,
        limits: TransferLimits,
        buffers: int,
    ) -> None:
        self._store = store
        self._flights = flights
        self._sources = sources
        self._buckets = buckets
        self._limiter = limiter
        self._blobs = blobs
        self._threads = threads
        self._limits = limits
        self._pool = BufferPool(buffers, limits.part_bytes)
        self._arrived: dict[str, Transferred[ArrivingBlob]] = {}

    async def fetch(
        self,
        descriptor: Descriptor,
        callers: Callable[[], Sequence[Caller]],
        fence: Fence,
        upload: UploadState | None,
        report: Callable[[int, int], None],
    ) -> Fetched:
        """See :class:`cluster.fetch.runner.Transfers`."""
        loop = asyncio.get_running_loop()
        bridge = _Bridge(loop)
        digest = descriptor.digest
        live = [c for c in callers() if c.is_live()]
        if not live:
            raise SessionGoneError("of every caller")
        sources = [
            source
            for caller in live
            for handle in caller.providers.get(digest, ())
            for source in self._sources_at(handle, descriptor, caller, bridge)
        ]
        if not sources:
            raise NeedsRemoteProvidersError((digest,))
        # What an earlier owner uploaded may be from anywhere.
        origins = frozenset({""} if upload is not None else {source.origin for source in sources})
        transfer = BlobTransfer(
            descriptor,
            sources,
            store=self._store,
            pool=self._pool,
            limits=self._limits,
            journal=_FlightJournal(self._flights, fence, bridge, report),
            new_key=lambda: new_key(digest),
            new_staging=lambda: self._blobs.begin(digest, descriptor.size_bytes, origins),
            resume=upload,
        )
        running = loop.run_in_executor(self._threads, tracing.carried(transfer.run))
        try:
            done = await asyncio.shield(running)
        except asyncio.CancelledError:
            transfer.stop()
            # Its readers notice within a chunk, or the source's stall timeout.
            with contextlib.suppress(ClusterError, TransferStoppedError):
                late = await running
                late.staging.discard()
            raise
        self._arrived[done.object.key] = done
        used = sources[done.source_index]
        return Fetched(
            blob=BlobRecord(
                digest=digest,
                key=done.object.key,
                size_bytes=done.object.size_bytes,
                etag=done.object.etag,
                fence=fence.number,
                source=done.origin,
            ),
            bytes_fetched=done.bytes_fetched,
            source=done.source,
            caller=used.caller if isinstance(used, _RegistrySource) else None,
            credential=handle_of(used.identity) if isinstance(used, _RegistrySource) else "",
        )

    def _sources_at(
        self, handle: ProviderHandle, descriptor: Descriptor, caller: Caller, bridge: _Bridge
    ) -> list[Source]:
        if handle.kind == S3_KIND:
            return [_BucketSource(handle, descriptor, self._buckets)]
        return [
            _RegistrySource(
                endpoint,
                descriptor,
                caller,
                origin=handle.source,
                blobs=self._sources,
                limiter=self._limiter,
                bridge=bridge,
            )
            for endpoint in self._sources.endpoints(handle)
        ]

    def settle(self, fetched: Fetched, *, committed: bool) -> None:
        """Keep the staged bytes as this node's copy, or drop them."""
        done = self._arrived.pop(fetched.blob.key)
        if committed:
            self._blobs.publish(done.staging)
        else:
            done.staging.fail(UnavailableError(f"blob {fetched.blob.digest}", "its flight was lost"))
            done.staging.discard()


class StoredBlobs:
    """Small blobs whole, any blob as a stream, from the content store."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    async def read(self, blob: BlobRecord) -> bytes:
        """Return a small blob's bytes, checked.

        Raises:
            BlobDamagedError: the object is gone, or hashes to another digest.
        """
        return await asyncio.to_thread(self._read, blob)

    def _read(self, blob: BlobRecord) -> bytes:
        data = bytearray(blob.size_bytes)
        view = memoryview(data)
        filled = 0
        try:
            with self._store.open(blob.key) as stream:
                while filled < len(data) and (count := stream.readinto(view[filled:])):
                    filled += count
        except BlobNotFoundError as exc:
            raise BlobDamagedError(blob.digest, f"object {blob.key} is gone") from exc
        if digest_of(view[:filled]) != blob.digest:
            raise BlobDamagedError(blob.digest, f"object {blob.key} has other bytes")
        return bytes(view[:filled])

    async def write(self, digest: Digest, data: bytes) -> ObjectInfo:
        """Write a small blob under a key of its own."""
        return await asyncio.to_thread(self._store.put, new_key(digest), data)

    def stream(self, blob: BlobRecord) -> AbstractContextManager[ByteStream]:
        """Open a blob for reading; see :func:`checked`."""
        return checked(self._store, blob)


@contextlib.contextmanager
def checked(objects: ObjectReader, blob: BlobRecord) -> Iterator[ByteStream]:
    """Open a blob for reading; its last bytes are given only once all of them hash to its digest.

    Raises:
        BlobNotFoundError: the object is gone. From the stream, BlobDamagedError: it has other bytes.
    """
    with objects.open(blob.key) as stream:
        yield _CheckedStream(stream, blob)


class _CheckedStream:
    """A stream that withholds the end of a blob that is damaged: whoever counts bytes can't take it for whole."""

    def __init__(self, stream: ByteStream, blob: BlobRecord) -> None:
        self._stream = stream
        self._blob = blob
        self._hash = hashlib.sha256()
        self._read_bytes = 0

    def readinto(self, buffer: memoryview) -> int:
        count = self._stream.readinto(buffer)
        self._hash.update(buffer[:count])
        self._read_bytes += count
        is_end = not count or self._read_bytes >= self._blob.size_bytes
        if is_end and self._hash.hexdigest() != hex_of(self._blob.digest):
            raise BlobDamagedError(self._blob.digest, f"object {self._blob.key} has other bytes")
        return count
