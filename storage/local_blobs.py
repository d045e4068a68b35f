"""This node's blobs: in the disk cache, arriving from a registry, or fetched from S3, once for all who ask."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Executor

from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, ClusterError, DigestMismatchError, InternalError, UnavailableError
from cluster.ports import ByteStream, ContentStore, RefStore
from cluster.ref import BlobRecord
from storage.node_cache import NodeCache
from storage.staging import StagingFile

_CHUNK = 1024 * 1024


class ArrivingBlob:
    """A blob that is being written to this node's disk, for its writer's threads and for those who wait for it.

    A staging file whose end the event loop hears of. Made by :meth:`NodeBlobs.begin` only.
    """

    def __init__(self, digest: Digest, staging: StagingFile, loop: asyncio.AbstractEventLoop) -> None:
        self.digest = digest
        self._staging = staging
        self._loop = loop
        self._error: ClusterError | None = None
        self.settled: asyncio.Future[ClusterError | None] = loop.create_future()

    # -- the writer's half, from any thread --------------------------------------------------------------

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*."""
        self._staging.pwrite(offset, data)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with what was written at *offset*."""
        if self._staging.pread(offset, buffer) != len(buffer):
            raise InternalError(f"{self._staging!r} is read at {offset}, where nothing was written")

    def advance(self, frontier: int) -> None:
        """Say that every byte before *frontier* is written."""
        self._staging.advance(frontier)

    def fail(self, error: ClusterError) -> None:
        """Say that the rest won't come."""
        self._error = error
        self._staging.fail(error)

    def publish(self) -> None:
        """Keep it as this node's copy: it is whole and hashes to its digest."""
        self._staging.publish()
        self._settle(None)

    def discard(self) -> None:
        """Drop it; :meth:`fail` said why."""
        self._staging.discard()
        self._settle(self._error or UnavailableError(f"blob {self.digest}", "its fetch was given up"))

    def _settle(self, error: ClusterError | None) -> None:
        self._loop.call_soon_threadsafe(_resolve, self.settled, error)

    # -- the readers' half ---------------------------------------------------------------------------------

    def open(self) -> ByteStream:
        """Read it from the start, as far as it is here, and on as it comes."""
        return self._staging.open_reader()

    async def verified(self) -> None:
        """Return once it is whole and right; raises what went wrong instead."""
        error = await asyncio.shield(self.settled)
        if error is not None:
            raise error


class WholeBlob:
    """A blob in the node's cache: it was verified when it came."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    def open(self) -> ByteStream:
        """Read it; once."""
        return self._stream

    async def verified(self) -> None:
        """Return at once."""


class NodeBlobs:
    """All blobs of one node. Belongs to one event loop; :meth:`begin` may be called from byte threads."""

    def __init__(
        self,
        cache: NodeCache,
        store: ContentStore,
        refs: RefStore,
        *,
        loop: asyncio.AbstractEventLoop,
        threads: Executor,
        downloads: int,
    ) -> None:
        self._cache = cache
        self._store = store
        self._refs = refs
        self._loop = loop
        self._threads = threads
        self._slots = asyncio.Semaphore(downloads)
        self._arriving: dict[Digest, ArrivingBlob] = {}
        self._present: dict[Digest, BlobRecord] = {}
        #: Why the last download failed, until somebody was told.
        self._failed: dict[Digest, ClusterError] = {}
        self._downloads: dict[Digest, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    # -- what the byte path says -----------------------------------------------------------------------

    def begin(self, digest: Digest, size_bytes: int) -> ArrivingBlob:
        """Make room for a fetch that begins; called from its thread.

        Raises:
            UnavailableError: the disk has no room for it.
        """
        arriving = ArrivingBlob(digest, self._cache.staging(digest, size_bytes), self._loop)
        self._loop.call_soon_threadsafe(self._note_arriving, arriving)
        return arriving

    def publish(self, arriving: ArrivingBlob) -> None:
        """Keep the bytes of a fetch as this node's copy: they are verified and committed."""
        arriving.publish()
        self._forget(arriving)

    def note_present(self, blob: BlobRecord) -> None:
        """Say that the blob is in the content store."""
        self._present[blob.digest] = blob
        self._wake()

    # -- what unpacking asks ---------------------------------------------------------------------------

    async def get(self, digest: Digest) -> ArrivingBlob | WholeBlob:
        """Wait until the blob's bytes are here or arriving; bring them from S3 where they are only there.

        Raises:
            UnavailableError: the content store does not answer, or the disk has no room.
        """
        while True:
            if (error := self._failed.pop(digest, None)) is not None:
                raise error
            stream = await self._loop.run_in_executor(self._threads, self._cache.open, digest)
            if stream is not None:
                return WholeBlob(stream)
            arriving = self._arriving.get(digest)
            if arriving is not None and not (arriving.settled.done() and arriving.settled.result() is not None):
                return arriving
            changed = self._changed
            blob = self._present.get(digest)
            if blob is not None and digest not in self._downloads:
                task = asyncio.create_task(self._download(blob))
                self._downloads[digest] = task
                task.add_done_callback(lambda _done: self._downloads.pop(digest, None))
            await changed.wait()

    async def aclose(self) -> None:
        """Stop downloads."""
        for task in list(self._downloads.values()):
            task.cancel()

    # -- S3 to this node ---------------------------------------------------------------------------------

    async def _download(self, blob: BlobRecord) -> None:
        """Bring a blob from S3 to the disk cache; a lost or damaged one turns its refs lazy."""
        async with self._slots:
            try:
                await self._loop.run_in_executor(self._threads, self._copy, blob)
            except (BlobNotFoundError, DigestMismatchError) as exc:
                self._present.pop(blob.digest, None)
                await self._refs.mark_absent(blob, str(exc))
            except ClusterError as exc:
                self._present.pop(blob.digest, None)
                self._failed[blob.digest] = exc
        self._wake()

    def _copy(self, blob: BlobRecord) -> None:
        arriving = self.begin(blob.digest, blob.size_bytes)
        try:
            self._copy_into(arriving, blob)
            arriving.publish()
        except BaseException as exc:
            arriving.fail(exc if isinstance(exc, ClusterError) else UnavailableError(f"blob {blob.digest}", str(exc)))
            arriving.discard()
            raise
        finally:
            self._loop.call_soon_threadsafe(self._forget, arriving)

    def _copy_into(self, arriving: ArrivingBlob, blob: BlobRecord) -> None:
        hasher = hashlib.sha256()
        offset = 0
        buffer = memoryview(bytearray(_CHUNK))
        with self._store.open(blob.key) as stream:
            while count := stream.readinto(buffer):
                arriving.pwrite(offset, buffer[:count])
                hasher.update(buffer[:count])
                offset += count
                arriving.advance(offset)
        actual = Digest("sha256:" + hasher.hexdigest())
        if actual != blob.digest:
            raise DigestMismatchError(blob.digest, actual, "the content store")

    # -- bookkeeping -------------------------------------------------------------------------------------

    def _note_arriving(self, arriving: ArrivingBlob) -> None:
        self._arriving[arriving.digest] = arriving
        self._wake()

    def _forget(self, arriving: ArrivingBlob) -> None:
        if self._arriving.get(arriving.digest) is arriving:
            del self._arriving[arriving.digest]
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _resolve(future: asyncio.Future[ClusterError | None], error: ClusterError | None) -> None:
    if not future.done():
        future.set_result(error)
