"""New layers into the content store: written, compressed, hashed and uploaded at once, then made present.

One thread writes the tar, compresses it and hashes what comes of it; another sends the parts that it fills.
All of these let other threads run. Memory: three parts and nothing else, whatever the layer's size.

A layer's digest is known only when all of it is uploaded, so no flight can hold its upload as it does a
fetched blob's: a process that is killed leaves an unfinished upload, or an object that no blob record names,
under :data:`KEY_PREFIX`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import secrets
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import BinaryIO, Final, NamedTuple, Protocol, assert_never, cast

import zstandard
from isal import isal_zlib

from cluster import tracing
from cluster.descriptor import Compression, Descriptor
from cluster.digest import Digest
from cluster.errors import (
    ClusterError,
    DeadlineExceededError,
    InternalError,
    LayerTooLargeError,
    StaleFenceError,
    UnavailableError,
)
from cluster.faultpoints import FaultPoint, ahit, hit
from cluster.flight.values import Owned, Present
from cluster.lease import blob_resource, object_resource
from cluster.ports import ContentStore, FlightRenewer, FlightStore, ObjectInfo, Part
from cluster.provider import FARM
from cluster.ref import BlobRecord
from storage.transfer import BufferPool, TransferStoppedError

#: Under which keys the objects of new layers lie.
KEY_PREFIX: Final = "blobs/built/"

#: Parts in memory: one being filled, one being sent, one between.
_BUFFERS: Final = 3
#: How much is compressed at once. Always this much, so that the blob depends on the tar and not on how it came.
_BLOCK_BYTES: Final = 1 << 20
#: S3's limit.
_MAX_PARTS: Final = 10_000
#: isal's levels are 0 to 3; zstd's 3 is its default.
_GZIP_LEVEL: Final = 2
_ZSTD_LEVEL: Final = 3
#: zlib's way to ask for a gzip header, which isal gives no time and no name, and a window of 32 KiB.
_GZIP_WINDOW_BITS: Final = 31

_MEDIA_TYPE: Final = {
    Compression.NONE: "application/vnd.oci.image.layer.v1.tar",
    Compression.GZIP: "application/vnd.oci.image.layer.v1.tar+gzip",
    Compression.ZSTD: "application/vnd.oci.image.layer.v1.tar+zstd",
}
_COMMIT_PAUSE_S: Final = 0.1


def new_key() -> str:
    """Return a key for an upload, used by no other."""
    return KEY_PREFIX + secrets.token_hex(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedLayer:
    """A layer that is in S3 whole, though not yet present."""

    #: Digest and size as stored, media type and diff ID.
    descriptor: Descriptor
    key: str
    etag: str

    @property
    def size_bytes(self) -> int:
        """Return its length as stored."""
        return self.descriptor.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """A layer that is present."""

    descriptor: Descriptor
    #: Its record; of another's object where the same bytes were present before.
    blob: BlobRecord


def upload_layer(
    store: ContentStore,
    write_tar: Callable[[BinaryIO], Digest],
    *,
    compression: Compression,
    part_bytes: int,
    key: str,
) -> UploadedLayer:
    """Upload the layer that *write_tar* writes while it is written; see :class:`LayerUpload`."""
    return LayerUpload(store, write_tar, compression=compression, part_bytes=part_bytes, key=key).run()


class LayerUpload:
    """One upload; :meth:`run` blocks its thread, :meth:`stop` ends it from another.

    Args:
        store: Where to.
        write_tar: Writes the uncompressed tar in order and returns the digest of what it wrote, the diff ID.
            Called once, in a thread of its own.
        compression: Of the blob. One tar gives one blob, for one release of the compressor on one kind of
            processor; isal's choices differ with the processor's instructions.
        part_bytes: Length of a part, at least S3's 5 MiB. A blob up to that is sent in one request.
        key: The object's key, used by no other upload.
    """

    def __init__(
        self,
        store: ContentStore,
        write_tar: Callable[[BinaryIO], Digest],
        *,
        compression: Compression,
        part_bytes: int,
        key: str,
    ) -> None:
        self._store = store
        self._write_tar = write_tar
        self._compression = compression
        self._part_bytes = part_bytes
        self._key = key
        self._pool = BufferPool(_BUFFERS, part_bytes)
        self._filled: SimpleQueue[_Filled | None] = SimpleQueue()
        self._stop = threading.Event()
        self._upload_id: str | None = None

    def stop(self) -> None:
        """Make :meth:`run` raise TransferStoppedError soon."""
        self._stop.set()

    def run(self) -> UploadedLayer:
        """Upload the layer. Whatever it raises, upload and object are dropped as far as S3 answers.

        Raises:
            LayerTooLargeError: it is more than S3 takes in parts of that size.
            UnavailableError: S3 doesn't answer, or refuses.
            TransferStoppedError: :meth:`stop` was called.
            ClusterError: whatever *write_tar* raised, unchanged.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="layer-tar") as executor:
            writing = executor.submit(tracing.carried(self._write))
            try:
                info = self._send(writing)
                written = writing.result()
                self._check_size(info, written.size_bytes)
            except BaseException:
                # The writer may be waiting for a buffer that nobody sends any more.
                self._stop.set()
                self._drop()
                raise
        descriptor = Descriptor(
            media_type=_MEDIA_TYPE[self._compression],
            digest=written.digest,
            size_bytes=written.size_bytes,
            diff_id=written.diff_id,
        )
        return UploadedLayer(descriptor=descriptor, key=info.key, etag=info.etag)

    def _write(self) -> _Written:
        try:
            sink = _PartWriter(self._compression, self._pool, self._filled, self._stop)
            diff_id = self._write_tar(cast("BinaryIO", sink))
            return _Written(diff_id, sink.finish(), sink.size_bytes)
        except BaseException:
            self._filled.put(None)
            raise

    def _send(self, writing: Future[_Written]) -> ObjectInfo:
        """Send the parts as they are filled; return the object that they come to."""
        parts: list[Part] = []
        while True:
            filled = self._filled.get()
            if filled is None:
                writing.result()
                raise InternalError("a layer's writer ended without its last part")
            if self._stop.is_set():
                raise TransferStoppedError
            data = memoryview(filled.buffer)[: filled.length]
            if filled.is_last and self._upload_id is None:
                return self._store.put(self._key, data)
            if self._upload_id is None:
                self._upload_id = self._store.begin_upload(self._key)
                hit(FaultPoint.UPLOAD_BEGUN)
            if filled.length:
                if len(parts) == _MAX_PARTS:
                    raise LayerTooLargeError(_MAX_PARTS * self._part_bytes)
                parts.append(self._store.upload_part(self._key, self._upload_id, len(parts) + 1, data))
            self._pool.release(filled.buffer)
            if filled.is_last:
                hit(FaultPoint.UPLOAD_COMPLETE_BEFORE)
                return self._store.complete_upload(self._key, self._upload_id, parts)

    def _check_size(self, info: ObjectInfo, size_bytes: int) -> None:
        if info.size_bytes != size_bytes:
            raise UnavailableError(
                "the content store", f"it kept {info.size_bytes} of {size_bytes} bytes of {info.key}"
            )

    def _drop(self) -> None:
        """Drop upload and object: also one whose making S3 didn't confirm."""
        with contextlib.suppress(ClusterError):
            if self._upload_id is not None:
                self._store.abort_upload(self._key, self._upload_id)
            self._store.delete(self._key)


class _Filled(NamedTuple):
    """A part, filled up to *length*; only the last may be short or empty."""

    buffer: bytearray
    length: int
    is_last: bool


class _Written(NamedTuple):
    """What the writer's thread came to."""

    diff_id: Digest
    digest: Digest
    size_bytes: int


class _Compressor(Protocol):
    def compress(self, data: memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Stored:
    """No compression at all."""

    def compress(self, data: memoryview, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


def _compressor(compression: Compression) -> _Compressor:
    match compression:
        case Compression.NONE:
            return _Stored()
        case Compression.GZIP:
            made = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, _GZIP_WINDOW_BITS)
            return cast("_Compressor", made)
        case Compression.ZSTD:
            return cast("_Compressor", zstandard.ZstdCompressor(_ZSTD_LEVEL, write_checksum=True).compressobj())
        case _:
            assert_never(compression)


class _PartWriter(io.RawIOBase):
    """A file that compresses what is written to it, hashes that, and fills parts with it."""

    def __init__(
        self,
        compression: Compression,
        pool: BufferPool,
        filled: SimpleQueue[_Filled | None],
        stop: threading.Event,
    ) -> None:
        super().__init__()
        self._compressor = _compressor(compression)
        self._pool = pool
        self._filled = filled
        self._stop = stop
        self._hash = hashlib.sha256()
        self._block = memoryview(bytearray(_BLOCK_BYTES))
        self._in_block = 0
        self._part: bytearray | None = None
        self._in_part = 0
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer
        if self._stop.is_set():
            raise TransferStoppedError
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            count = min(len(view) - taken, _BLOCK_BYTES - self._in_block)
            self._block[self._in_block : self._in_block + count] = view[taken : taken + count]
            self._in_block += count
            taken += count
            if self._in_block == _BLOCK_BYTES:
                self._emit(self._compressor.compress(self._block))
                self._in_block = 0
        return taken

    def finish(self) -> Digest:
        """Hand over the last part; return the digest of all of them."""
        self._emit(self._compressor.compress(self._block[: self._in_block]))
        self._emit(self._compressor.flush())
        if self._part is None:
            self._part = self._pool.acquire(0, self._stop)
        self._filled.put(_Filled(self._part, self._in_part, is_last=True))
        return Digest(f"sha256:{self._hash.hexdigest()}")

    def _emit(self, data: bytes) -> None:
        self._hash.update(data)
        self.size_bytes += len(data)
        taken = 0
        while taken < len(data):
            if self._part is None:
                self._part, self._in_part = self._pool.acquire(0, self._stop), 0
            count = min(len(data) - taken, len(self._part) - self._in_part)
            self._part[self._in_part : self._in_part + count] = memoryview(data)[taken : taken + count]
            self._in_part += count
            taken += count
            if self._in_part == len(self._part):
                self._filled.put(_Filled(self._part, self._in_part, is_last=False))
                self._part, self._in_part = None, 0


class LayerStore:
    """Makes new layers present: uploads them, and commits each under the flight of its digest."""

    def __init__(
        self,
        *,
        worker: str,
        store: ContentStore,
        flights: FlightStore,
        renewer: FlightRenewer,
        new_token: Callable[[], str],
        flight_ttl_s: float,
        part_bytes: int,
    ) -> None:
        self._worker = worker
        self._store = store
        self._flights = flights
        self._renewer = renewer
        self._new_token = new_token
        self._flight_ttl_s = flight_ttl_s
        self._part_bytes = part_bytes

    async def put_layer(
        self,
        write_tar: Callable[[BinaryIO], Digest],
        *,
        compression: Compression,
        deadline_s: float,
        hold: Callable[[str], Awaitable[None]],
    ) -> StoredLayer:
        """Upload the layer that *write_tar* writes and commit it; cancelled, it stops the upload and waits for that.

        Args:
            write_tar: See :class:`LayerUpload`.
            compression: Of the blob.
            deadline_s: Seconds that :meth:`commit_layer` may take.
            hold: Called first, with the resource by which a live lease keeps the sweeper from the object: nothing else
                names it until it is committed.

        Raises:
            ClusterError: as :meth:`LayerUpload.run` and :meth:`commit_layer`.
        """
        key = new_key()
        await hold(object_resource(key))
        upload = LayerUpload(self._store, write_tar, compression=compression, part_bytes=self._part_bytes, key=key)
        running = asyncio.ensure_future(asyncio.to_thread(upload.run))
        try:
            uploaded = await asyncio.shield(running)
        except asyncio.CancelledError:
            upload.stop()
            # Until it has stopped it reads what the caller is about to remove.
            await asyncio.wait([running])
            if not running.cancelled() and running.exception() is None:
                await self._delete(running.result().key)
            raise
        blob = await self.commit_layer(uploaded, deadline_s=deadline_s)
        return StoredLayer(descriptor=uploaded.descriptor, blob=blob)

    async def commit_layer(self, uploaded: UploadedLayer, *, deadline_s: float) -> BlobRecord:
        """Make an uploaded layer present and return its record; where the same bytes are present, drop ours.

        The blob is then held by its flight's lease (120 s): whoever needs it for longer attaches it to its own.

        Raises:
            DeadlineExceededError: another process fetches or uploads the same bytes, and hasn't finished in
                *deadline_s* seconds.
            UnavailableError: Redis doesn't answer; the layer may or may not be present.
        """
        digest = uploaded.descriptor.digest
        try:
            async with asyncio.timeout(deadline_s):
                blob = await self._commit(uploaded)
        except TimeoutError as exc:
            raise DeadlineExceededError(f"storing layer {digest}", f"not done after {deadline_s:.0f} s") from exc
        if blob.key != uploaded.key:
            await self._delete(uploaded.key)
        return blob

    async def _commit(self, uploaded: UploadedLayer) -> BlobRecord:
        digest = uploaded.descriptor.digest
        while True:
            try:
                await ahit(FaultPoint.LAYER_UPLOADED)
                outcome = await self._claim(blob_resource(digest))
            except BaseException:
                # No record names it. Once a commit was tried one may, whatever came of it.
                await self._delete(uploaded.key)
                raise
            if isinstance(outcome, Present):
                return outcome.blob
            blob = BlobRecord(
                digest=digest,
                key=uploaded.key,
                size_bytes=uploaded.size_bytes,
                etag=uploaded.etag,
                fence=outcome.fence.number,
                source=FARM.source,
            )
            if await self._commit_owned(outcome, blob):
                return blob

    async def _claim(self, key: str) -> Owned | Present:
        """Wait until the blob is present or this process owns its flight."""
        while True:
            outcome = await self._flights.join(
                key, worker=self._worker, token=self._new_token(), ttl_s=self._flight_ttl_s
            )
            if isinstance(outcome, Owned | Present):
                return outcome
            # Another process is at the same bytes: look again soon.
            try:
                await asyncio.sleep(_COMMIT_PAUSE_S)
            finally:
                with contextlib.suppress(ClusterError):
                    await asyncio.shield(self._flights.leave(key, worker=self._worker))

    async def _commit_owned(self, owned: Owned, blob: BlobRecord) -> bool:
        """Commit *blob* under the fence that is owned; False where it is another's by now."""
        self._renewer.keep(owned.fence, ttl_s=self._flight_ttl_s, on_lost=lambda: None)
        try:
            await ahit(FaultPoint.COMMIT_BEFORE)
            await self._flights.commit(owned.fence, blob)
        except StaleFenceError:
            return False
        except BaseException:
            # Of no effect if the commit was carried out after all.
            with contextlib.suppress(ClusterError):
                await asyncio.shield(self._flights.vacate(owned.fence))
            raise
        finally:
            self._renewer.drop(owned.fence)
        if owned.upload is not None:
            # What an earlier owner left of fetching the same bytes; nobody resumes it any more.
            with contextlib.suppress(ClusterError):
                await asyncio.to_thread(self._store.abort_upload, owned.upload.key, owned.upload.upload_id)
        return True

    async def _delete(self, key: str) -> None:
        """Delete an object that no record names. It is garbage if that fails."""
        with contextlib.suppress(ClusterError):
            await asyncio.shield(asyncio.to_thread(self._store.delete, key))
