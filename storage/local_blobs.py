"""This node's blobs: in the disk cache, arriving from a registry, or fetched from S3, once for all who ask."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor

from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, ClusterError, DigestMismatchError, UnavailableError
from cluster.ports import ByteStream, ContentStore, RefStore
from cluster.ref import BlobRecord
from storage.node_cache import NodeCache, StagingFile

_CHUNK = 1024 * 1024


class ArrivingBlob:
    """A blob that is being written to this node's disk, or was."""

    def __init__(self, digest: Digest, staging: StagingFile, settled: asyncio.Future[ClusterError | None]) -> None:
        self.digest = digest
        self.staging = staging
        self.settled = settled

    def open(self) -> ByteStream:
        """Read it from the start, as far as it is here, and on as it comes."""
        return self.staging.open_reader()

    async def verified(self) -> None:
        """Return once it is whole and right; raises what went wrong instead."""
        error = await asyncio.shield(self.settled)
        if error is not None:
            raise error


class CachedBlob:
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

    def begin(self, digest: Digest, size_bytes: int) -> StagingFile:
        """Make the staging file of a fetch that begins; called from its thread.

        Raises:
            UnavailableError: the disk has no room for it.
        """
        staging = self._cache.staging(digest, size_bytes)
        future: asyncio.Future[ClusterError | None] = self._loop.create_future()
        staging.on_end(lambda error: self._loop.call_soon_threadsafe(_resolve, future, error))
        self._loop.call_soon_threadsafe(self._note_arriving, ArrivingBlob(digest, staging, future))
        return staging

    def publish(self, digest: Digest, staging: StagingFile) -> None:
        """Keep the bytes of a fetch as this node's copy: they are verified and committed."""
        staging.publish()
        self._forget(digest, staging)

    def note_present(self, blob: BlobRecord) -> None:
        """Say that the blob is in the content store."""
        self._present[blob.digest] = blob
        self._wake()

    # -- what unpacking asks ---------------------------------------------------------------------------

    async def get(self, digest: Digest) -> ArrivingBlob | CachedBlob:
        """Wait until the blob's bytes are here or arriving; bring them from S3 where they are only there.

        Raises:
            UnavailableError: the content store does not answer, or the disk has no room.
        """
        while True:
            if (error := self._failed.pop(digest, None)) is not None:
                raise error
            stream = await self._loop.run_in_executor(self._threads, self._cache.open, digest)
            if stream is not None:
                return CachedBlob(stream)
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
        staging = self.begin(blob.digest, blob.size_bytes)
        try:
            hasher = hashlib.sha256()
            offset = 0
            buffer = memoryview(bytearray(_CHUNK))
            with self._store.open(blob.key) as stream:
                while count := stream.readinto(buffer):
                    staging.pwrite(offset, buffer[:count])
                    hasher.update(buffer[:count])
                    offset += count
                    staging.advance(offset)
            actual = Digest("sha256:" + hasher.hexdigest())
            if actual != blob.digest:
                raise DigestMismatchError(blob.digest, actual, "the content store")
            staging.publish()
        except BaseException as exc:
            staging.fail(exc if isinstance(exc, ClusterError) else UnavailableError(f"blob {blob.digest}", str(exc)))
            staging.discard()
            raise
        finally:
            self._loop.call_soon_threadsafe(self._forget, blob.digest, staging)

    # -- bookkeeping -------------------------------------------------------------------------------------

    def _note_arriving(self, arriving: ArrivingBlob) -> None:
        self._arriving[arriving.digest] = arriving
        self._wake()

    def _forget(self, digest: Digest, staging: StagingFile) -> None:
        known = self._arriving.get(digest)
        if known is not None and known.staging is staging:
            del self._arriving[digest]
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _resolve(future: asyncio.Future[ClusterError | None], error: ClusterError | None) -> None:
    if not future.done():
        future.set_result(error)
