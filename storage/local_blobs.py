"""This node's blobs: in the disk cache, arriving from a registry, or fetched from S3, once for all who ask."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from cluster import tracing
from cluster.audit import AuditEntry, NoAudit, Operation
from cluster.digest import Digest
from cluster.disk_room import BoundlessDisk, NodeDisk, Part
from cluster.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    InternalError,
    UnavailableError,
)
from cluster.fair.runner import FairSlots
from cluster.fetch.together import Together
from cluster.metrics import READ_BYTES
from cluster.ports import AuditNotes, ByteStream, ContentStore, RefStore
from cluster.ref import BlobRecord
from storage.node_cache import CachedBlob, NodeCache
from storage.staging import StagingFile

_CHUNK = 1024 * 1024


class ArrivingBlob:
    """A blob that is being written to this node's disk, for its writer's threads and for those who wait for it.

    A staging file whose end the event loop hears of. Made by :meth:`NodeBlobs.begin` only.
    """

    def __init__(
        self, digest: Digest, staging: StagingFile, loop: asyncio.AbstractEventLoop, origins: frozenset[str]
    ) -> None:
        self.digest = digest
        self._origins = origins
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

    def try_follow(self) -> FollowedBlob | None:
        """Open it for one reader; None where it has ended meanwhile, well or not."""
        try:
            return FollowedBlob(self._staging.open_reader(), self.settled, self._origins)
        except UnavailableError:
            return None


class FollowedBlob:
    """A blob that arrives, opened for one reader: from the start, as far as it is here, and on as it comes."""

    def __init__(
        self, stream: ByteStream, settled: asyncio.Future[ClusterError | None], origins: frozenset[str]
    ) -> None:
        self._stream = stream
        self._settled = settled
        #: ``registry/repository`` of each place that some of its bytes may be from; "" where that isn't known.
        self.origins = origins

    def open(self) -> ByteStream:
        """Read it; once."""
        return self._stream

    async def verified(self) -> None:
        """Return once it is whole and right; raises what went wrong instead."""
        error = await asyncio.shield(self._settled)
        if error is not None:
            raise error


class WholeBlob:
    """A blob in the node's cache. It was right when it came; a disk may have spoilt it since."""

    def __init__(self, digest: Digest, stream: CachedBlob, cache: NodeCache, threads: Executor) -> None:
        self._digest = digest
        self._stream = stream
        self._cache = cache
        self._threads = threads

    def open(self) -> ByteStream:
        """Read it; once."""
        return self._stream

    async def verified(self) -> None:
        """Return if the file that was read is right; a damaged one is removed.

        Raises:
            BlobDamagedError: it is damaged, or is not there any more; :meth:`NodeBlobs.get` brings another.
        """
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._threads, self._cache.verify, self._digest, self._stream.identity):
            raise BlobDamagedError(self._digest, "this node's copy had other bytes and was dropped")


@dataclass(slots=True)
class _Wanted:
    """What those who wait for one blob are told; gone with the last of them."""

    #: Resolved, and replaced, when they should look again.
    changed: asyncio.Future[None]
    waiting: int = 0
    #: Set once the blob is known to be in the content store.
    present: BlobRecord | None = None
    #: On whose behalf it is waited for, as far as that was said (a dict as an ordered set).
    tenants: dict[str, None] = field(default_factory=dict)


class NodeBlobs:
    """All blobs of one node. Belongs to one event loop; :meth:`begin` may be called from byte threads.

    What is on the disk or in the content store is remembered by them, not here: only what is under way is,
    and what somebody waits for.
    """

    def __init__(
        self,
        cache: NodeCache,
        store: ContentStore,
        refs: RefStore,
        *,
        loop: asyncio.AbstractEventLoop,
        threads: Executor,
        downloads: int,
        disk: NodeDisk | None = None,
        audit: AuditNotes | None = None,
    ) -> None:
        self._cache = cache
        self._store = store
        self._refs = refs
        self._looks: Together[None, Digest, BlobRecord | None] = Together(lambda _all, digests: refs.blobs(digests))
        self._loop = loop
        self._threads = threads
        self._disk = disk or BoundlessDisk()
        self._audit = audit or NoAudit()
        self._slots = FairSlots(downloads)
        self._arriving: dict[Digest, ArrivingBlob] = {}
        self._wanted: dict[Digest, _Wanted] = {}
        self._downloads: dict[Digest, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return (
            f"<NodeBlobs {len(self._arriving)} arriving, {len(self._downloads)} downloads, {len(self._wanted)} wanted>"
        )

    # -- what the byte path says -----------------------------------------------------------------------

    def begin(self, digest: Digest, size_bytes: int, origins: frozenset[str] = frozenset({""})) -> ArrivingBlob:
        """Make room for a fetch that begins; called from its thread.

        Args:
            digest: Of which blob.
            size_bytes: How much room.
            origins: See :class:`FollowedBlob`.

        Raises:
            UnavailableError: the disk has no room for it.
        """
        with self._disk.allocating(f"fetching {digest}", Part.of_blob(digest, size_bytes)):
            staging = self._cache.staging(digest, size_bytes)
        arriving = ArrivingBlob(digest, staging, self._loop, origins)
        self._loop.call_soon_threadsafe(self._note_arriving, arriving)
        return arriving

    def publish(self, arriving: ArrivingBlob) -> None:
        """Keep the bytes of a fetch as this node's copy: they are verified and committed."""
        arriving.publish()

    def note_present(self, blob: BlobRecord, tenant: str = "") -> None:
        """Say that the blob is in the content store to those who wait for it; who comes later asks for himself.

        *tenant*'s turn for a download will do for it, too.
        """
        wanted = self._wanted.get(blob.digest)
        if wanted is not None:
            wanted.present = blob
            wanted.tenants[tenant] = None
            self._slots.also_for(blob.digest, tenant)
            self._wake(blob.digest)

    # -- what unpacking asks ---------------------------------------------------------------------------

    def has(self, digest: Digest) -> bool:
        """Tell whether the whole blob is on the disk."""
        return self._cache.has(digest)

    async def get(self, digest: Digest, tenants: Iterable[str] = ()) -> FollowedBlob | WholeBlob:
        """Wait until the blob's bytes are here or arriving; bring them from S3 where they are only there.

        Args:
            digest: Which blob.
            tenants: Whose turn for a download it may take; :meth:`note_present` adds to them.

        Raises:
            UnavailableError: the content store or the ref store does not answer, or the disk has no room.
                Told to those who wait when it happens; who comes later tries anew.
        """
        with self._waiting(digest) as wanted:
            wanted.tenants.update(dict.fromkeys(tenants))
            return await self._get(digest, wanted)

    async def follow(self, digest: Digest) -> FollowedBlob:
        """Wait until the blob's bytes arrive here, whoever has them brought. Brings none itself.

        Waits for ever where nobody does: the caller knows when that is in vain, and cancels.
        """
        with self._waiting(digest) as wanted:
            while True:
                changed = wanted.changed  # read first: what changes from here on is not missed
                arriving = self._arriving.get(digest)
                followed = None if arriving is None else arriving.try_follow()
                if followed is not None:
                    return followed
                await asyncio.wait({changed})

    @contextlib.contextmanager
    def _waiting(self, digest: Digest) -> Iterator[_Wanted]:
        """Be told, while the body runs, when something changes."""
        wanted = self._wanted.setdefault(digest, _Wanted(self._loop.create_future()))
        wanted.waiting += 1
        try:
            yield wanted
        finally:
            wanted.waiting -= 1
            if not wanted.waiting:
                del self._wanted[digest]

    async def _get(self, digest: Digest, wanted: _Wanted) -> FollowedBlob | WholeBlob:
        while True:
            changed = wanted.changed  # read first: what changes from here on is not missed
            stream = await self._loop.run_in_executor(self._threads, self._cache.open, digest)
            if stream is not None:
                return WholeBlob(digest, stream, self._cache, self._threads)
            arriving = self._arriving.get(digest)
            if arriving is not None:
                followed = arriving.try_follow()
                if followed is not None:
                    return followed
                await asyncio.wait({changed})  # it has ended, and is about to be forgotten
                continue
            if wanted.present is None:
                present = await self._looks.ask(None, digest)
                wanted.present = wanted.present or present
            if changed.done():
                # t=0  another's download runs; this call finds no file yet
                # t=1  the download publishes its file and ends; its callback, which forgets it, is to come
                # t=2  a second one would be begun here, and replace the file under those who read it
                continue
            download = self._download_of(digest, wanted)
            if download is None:
                await asyncio.wait({changed})
                continue
            await asyncio.wait({download, changed}, return_when=asyncio.FIRST_COMPLETED)
            if download.done() and not download.cancelled() and (error := download.exception()) is not None:
                raise copy.copy(error) from error  # a copy: each caller raises one with a traceback of its own

    def _download_of(self, digest: Digest, wanted: _Wanted) -> asyncio.Task[None] | None:
        """Return the download under way, or begin one; None where there is nothing to download."""
        download = self._downloads.get(digest)
        if download is not None and not download.done():
            return download
        if wanted.present is None:
            return None
        download = self._downloads[digest] = asyncio.create_task(self._download(wanted.present, wanted.tenants))
        download.add_done_callback(lambda done: self._end_download(digest, done))
        return download

    # -- S3 to this node ---------------------------------------------------------------------------------

    async def _download(self, blob: BlobRecord, tenants: Iterable[str]) -> None:
        """Bring a blob from S3 to the disk cache; a lost or damaged one turns its refs lazy.

        Raises:
            ClusterError: it could not be tried, or not be told that the blob is lost.
        """
        try:
            async with self._slots.slot(blob.digest, tenants):
                began_s = time.monotonic()
                await self._loop.run_in_executor(self._threads, tracing.carried(self._copy), blob)
            entry = AuditEntry(
                operation=Operation.DOWNLOAD, who=next(iter(tenants), ""), digest=blob.digest, source="s3"
            )
            size = blob.size_bytes
            self._audit.note(
                replace(entry, size_bytes=size, moved_bytes=size, seconds=time.monotonic() - began_s, fence=blob.fence)
            )
        except (BlobNotFoundError, DigestMismatchError) as exc:
            # Who waits goes on waiting: whoever wants the blob drives a fetch from where it came from.
            await self._refs.mark_absent(blob, str(exc))
        except ClusterError:
            raise
        except Exception as exc:
            raise InternalError(f"download of {blob.digest}: {type(exc).__name__}: {exc}") from exc

    def _end_download(self, digest: Digest, download: asyncio.Task[None]) -> None:
        """Forget a download and what it was begun for; who waits looks again."""
        if not download.cancelled():
            download.exception()  # retrieved: perhaps nobody waits any more
        if self._downloads.get(digest) is not download:
            return  # another has begun already
        del self._downloads[digest]
        if (wanted := self._wanted.get(digest)) is not None:
            wanted.present = None
            self._wake(digest)

    def _copy(self, blob: BlobRecord) -> None:
        arriving = self.begin(blob.digest, blob.size_bytes, frozenset({blob.source}))
        try:
            self._copy_into(arriving, blob)
            arriving.publish()
        except BaseException as exc:
            arriving.fail(exc if isinstance(exc, ClusterError) else UnavailableError(f"blob {blob.digest}", str(exc)))
            arriving.discard()
            raise

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
        READ_BYTES.add(offset, source="s3")
        actual = Digest("sha256:" + hasher.hexdigest())
        if actual != blob.digest:
            raise DigestMismatchError(blob.digest, actual, "the content store")

    # -- bookkeeping -------------------------------------------------------------------------------------

    def _note_arriving(self, arriving: ArrivingBlob) -> None:
        self._arriving[arriving.digest] = arriving
        arriving.settled.add_done_callback(lambda _settled: self._forget(arriving))
        self._wake(arriving.digest)

    def _forget(self, arriving: ArrivingBlob) -> None:
        if self._arriving.get(arriving.digest) is arriving:
            del self._arriving[arriving.digest]
        self._wake(arriving.digest)

    def _wake(self, digest: Digest) -> None:
        wanted = self._wanted.get(digest)
        if wanted is not None:
            changed, wanted.changed = wanted.changed, self._loop.create_future()
            changed.set_result(None)


def _resolve(future: asyncio.Future[ClusterError | None], error: ClusterError | None) -> None:
    if not future.done():
        future.set_result(error)
