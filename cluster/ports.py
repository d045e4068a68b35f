"""The ports: what the farm needs of the world, as Protocols.

Adapters live in ``storage/``, verified fakes in ``storage/memory.py``; each port has one contract
suite in ``tests/contract/`` that every implementation passes.

Two kinds. *Control* ports are asynchronous and small. *Byte* ports are synchronous and are called
from threads with the caller's buffers, because that is what measured fastest (one event loop caps a
process at a third of what four threads reach).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from cluster.audit import AuditEntry
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.disk_room import Spend, unbounded
from cluster.flight.values import (
    Committed,
    Elsewhere,
    Failed,
    Fence,
    FlightEvent,
    JoinOutcome,
    UploadState,
    Vacated,
)
from cluster.lease import Lease, LeaseId
from cluster.progress import ProgressItem
from cluster.provider import ProviderHandle
from cluster.quota import ANYBODYS, Budget, Quota
from cluster.ref import BlobRecord, ChainUse, ImageRecord, RefId, RefRecord, RefState, RefUsage

# -- bytes ------------------------------------------------------------------------------------------


class ByteStream(Protocol):
    """Bytes that are read once, in order, by one thread."""

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes into *buffer*; block until there is at least one.

        Returns:
            How many bytes were read; 0 at the end.

        Raises:
            ClusterError: the rest can't be had.
        """
        ...


# -- snapshots ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLayer:
    """What unpacking a layer came to."""

    #: Digest of the uncompressed tar as it was read.
    diff_id: Digest
    #: Length of the uncompressed tar.
    tar_bytes: int
    #: Bytes of regular files that the layer brought.
    content_bytes: int
    #: Tar entries applied.
    entries: int
    #: False where another had published this snapshot first, and what was unpacked here was dropped.
    was_published: bool


class Workspace(Protocol):
    """A writable tree on top of a published snapshot, of one user; leaving its context discards it.

    Changes are made to the files under :attr:`path`, by this process or by a container that has it as its
    root. The first call that asks what has changed ends the writing: from then on there is no *path*.

    Sockets are left out of what is committed. A process that is killed leaves only what
    :meth:`Snapshotter.recover` removes; the containers that it ran must have been ended before that.
    """

    @property
    def path(self) -> Path:
        """Return where the tree is."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def is_unchanged(self) -> bool:
        """Tell whether nothing was changed: then there is no layer, and the parent is the result.

        Raises:
            SnapshotError: a process still writes to the tree, or a name in it can't be in a layer.
        """
        ...

    def commit(self, out: BinaryIO, *, source_date_epoch: int | None) -> Digest:
        """Write the uncompressed layer tar of what was changed; return its diff ID. May be repeated.

        Sorted by path: one tree gives one tar. Modification times later than *source_date_epoch*, in
        seconds, are clamped to it, as BuildKit's ``rewrite-timestamp`` does; None: kept.

        Raises:
            SnapshotError: as above, or the disk refused.
            ClusterError: whatever *out* raised, unchanged.
        """
        ...

    def publish(self, chain: Digest) -> bool:
        """Publish the tree as this node's snapshot of *chain*, as if the committed layer had been unpacked; close it.

        A rename, without unpacking again. Returns False, and drops the tree, where that snapshot is there
        already.

        Raises:
            SnapshotError: the parent is not on this node any more, or the disk refused.
            InternalError: it was not committed, or *chain* is not that of parent and diff ID.
        """
        ...

    def discard(self) -> None:
        """Drop the tree; does nothing where that was done, or it was published.

        Raises:
            SnapshotError: the disk or the kernel refused; the next :meth:`Snapshotter.recover` does it.
        """
        ...


class Snapshotter(Protocol):
    """One node's extracted snapshots: at most one a chain ID, each complete or not there.

    Synchronous and thread-safe. A snapshot is unpacked in a staging directory and published by a
    rename, so a crash leaves only staging directories, which :meth:`recover` removes; a second
    process that publishes the same chain finds it there and drops its own work (invariant I4).
    """

    #: ``overlay`` or ``copying``.
    name: str

    def has(self, chain: Digest) -> bool:
        """Tell whether the snapshot of *chain* is published on this node."""
        ...

    def use(self, chain: Digest) -> bool:
        """Tell whether the snapshot of *chain* is published on this node; if so, it was used last now."""
        ...

    def apply(
        self,
        *,
        chain: Digest,
        parent: Digest | None,
        layer: Descriptor,
        stream: ByteStream,
        await_parent: Callable[[], None],
        spend: Spend = unbounded,
    ) -> AppliedLayer:
        """Unpack *stream*, the blob of *layer* as stored, on top of *parent*, and publish it as *chain*.

        Whiteouts and opaque directories, hard links, device nodes, FIFOs, xattrs, owners, modes, times,
        sparse files and long names are kept. An entry never leaves the root, through symlinks either.
        The stream's own digest is the caller's affair; the diff ID is checked here, before publishing.

        Args:
            chain: Chain ID under which to publish.
            parent: Chain ID of the snapshot below; None for the lowest layer.
            layer: Its descriptor: compression and expected diff ID.
            stream: The blob's bytes; may still be arriving.
            await_parent: Blocks until *parent* is published (raises if it won't be). Called only when
                the lower layers must be seen (a directory missing from the tar, a link into a lower
                layer), and in any case before publishing, so that layers unpack in parallel exactly
                where that is exact.
            spend: Called before bytes are written to the disk.

        Raises:
            LayerError: the layer is truncated or malformed, or (UnsafeEntryError) leaves its root.
            UnprivilegedEntryError: without root, an entry can't be made and its absence would show.
            DiffIdMismatchError: it unpacks to another diff ID; nothing is published.
            SnapshotGoneError: the parent is not here any more.
            NodeDiskError: the disk is full or fails.
            SnapshotError: the kernel refused.
            ClusterError: whatever *stream*, *await_parent* or *spend* raised, unchanged.
        """
        ...

    def mount(self, chain: Digest, name: str) -> Path:
        """Mount the snapshot *chain* read-only under *name* and return the path; idempotent.

        Raises:
            SnapshotGoneError: it is not published here.
            SnapshotError: the kernel refused.
        """
        ...

    def workspace(self, parent: Digest | None, name: str) -> Workspace:
        """Open a writable tree on top of the snapshot *parent* (None or EMPTY_CHAIN: on top of nothing).

        Args:
            parent: Chain ID of the snapshot, which is not removed as long as the workspace is open.
            name: For people, as of a mount; need not be unique.

        Raises:
            SnapshotGoneError: *parent* is not published here.
            SnapshotError: the disk or the kernel refused.
        """
        ...

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`; does nothing where there is no such mount."""
        ...

    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name."""
        ...

    def snapshots(self) -> Iterable[Digest]:
        """List the published snapshots."""
        ...

    def remove(self, chain: Digest, *, last_used_ns: int | None = None) -> str:
        """Remove the snapshot unless something uses it, in whatever process of the node.

        A mount uses it, an open workspace, a layer that is being unpacked onto it; and, where a snapshot holds its own
        layer's files only, a published one that stands on it. Cut off at any point it leaves the snapshot whole or
        gone, and perhaps what :meth:`recover` removes.

        Args:
            chain: Which.
            last_used_ns: Its last use as far as the caller knows, wall-clock nanoseconds: it stays if it was used
                since. None: it may go whenever that was.

        Returns:
            "" if it is gone, or was not there; else why it stays, as the end of a sentence.

        Raises:
            SnapshotError: the disk refused.
        """
        ...

    def diff(self, chain: Digest, parent: Digest | None, out: BinaryIO) -> Digest:
        """Write the uncompressed layer tar that makes *chain* out of *parent*; return its diff ID.

        Entries are sorted by path, so that one tree gives one tar. What could not be made without
        root and was recorded beside the snapshot is restored from there.
        """
        ...

    def recover(self) -> list[str]:
        """Remove what a killed process left (staging directories, stale mounts); return what it removed."""
        ...

    def settle(self) -> int:
        """Flush what was published to the disk, so that it survives a crash of the machine; return how many were.

        Publishing doesn't flush: until then a snapshot survives the death of any process, and is unpacked
        anew after a reboot. Called now and then, from a thread that may wait.
        """
        ...


# -- the content store -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object as the content store has it."""

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One uploaded part of a multi-part upload."""

    number: int
    size_bytes: int
    etag: str


class ObjectReader(Protocol):
    """Reads objects by key, whole; the part of :class:`ContentStore` that who exports an image needs."""

    def open(self, key: str, /) -> AbstractContextManager[ByteStream]:
        """Open an object for reading, by one thread; leaving the context closes it.

        Raises:
            BlobNotFoundError: there is none; now, or from the stream. UnavailableError: likewise, no answer after
                retries.
        """
        ...


class ContentStore(Protocol):
    """Objects by key in the S3 bucket. Synchronous and thread-safe; knows keys, not digests.

    What is "present" is decided in Redis (:class:`BlobStore`), never by asking here.
    """

    def put(self, key: str, data: bytes | memoryview) -> ObjectInfo:
        """Write an object whole, in one request.

        Raises:
            UnavailableError: no answer after retries; it may or may not be there.
        """
        ...

    def begin_upload(self, key: str) -> str:
        """Start a multi-part upload and return its ID."""
        ...

    def upload_part(self, key: str, upload_id: str, number: int, data: memoryview) -> Part:
        """Upload part *number* (from 1). *data* may be reused after the call returns.

        Raises:
            BlobNotFoundError: there is no such upload (aborted or completed meanwhile).
            UnavailableError: no answer after retries.
        """
        ...

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Return the parts that the store has, by number; raises BlobNotFoundError as above."""
        ...

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> ObjectInfo:
        """Make the object of *parts*; idempotent where the object is there already with that size."""
        ...

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Drop an upload; does nothing where there is none."""
        ...

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Return (key, upload ID) of the unfinished uploads under *prefix*."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object, or None where there is none."""
        ...

    def open(self, key: str, offset: int = 0, length: int | None = None) -> AbstractContextManager[ByteStream]:
        """Open an object (or a range of it) for reading; leaving the context closes it.

        The stream resumes by itself after a reset, within the retry budget.

        Raises:
            BlobNotFoundError: no such object.
            UnavailableError: no answer after retries.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete an object; does nothing where there is none."""
        ...

    def copy(self, source: ObjectInfo, key: str) -> None:
        """Copy an object within the bucket: no byte of it comes to this process.

        Raises:
            BlobNotFoundError: it is gone, or no longer the one that *source* is.
            UnavailableError: no answer after retries; the copy may or may not be there.
        """
        ...

    def objects(self, prefix: str, after: str = "") -> Iterable[ObjectInfo]:
        """List the objects under *prefix*, sorted by key; only those that come after the key *after*."""
        ...


# -- records, leases, flights ----------------------------------------------------------------------------


class RefStore(Protocol):
    """Ref and image records, and what is known of blobs and their providers.

    Each method is one atomic step, unless it says otherwise. Every method may raise UnavailableError: no
    answer, the write may or may not have happened.
    """

    async def get_or_create(
        self,
        records: Sequence[RefRecord],
        providers: Mapping[Digest, Sequence[ProviderHandle]],
        *,
        lease_id: LeaseId,
    ) -> list[RefState]:
        """Make or find the record of each of *records*, in order, parents first, in one script.

        Where a record with that ID exists it is that one; image refs are merged in, and origins as
        :func:`cluster.origin.merge_origins` says. Providers are added to what is known for each digest, never
        overwritten. Each ref is attached to the lease in the same step, and marked used.

        Raises:
            LeaseLostError: no such live lease; nothing has changed.
            NonAddressableParentError: a parent is neither stored nor earlier in *records*; nothing has changed.
        """
        ...

    async def get(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Look refs up in bulk; None where there is none. Does not mark them used.

        Not one step: presence and providers are read after the records, which say nothing of either.
        """
        ...

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return the ref and all below it, lowest first, in one round trip.

        Raises:
            RefNotFoundError: it, or one below it, is unknown.
        """
        ...

    async def use(self, ref_ids: Sequence[RefId], *, lease_id: LeaseId) -> None:
        """Attach refs to the lease and mark them used, in one step.

        Raises:
            LeaseLostError: no such live lease.
            RefNotFoundError: one of them is unknown; nothing has changed.
        """
        ...

    async def usage(self, ref_id: RefId) -> RefUsage:
        """Return when and how often a ref was used."""
        ...

    async def find(self, prefix: str) -> list[RefId]:
        """Return the refs whose ID starts with *prefix* (with or without ``sha256:``), at most 20."""
        ...

    async def list_refs(self) -> list[RefId]:
        """Return every ref, most recently used first."""
        ...

    async def refs_of_chain(self, chain: Digest) -> list[RefId]:
        """Return the refs with that chain ID: they share one snapshot a node."""
        ...

    async def uses_of_chains(self, chains: Sequence[Digest]) -> list[ChainUse]:
        """Return, for each chain ID, the refs that have it and the live leases that hold one of them.

        Many are asked for together; each is as it is at one moment.
        """
        ...

    async def put_image(self, image: ImageRecord, *, lease_id: LeaseId) -> ImageRecord:
        """Record an image under its name and manifest digest, and attach it to the lease.

        Raises:
            LeaseLostError: no such live lease.
        """
        ...

    async def image(self, name_or_digest: str) -> ImageRecord | None:
        """Return the image by normalised name or manifest digest."""
        ...

    async def images(self) -> list[ImageRecord]:
        """Return every image by name."""
        ...

    async def image_of_ref(self, ref_id: RefId) -> ImageRecord | None:
        """Return the image most recently resolved whose top is that ref."""
        ...

    async def blobs(self, digests: Sequence[Digest]) -> list[BlobRecord | None]:
        """Tell which blobs are present."""
        ...

    async def hold_blobs(self, digests: Sequence[Digest], *, lease_id: LeaseId) -> list[BlobRecord | None]:
        """Attach those of the blobs that are present to the lease, and return them; None for each that is not.

        Of each blob it is one step: one that is returned is held, and can't have been collected in between.

        Raises:
            LeaseLostError: no such live lease.
        """
        ...

    async def providers(self, digests: Sequence[Digest]) -> list[tuple[ProviderHandle, ...]]:
        """Return every provider known for each digest."""
        ...

    async def add_providers(self, digest: Digest, providers: Sequence[ProviderHandle]) -> None:
        """Add providers for a digest (after a push, say)."""
        ...

    async def mark_absent(self, blob: BlobRecord, reason: str, *, delete_after_s: float | None = None) -> bool:
        """Turn a blob that was found gone or damaged lazy again, if it is still that very upload.

        Args:
            blob: As it was when it was looked at.
            reason: For people; kept for a week.
            delete_after_s: Seconds after which collection may delete its object; None: the sweeper finds it.

        Returns:
            True if this call changed it.
        """
        ...


class LeaseStore(Protocol):
    """Leases by the store's clock. What a lease holds is written with it in one step."""

    async def create(self, lease_id: LeaseId, *, ttl_s: float | None, labels: Mapping[str, str] | None = None) -> Lease:
        """Make a lease (ttl_s None: pinned). An existing live one of that ID is renewed instead."""
        ...

    async def renew(self, lease_id: LeaseId, *, ttl_s: float) -> None:
        """Move the expiry to *ttl_s* from now.

        Raises:
            LeaseLostError: it expired or was deleted.
        """
        ...

    async def attach(self, lease_id: LeaseId, resources: Sequence[str]) -> None:
        """Hold *resources* by the lease; LeaseLostError as above."""
        ...

    async def get(self, lease_id: LeaseId) -> Lease | None:
        """Return a live lease with its resources."""
        ...

    async def delete(self, lease_id: LeaseId) -> bool:
        """Delete a lease; tell whether there was one."""
        ...

    async def leases(self) -> list[Lease]:
        """Return the live leases, soonest expiry first, pinned last."""
        ...

    async def holders(self, resource: str) -> list[LeaseId]:
        """Return the live leases that hold *resource*."""
        ...


class FlightStore(Protocol):
    """The distributed single-flight lock: for each key at most one live owner, cluster-wide.

    All time is the store's. A flight's owner and its waiters each renew; who stops renewing is gone.
    Keys are ``blob:DIGEST``; when the blob of that digest is present there is nothing to own.
    """

    async def join(self, key: str, *, worker: str, token: str, ttl_s: float) -> JoinOutcome:
        """Join or own the flight of *key*, in one script.

        Present if the blob is there. Owned, with a new fence, if nobody owns it or the owner's lease has
        lapsed (then with what upload it left). Else Joined, with the span that was current where its owner
        joined, and *worker* is recorded as waiting until *ttl_s* from now (it renews). Aborting if the owner
        is stopping for want of waiters.

        Args:
            key: ``blob:sha256:…``.
            worker: Who asks: one name a process; a process coalesces its own callers first.
            token: Unique to this attempt; becomes the fence's token if it owns.
            ttl_s: Seconds an owner or waiter lives without renewing.
        """
        ...

    async def join_another(self, key: str, *, worker: str, ttl_s: float) -> Elsewhere | None:
        """Join another's flight of *key*, as :meth:`join` does; None, and nothing is changed, where nobody has one."""
        ...

    async def leave(self, key: str, *, worker: str) -> bool:
        """Stop waiting; tell whether nobody is left waiting. The owner is woken and finds out."""
        ...

    async def begin_upload(self, fence: Fence, upload: UploadState) -> None:
        """Record the multi-part upload this owner has begun; StaleFenceError if it owns no more."""
        ...

    async def record_part(self, fence: Fence, number: int, etag: str) -> None:
        """Record one uploaded part; StaleFenceError as above."""
        ...

    async def drop_upload(self, fence: Fence) -> None:
        """Forget the recorded upload (it could not be resumed); StaleFenceError as above."""
        ...

    async def report(self, fence: Fence, current_bytes: int, total_bytes: int) -> None:
        """Tell waiters and late joiners how far the fetch is; StaleFenceError as above."""
        ...

    async def commit(self, fence: Fence, blob: BlobRecord, *, entry: AuditEntry | None = None) -> None:
        """Make *blob* present and end the flight, in one script, if the fence is valid; *entry* is noted with it.

        The blob is also held by a lease of the flight's own (``flight:…``, 120 s), so that every waiter
        has time to pin it in its own.

        Raises:
            StaleFenceError: another owns it now, or the lease lapsed; nothing has changed.
        """
        ...

    async def fail(self, fence: Fence, error: bytes, *, entry: AuditEntry | None = None) -> None:
        """End the flight with an error for those who wait now; late arrivals start afresh. *entry* as above.

        The recorded upload is kept for the next owner to resume. StaleFenceError as above.
        """
        ...

    async def vacate(self, fence: Fence, *, entry: AuditEntry | None = None) -> None:
        """Give the ownership up without an outcome; a waiter takes over and resumes.

        *entry* and StaleFenceError as above.
        """
        ...

    async def abort_if_unwanted(self, fence: Fence) -> bool:
        """Start aborting if no live waiter is recorded; from then on :meth:`join` says Aborting.

        The owner then stops its work and calls :meth:`vacate`. StaleFenceError as above.
        """
        ...

    async def outcome(self, key: str, fence_number: int) -> Committed | Failed | Vacated | None:
        """Return how the flight under that fence ended (kept for 60 s); None while it runs or is not known."""
        ...

    async def state(self, key: str) -> dict[str, str | int | float] | None:
        """Return a summary for people: owner, fence, waiters, bytes; None where there is no flight."""
        ...

    async def under_way(self) -> dict[str, dict[str, str | int | float]]:
        """Return what :meth:`state` tells of every flight that there is, by key."""
        ...

    def events(self, key: str) -> AbstractAsyncContextManager[AsyncIterator[FlightEvent]]:
        """Subscribe to a flight's events; entered means subscribed. Messages may be lost: poll outcome too."""
        ...


class AuditNotes(Protocol):
    """Where is noted what was done; see :mod:`cluster.audit`."""

    def note(self, *entries: AuditEntry) -> None:
        """Append entries, soon. Nobody waits for it: what can't be written is lost."""
        ...


class AuditReader(Protocol):
    """The audit stream of a farm, as it is read: cut to a number of entries, and to a time."""

    def entries(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield what is kept of the last *last_s* seconds, None for all, oldest first; raises UnavailableError."""
        ...

    def follow(self, *, last_s: float | None = None) -> AsyncIterator[AuditEntry]:
        """Yield the same, and then what comes, for ever."""
        ...


class AuditLog(AuditNotes, AuditReader, Protocol):
    """The audit stream of a farm: noted in, and read."""


class FlightRenewer(Protocol):
    """Renews ownership and waiting from a thread of its own, which the process's own I/O can't starve."""

    def keep(self, fence: Fence, *, ttl_s: float, on_lost: Callable[[], None]) -> None:
        """Renew the ownership every ``ttl_s / 3`` until dropped; call *on_lost* (in the thread) once it is lost."""
        ...

    def keep_waiting(self, key: str, *, worker: str, ttl_s: float) -> None:
        """Renew the waiter record likewise."""
        ...

    def drop(self, fence: Fence) -> None:
        """Stop renewing an ownership."""
        ...

    def drop_waiting(self, key: str) -> None:
        """Stop renewing a waiter record."""
        ...

    def close(self) -> None:
        """Stop the thread."""
        ...


class ProofStore(Protocol):
    """Proofs of access: (credential identity, registry/repository, digest), each with an expiry."""

    async def record(self, identity: str, source: str, digests: Sequence[Digest], *, ttl_s: float) -> None:
        """Record that *identity* has seen *digests* in *source*; how is spelled in *source*, which is opaque here."""
        ...

    async def proven(
        self, pairs: Sequence[tuple[str, str]], digests: Sequence[Digest]
    ) -> list[frozenset[tuple[str, str]]]:
        """Return, for each digest, which (identity, source) of *pairs* have a live proof of it."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """Leave for one request to a registry host."""

    host: str
    #: Unique to the request; "" for one that needed no leave.
    name: str = ""
    #: True where the host was given up, and this request tries for all whether it is back.
    is_probe: bool = False
    #: Of what it takes.
    budget: Budget = ANYBODYS


class HostLimiter(Protocol):
    """What all requests of a cluster to one registry host have in common.

    A limit on those under way, a limit on their rate, what the host says is left of what it allows
    (:mod:`cluster.quota`), and a circuit breaker (:mod:`cluster.circuit`): a host that fails again and again is given
    up for a while. Who holds a slot tells how its request went before it lets go
    of it; one that nothing is told of counts for nothing.
    """

    def slot(self, host: str, *, deadline_s: float, budget: Budget = ANYBODYS) -> AbstractAsyncContextManager[Slot]:
        """Hold one of the host's slots for one request; waits its turn, for the rate, and for a Retry-After's end.

        Where little is left of *budget*, its requests are spread over the time until there is more; others go past
        them meanwhile.

        Raises:
            DeadlineExceededError: none came free in *deadline_s* seconds.
            RateLimitedError: the host wants no request of this kind sooner; without waiting.
            CircuitOpenError: the host is given up for now; without waiting.
        """
        ...

    async def quoted(self, slot: Slot, quotas: Sequence[Quota]) -> None:
        """Record what the host's answer says is left of the slot's budget."""
        ...

    async def throttled(self, slot: Slot, retry_after_s: float) -> None:
        """Record a 429: nobody in the cluster asks before that, and the limit is halved (not below 1).

        So is the rate, to half of what was asked of late if that is less (not below 1 a second); where none is
        configured, one is set. To the circuit breaker it is an answer.
        """
        ...

    async def succeeded(self, slot: Slot) -> None:
        """Record an answer: limit and rate creep back up to what is configured, or until the rate is lifted.

        Failures are in a row no more, and a host that was given up is open to all if this was the probe.
        """
        ...

    async def failed(self, slot: Slot, failure: str) -> None:
        """Record that the host failed: no connection, no answer, or an error of its own; *failure* says which."""
        ...


class ProgressStore(Protocol):
    """Progress streams: capped, replayable from the start by anyone who comes late."""

    async def publish(self, streams: Sequence[str], item: ProgressItem) -> None:
        """Append *item* to each of *streams*; best effort, never raises."""
        ...

    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield the stream's items from its start, then live, until the item named "" ends it."""
        ...


# -- registries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Authorization:
    """What to send as ``Authorization``; the value is never shown, stored or logged."""

    header: str = field(repr=False)
    #: Seconds for which it may be used, counted from its receipt; None: for as long as it works.
    expires_in_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthRequest:
    """What a registry client asks of a session."""

    #: Host and port, as in provider handles.
    registry: str
    plain_http: bool = False
    #: ``repository:NAME:pull`` or ``repository:NAME:pull,push``; several where a mount needs them.
    scopes: tuple[str, ...]
    #: The ``WWW-Authenticate`` header of the 401, or None to ask for what is cached already.
    challenge: str | None = None
    #: True where what was sent before was refused: it must not be answered from the cache.
    was_refused: bool = False


class Authorizer(Protocol):
    """Answers for credentials, as one caller. Implemented on the driver, and by the session that asks it."""

    def identity(self, registry: str) -> str:
        """Return an opaque name for who this caller is at *registry* (a keyed hash), or ``anonymous``."""
        ...

    async def authorize(self, request: AuthRequest) -> Authorization | None:
        """Return what to send, or None to send nothing.

        Raises:
            AccessDeniedError: the token server refuses.
            SessionGoneError: the caller is not there any more.
            UnavailableError: the token server or the session did not answer.
        """
        ...
