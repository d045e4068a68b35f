"""The byte path: one blob from a registry into S3 and onto this node's disk, hashed as it streams.

Threads with preallocated buffers, because one event loop caps a process at a third of what four
threads reach here. A reader fills a part's buffer from a socket; every chunk is written to the staging
file and, where it is the next in order, hashed from the buffer; a full part goes to S3 from the same
buffer, while other readers fill theirs. Bytes that arrive out of order are hashed later from the staging
file, which the page cache still holds.

Memory: the pool's buffers and nothing else, whatever the blob's size.
"""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, NoReturn, Protocol, TypeVar, assert_never

from cluster import tracing
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    InternalError,
    RangeRefusedError,
    SizeMismatchError,
    StaleFenceError,
    UnavailableError,
)
from cluster.faultpoints import FaultPoint, hit
from cluster.fetch.plan import (
    GiveUp,
    NextSource,
    PartRange,
    Run,
    SourceState,
    StartOver,
    TryAgain,
    missing_parts,
    part_size,
    parts_of,
    runs_of,
)
from cluster.flight.values import UploadState
from cluster.ports import ContentStore, ObjectInfo, Part

_CHUNK = 1024 * 1024
_HTTP_OK = 200
_REPORT_EVERY_S = 0.2
#: Seconds between looks at whether a transfer that waits for memory was told to stop.
_LOOK_EVERY_S = 0.2


class SourceResponse(Protocol):
    """An open answer of a source: the bytes from the asked offset on, or (``status`` 200) from the start."""

    status: int
    #: Size of the whole blob as the source says; None where it doesn't.
    total_bytes: int | None

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        ...


class Source(Protocol):
    """One place to read one blob from, as one caller."""

    #: ``registry/repository`` for messages.
    name: str
    #: ``registry/repository`` that it stands for, be it a mirror.
    origin: str

    def open(self, offset: int, length: int | None) -> AbstractContextManager[SourceResponse]:
        """Ask for the bytes from *offset* on (*length* None: to the end)."""
        ...


class StagingFile(Protocol):
    """Where the blob's bytes are kept on this node while they arrive."""

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*."""
        ...

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with what was written at *offset*."""
        ...

    def advance(self, frontier: int) -> None:
        """Say that every byte before *frontier* is written: who unpacks may go on."""
        ...

    def fail(self, error: ClusterError) -> None:
        """Say that the rest won't come."""
        ...

    def discard(self) -> None:
        """Drop it."""
        ...


StagingT = TypeVar("StagingT", bound=StagingFile)


class Journal(Protocol):
    """What the flight must know of a transfer; each call fails with StaleFenceError once the flight is lost."""

    def begin_upload(self, upload: UploadState) -> None:
        """Record the upload that was begun."""
        ...

    def record_part(self, number: int, etag: str) -> None:
        """Record a part that S3 has."""
        ...

    def drop_upload(self) -> None:
        """Forget the recorded upload."""
        ...

    def report(self, current_bytes: int, total_bytes: int) -> None:
        """Tell how far the transfer is."""
        ...


class TransferStoppedError(Exception):
    """The transfer was told to stop. Never leaves the process."""


class BufferPool:
    """Buffers of all transfers of a process, *count* times *buffer_bytes* of them at most.

    Nobody holds one buffer while waiting for a second, so the pool can't deadlock. One that is larger than
    the whole pool is given out when nothing else is.
    """

    def __init__(self, count: int, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._budget_bytes = count * buffer_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()
        #: Part-sized ones, kept for the next.
        self._free: list[bytearray] = []

    def acquire(self, needed_bytes: int, stop: threading.Event) -> bytearray:
        """Take a buffer of at least *needed_bytes*, once there is room for it."""
        size = max(self.buffer_bytes, needed_bytes)
        with self._changed:
            while self._used_bytes and self._used_bytes + size > self._budget_bytes:
                self._changed.wait(_LOOK_EVERY_S)
                if stop.is_set():
                    raise TransferStoppedError
            self._used_bytes += size
            if size == self.buffer_bytes and self._free:
                return self._free.pop()
        return bytearray(size)

    @property
    def used_bytes(self) -> int:
        """Return how much is given out."""
        return self._used_bytes

    def release(self, buffer: bytearray) -> None:
        """Give a buffer back."""
        with self._changed:
            self._used_bytes -= len(buffer)
            if len(buffer) == self.buffer_bytes:
                self._free.append(buffer)
            self._changed.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred(Generic[StagingT]):
    """A blob that is in S3 whole and hashes to its digest, though not yet committed."""

    object: ObjectInfo
    #: Bytes read from registries by this transfer.
    bytes_fetched: int
    #: Source that was read from last, and its place among those that the transfer was given.
    source: str
    source_index: int
    #: :attr:`Source.origin` of every byte; empty where they are of several, or were fetched by an earlier owner.
    origin: str
    staging: StagingT


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """How a transfer may use the machine and its sources."""

    part_bytes: int
    parallel_from_bytes: int
    ranges: int
    attempts: int
    retry_budget_s: float
    #: Blobs up to this size are one part, whatever *part_bytes* says.
    whole_up_to_bytes: int = 0


class _OrderedHash:
    """Hashes chunks in order, whatever order they arrive in; tells the staging file how far it is."""

    def __init__(self, staging: StagingFile) -> None:
        self._staging = staging
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._busy = False
        self._pending: dict[int, int] = {}
        self.frontier = 0

    def wrote(self, offset: int, chunk: memoryview) -> None:
        """Note that *chunk* is in the staging file at *offset*."""
        with self._lock:
            if self._busy or offset != self.frontier:
                self._pending[offset] = len(chunk)
                return
            self._busy = True
        self._hash.update(chunk)
        self._advance(len(chunk))
        self._catch_up()

    def _advance(self, count: int) -> None:
        self.frontier += count
        self._staging.advance(self.frontier)

    def _catch_up(self) -> None:
        buffer: memoryview | None = None
        while True:
            with self._lock:
                length = self._pending.pop(self.frontier, None)
                if length is None:
                    self._busy = False
                    return
            if buffer is None or len(buffer) < length:
                buffer = memoryview(bytearray(length))
            view = buffer[:length]
            self._staging.pread_into(self.frontier, view)
            self._hash.update(view)
            self._advance(length)

    def digest(self) -> Digest:
        return Digest("sha256:" + self._hash.hexdigest())


class _StartOverError(Exception):
    """Everything fetched so far is to be dropped and fetched anew. Never leaves this module."""


class _UploadGoneError(_StartOverError):
    """The content store lost the upload, which is no fault of any source. Never leaves this module."""

    def __init__(self, upload: UploadState) -> None:
        super().__init__(f"upload {upload.key} is gone from the content store")


class _StoreFailedError(Exception):
    """A part could not be stored or recorded, which is no fault of its source. Never leaves this module."""

    def __init__(self, error: ClusterError) -> None:
        super().__init__(error)
        self.error = error


def _run_all(count: int, work: Callable[[], None]) -> None:
    """Run *work* in *count* threads until all have ended; raise the first error."""
    with ThreadPoolExecutor(max(1, count), thread_name_prefix="range") as pool:
        running = [pool.submit(tracing.carried(work)) for _ in range(count)]
    for future in running:
        try:
            future.result()
        except _StoreFailedError as exc:
            raise exc.error from exc


class _Cursor:
    """Where one reader stands: the parts it still has to read, and how far the first of them is filled."""

    def __init__(self, parts: Sequence[PartRange]) -> None:
        self.parts = list(parts)
        self.buffer: bytearray | None = None
        self.filled = 0

    @property
    def offset(self) -> int:
        return self.parts[0].offset + self.filled

    @property
    def length(self) -> int:
        return self.parts[-1].end - self.offset

    def next_part(self) -> tuple[PartRange, bytearray]:
        """Hand over the part that is full, and go to the next."""
        if self.buffer is None:
            raise InternalError("a part was taken before it was read")
        part, buffer = self.parts.pop(0), self.buffer
        self.buffer, self.filled = None, 0
        return part, buffer


@dataclass(frozen=True, kw_only=True)
class _Sink:
    """Where a reader puts what it reads."""

    staging: StagingFile
    #: None where the object will be read back: then nothing is staged either.
    hasher: _OrderedHash | None
    #: Owns each full buffer.
    on_part: Callable[[PartRange, bytearray], None]
    #: True once another reader or uploader has failed, so that more bytes are of no use.
    is_abandoned: Callable[[], bool] = lambda: False


class BlobTransfer(Generic[StagingT]):
    """One fetch of one blob; :meth:`run` blocks its thread, :meth:`stop` ends it from another."""

    def __init__(
        self,
        descriptor: Descriptor,
        sources: Sequence[Source],
        *,
        store: ContentStore,
        pool: BufferPool,
        limits: TransferLimits,
        journal: Journal,
        new_key: Callable[[], str],
        new_staging: Callable[[], StagingT],
        resume: UploadState | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._sources = sources
        self._store = store
        self._pool = pool
        self._limits = limits
        self._journal = journal
        self._new_key = new_key
        self._new_staging = new_staging
        self._resume = resume
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._state = SourceState(len(sources), attempts=limits.attempts, budget_s=limits.retry_budget_s)
        self._rng = random.Random()  # noqa: S311  # jitter, not a secret
        self._fetched_bytes = 0
        self._arrived_bytes = 0
        self._reported_s = 0.0
        #: True once a source refused ranges: then the blob is read in one piece, from its start.
        self._in_one_piece = False
        #: The upload of this attempt: known to the journal, of no use to anybody if the attempt starts over.
        self._upload: UploadState | None = None
        #: Why sources were left, by name.
        self._given_up: dict[str, ClusterError] = {}
        #: How often the content store lost the upload.
        self._uploads_gone = 0
        #: Indexes of the sources that this attempt's bytes came from.
        self._contributors: set[int] = set()

    def stop(self) -> None:
        """Make :meth:`run` raise TransferStoppedError soon."""
        self._stop.set()

    def run(self) -> Transferred[StagingT]:
        """Fetch, hash and store the blob.

        Raises:
            ClusterError: no source has it right, S3 refuses or loses upload after upload, or the flight is
                lost (StaleFenceError); an upload that was begun is left for a successor.
            TransferStoppedError: :meth:`stop` was called; likewise.
        """
        resume = self._resume
        while True:
            staging = self._new_staging()
            try:
                return self._attempt(staging, resume)
            except BaseException as exc:
                # Whoever unpacks while the bytes arrive must not wait for more of them.
                staging.fail(
                    exc
                    if isinstance(exc, ClusterError)
                    else UnavailableError(f"blob {self._descriptor.digest}", str(exc) or "its fetch was stopped")
                )
                staging.discard()
                if not isinstance(exc, _StartOverError):
                    raise
                self._undo_upload()
                if isinstance(exc, _UploadGoneError) and resume is None:  # one to resume cost this transfer nothing
                    self._charge_start_over(exc)
                resume = None

    def _charge_start_over(self, gone: _UploadGoneError) -> None:
        """Count a start-over that no source is to blame for; give up where the store goes on losing uploads.

        Unlike what a source is blamed for, nothing else bounds it: each one fetches everything again.
        """
        self._uploads_gone += 1
        if self._uploads_gone >= self._limits.attempts:
            raise UnavailableError(
                "the content store", f"{gone}, after {self._uploads_gone} of {self._limits.attempts} attempts"
            ) from gone

    # -- one attempt -----------------------------------------------------------------------------

    def _attempt(self, staging: StagingT, resume: UploadState | None) -> Transferred[StagingT]:
        size = self._descriptor.size_bytes
        self._contributors.clear()
        part_bytes = resume.part_bytes if resume else part_size(size, self._limits.part_bytes)
        if size <= max(part_bytes, self._limits.whole_up_to_bytes) and resume is None:
            return self._attempt_whole(staging)
        parts = parts_of(size, part_bytes)
        if resume is None:
            upload, stored = self._begin_upload(part_bytes), {}
        else:
            upload = self._upload = resume
            try:
                stored = {p.number: p for p in self._store.list_parts(upload.key, upload.upload_id)}
            except BlobNotFoundError:
                return self._take_over_object(upload, staging)
        todo = missing_parts(parts, {p.number: p.size_bytes for p in stored.values()})
        self._arrived_bytes = size - sum(p.length_bytes for p in todo)
        # What an earlier owner uploaded was hashed by nobody who lives: then the object is read back.
        hasher = _OrderedHash(staging) if len(todo) == len(parts) else None
        self._transfer_parts(todo, upload, stored, staging, hasher)
        hit(FaultPoint.UPLOAD_COMPLETE_BEFORE)
        try:
            info = self._store.complete_upload(upload.key, upload.upload_id, [stored[p.number] for p in parts])
        except BlobNotFoundError as exc:
            raise _UploadGoneError(upload) from exc
        hit(FaultPoint.UPLOAD_COMPLETE_AFTER)
        if hasher is None:
            self._read_back(staging, info)
        elif hasher.digest() != self._descriptor.digest:
            self._undo_upload()
            self._blame_source(hasher.digest())
        return self._transferred(info, staging, is_all_ours=hasher is not None)

    def _take_over_object(self, upload: UploadState, staging: StagingT) -> Transferred[StagingT]:
        """Use the object that an earlier owner completed before it died: all its bytes are in S3 already."""
        info = self._store.head(upload.key)
        if info is None or info.size_bytes != self._descriptor.size_bytes:
            raise _UploadGoneError(upload)
        self._arrived_bytes = info.size_bytes
        self._read_back(staging, info)
        return self._transferred(info, staging, is_all_ours=False)

    def _attempt_whole(self, staging: StagingT) -> Transferred[StagingT]:
        """Fetch a blob that is one part: one GET, one PUT."""
        size = self._descriptor.size_bytes
        hasher = _OrderedHash(staging)
        self._arrived_bytes = 0
        buffers: list[bytearray] = []
        try:
            if size:
                cursor = _Cursor([PartRange(number=1, offset=0, length_bytes=size)])
                sink = _Sink(staging=staging, hasher=hasher, on_part=lambda _part, buffer: buffers.append(buffer))
                self._read(cursor, sink)
            if hasher.digest() != self._descriptor.digest:
                self._blame_source(hasher.digest())
            key = self._new_key()
            hit(FaultPoint.UPLOAD_COMPLETE_BEFORE)
            info = self._store.put(key, memoryview(buffers[0])[:size] if buffers else b"")
            hit(FaultPoint.UPLOAD_COMPLETE_AFTER)
        finally:
            for buffer in buffers:
                self._pool.release(buffer)
        return self._transferred(info, staging, is_all_ours=True)

    def _transferred(self, info: ObjectInfo, staging: StagingT, *, is_all_ours: bool) -> Transferred[StagingT]:
        size = self._descriptor.size_bytes
        if info.size_bytes != size:
            raise UnavailableError("the content store", f"it kept {info.size_bytes} of {size} bytes of {info.key}")
        self._journal.report(size, size)
        origins = {self._sources[index].origin for index in self._contributors}
        return Transferred(
            object=info,
            bytes_fetched=self._fetched_bytes,
            source=self._sources[self._state.index].name,
            source_index=self._state.index,
            origin=origins.pop() if is_all_ours and len(origins) == 1 else "",
            staging=staging,
        )

    def _begin_upload(self, part_bytes: int) -> UploadState:
        key = self._new_key()
        upload = UploadState(key=key, upload_id=self._store.begin_upload(key), part_bytes=part_bytes)
        hit(FaultPoint.UPLOAD_BEGUN)
        self._upload = upload
        self._journal.begin_upload(upload)
        hit(FaultPoint.UPLOAD_RECORDED)
        return upload

    def _undo_upload(self) -> None:
        """Forget this attempt's upload, then drop what it left in S3.

        In this order: once it is forgotten under a valid fence no successor can resume it, and whoever
        resumed it before has made the fence stale, so nothing that may become present is deleted.
        """
        upload, self._upload = self._upload, None
        if upload is None:
            return
        self._journal.drop_upload()
        with suppress(ClusterError):
            self._store.abort_upload(upload.key, upload.upload_id)
            self._store.delete(upload.key)

    def _blame_source(self, actual: Digest) -> NoReturn:
        """Start over with the next source, or fail where there is none, for wrong bytes.

        Where several sources gave bytes it can't be said whose are wrong: the one that is read from now
        gets to give all of them.
        """
        with self._lock:
            index = self._state.index
            if self._contributors - {index}:
                raise _StartOverError(f"bytes of several sources came to {actual}")
            error = DigestMismatchError(self._descriptor.digest, actual, self._sources[index].name)
            decision = self._state.failed(error, draw=0.0)
        if isinstance(decision, GiveUp):
            raise decision.error
        raise _StartOverError(str(error))

    def _read_back(self, staging: StagingFile, info: ObjectInfo) -> None:
        """Hash what S3 has, the only way to know what a resumed upload came to; start over where it is wrong."""
        hit(FaultPoint.READBACK_BEFORE)
        hasher = _OrderedHash(staging)
        buffer = memoryview(bytearray(_CHUNK))
        with self._store.open(info.key) as stream:
            while count := stream.readinto(buffer):
                self._raise_if_stopped()
                staging.pwrite(hasher.frontier, buffer[:count])
                hasher.wrote(hasher.frontier, buffer[:count])
        if hasher.digest() != self._descriptor.digest:
            raise _StartOverError("a resumed upload came to other bytes")

    # -- parts -----------------------------------------------------------------------------------

    def _transfer_parts(
        self,
        todo: Sequence[PartRange],
        upload: UploadState,
        stored: dict[int, Part],
        staging: StagingFile,
        hasher: _OrderedHash | None,
    ) -> None:
        """Read the parts of *todo* and upload each; *stored* gains them.

        Whoever reads a part uploads it before reading on, so an owner that dies costs one part for each
        range that was open, and no more (invariant I1); ranges overlap each other's uploads.
        """
        parallel = not self._in_one_piece and self._descriptor.size_bytes >= self._limits.parallel_from_bytes
        runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs_of(todo, max_parts=1 if parallel else None):
            runs.put(run)
        readers = min(self._limits.ranges if parallel else 1, runs.qsize())
        failed = threading.Event()

        def upload_part(part: PartRange, buffer: bytearray) -> None:
            try:
                self._upload_part(part, buffer, upload, stored)
            except ClusterError as exc:
                raise _StoreFailedError(exc) from exc
            finally:
                self._pool.release(buffer)

        sink = _Sink(staging=staging, hasher=hasher, on_part=upload_part, is_abandoned=failed.is_set)

        def read_runs() -> None:
            try:
                while not failed.is_set():
                    try:
                        run = runs.get_nowait()
                    except queue.Empty:
                        return
                    self._read(_Cursor(run.parts), sink)
            except BaseException:
                failed.set()
                raise

        _run_all(readers, read_runs)
        missing = [p.number for p in todo if p.number not in stored]
        if missing:
            raise InternalError(f"parts {missing} of {self._descriptor.digest} were never uploaded")

    def _upload_part(self, part: PartRange, buffer: bytearray, upload: UploadState, stored: dict[int, Part]) -> None:
        self._raise_if_stopped()
        try:
            done = self._store.upload_part(
                upload.key, upload.upload_id, part.number, memoryview(buffer)[: part.length_bytes]
            )
        except BlobNotFoundError as exc:
            raise _UploadGoneError(upload) from exc
        hit(FaultPoint.FETCH_PART_UPLOADED)
        self._journal.record_part(done.number, done.etag)
        hit(FaultPoint.FETCH_PART_RECORDED)
        with self._lock:
            stored[done.number] = done

    def _read(self, cursor: _Cursor, sink: _Sink) -> None:
        """Read all of *cursor*'s parts, from whatever source works."""
        try:
            while cursor.parts and not sink.is_abandoned():
                self._raise_if_stopped()
                index = self._state.index
                try:
                    self._read_response(cursor, index, sink)
                except StaleFenceError:
                    raise
                except ClusterError as exc:
                    self._failed(exc, index)
        finally:
            if cursor.buffer is not None:
                self._pool.release(cursor.buffer)
                cursor.buffer = None

    def _read_response(self, cursor: _Cursor, index: int, sink: _Sink) -> None:
        """Read parts from one response until it, or the cursor, ends."""
        size = self._descriptor.size_bytes
        source = self._sources[index]
        offset, length = cursor.offset, cursor.length
        is_range = offset > 0 or length < size
        with self._opened(source, offset, length if is_range else None) as response:
            if response.total_bytes is not None and response.total_bytes != size:
                raise SizeMismatchError(self._descriptor.digest, size, response.total_bytes, source.name)
            if is_range and response.status == _HTTP_OK:
                if not self._in_one_piece:
                    raise self._ranges_refused(source)
                self._skip(response, offset)
            while cursor.parts and not sink.is_abandoned():
                if cursor.buffer is None:
                    cursor.buffer = self._pool.acquire(cursor.parts[0].length_bytes, self._stop)
                self._fill(response, index, cursor, sink)
                if cursor.filled < cursor.parts[0].length_bytes:
                    return
                hit(FaultPoint.FETCH_PART_RECEIVED)
                sink.on_part(*cursor.next_part())

    @contextmanager
    def _opened(self, source: Source, offset: int, length: int | None) -> Iterator[SourceResponse]:
        """Open *source*; where it refuses the range outright, ask for the whole."""
        with ExitStack() as stack:
            try:
                response = stack.enter_context(source.open(offset, length))
            except RangeRefusedError:
                if not self._in_one_piece:
                    raise self._ranges_refused(source) from None
                response = stack.enter_context(source.open(0, None))
            yield response

    def _ranges_refused(self, source: Source) -> _StartOverError:
        self._in_one_piece = True
        return _StartOverError(f"{source.name} refuses ranges")

    def _fill(self, response: SourceResponse, index: int, cursor: _Cursor, sink: _Sink) -> None:
        """Read the rest of the cursor's first part, writing and hashing each chunk as it comes."""
        if cursor.buffer is None:
            raise InternalError("a part is read without a buffer")
        view = memoryview(cursor.buffer)
        end = cursor.parts[0].length_bytes
        while cursor.filled < end and not sink.is_abandoned():
            self._raise_if_stopped()
            count = response.readinto(view[cursor.filled : min(cursor.filled + _CHUNK, end)])
            if not count:
                raise UnavailableError(f"blob {self._descriptor.digest}", "the source ended it early")
            if sink.hasher is not None:
                chunk = view[cursor.filled : cursor.filled + count]
                sink.staging.pwrite(cursor.offset, chunk)
                sink.hasher.wrote(cursor.offset, chunk)
            cursor.filled += count
            self._count(count, index)

    def _skip(self, response: SourceResponse, count: int) -> None:
        """Read and drop *count* bytes: what going on costs where ranges are refused."""
        scratch = memoryview(bytearray(_CHUNK))
        while count:
            self._raise_if_stopped()
            got = response.readinto(scratch[: min(count, _CHUNK)])
            if not got:
                raise UnavailableError(f"blob {self._descriptor.digest}", "the source ended it early")
            count -= got
            with self._lock:
                self._fetched_bytes += got

    def _count(self, count: int, index: int) -> None:
        """Count bytes that arrived, and tell of them now and then."""
        now_s = time.monotonic()
        with self._lock:
            self._state.progressed()
            self._contributors.add(index)
            self._fetched_bytes += count
            self._arrived_bytes += count
            current = self._arrived_bytes
            if now_s - self._reported_s < _REPORT_EVERY_S:
                return
            self._reported_s = now_s
        self._journal.report(current, self._descriptor.size_bytes)

    def _failed(self, error: ClusterError, index: int) -> None:
        """Ask the state what follows *error*, and do it: pause, move on, start over, or give up."""
        with self._lock:
            if index != self._state.index:
                return  # another reader has moved on to the next source already
            decision = self._state.failed(error, draw=self._rng.random())
            if not isinstance(decision, TryAgain):
                self._given_up[self._sources[index].name] = error
        match decision:
            case TryAgain(delay_s=delay_s):
                if self._stop.wait(delay_s):
                    raise TransferStoppedError
            case NextSource():
                pass
            case StartOver():
                raise _StartOverError(str(error)) from error
            case GiveUp(error=final):
                raise self._naming_all(final) from error
            case _:
                assert_never(decision)

    def _naming_all(self, final: ClusterError) -> ClusterError:
        """Return *final*; where it is that a blob isn't there, with every other place that was tried in vain.

        A foreign layer's own address may be down while the repository, asked last, never had the layer.
        """
        others = [f"{name}: {error}" for name, error in self._given_up.items() if error is not final]
        if not isinstance(final, BlobNotFoundError) or not others:
            return final
        return BlobNotFoundError(final.digest, f"{final.where} (also tried: {'; '.join(others)})")

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise TransferStoppedError
