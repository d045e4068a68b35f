"""Extract: unlazy, bring to this node, unpack, mount. One snapshot a chain ID a node, however many ask.

"Blob present" and "snapshot present" are two facts: a caller whose snapshot is there needs no blob, and
a blob that is present says nothing of the snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from cluster import tracing
from cluster.digest import EMPTY_CHAIN, Digest, hex_of
from cluster.disk_room import BoundlessDisk, NodeDisk, Part, snapshot_key, snapshot_parts, taken_bytes
from cluster.errors import (
    ClusterError,
    DeadlineExceededError,
    SnapshotGoneError,
    UnavailableError,
    first_error,
)
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.runner import Caller, Unlazier
from cluster.flight.runner import FlightContext, FlightOutcome, Flights
from cluster.messages import LayerFetch
from cluster.ports import AppliedLayer, ByteStream, ProgressStore, RefStore, Snapshotter
from cluster.progress import LayerPhase, ProgressItem
from cluster.ref import BlobRecord, RefRecord, RefState

_MAX_TRIES = 4
#: Seconds between looks for a parent's snapshot, which another process of the node may publish.
_LOOK_EVERY_S = 1.0
#: Seconds between telling how far an unpacking is.
_TELL_EVERY_S = 0.5
#: Seconds between looks whether a blob that waits to be unpacked has been lost meanwhile.
_LOST_LOOK_S = 2.0
#: Layers whose unpacked size is remembered.
_REMEMBERED = 10_000

T = TypeVar("T")


def mount_name(chain: Digest) -> str:
    """Return the name under which a chain that is extracted is mounted."""
    return hex_of(chain)[:16]


class LocalBlob(Protocol):
    """A blob whose bytes are on this node's disk, or arriving there."""

    def open(self) -> ByteStream:
        """Read it from the start; blocks where bytes have yet to arrive."""
        ...

    async def verified(self) -> None:
        """Return once all of it is here and hashes to its digest.

        Raises:
            ClusterError: it did not arrive whole; another try may follow.
        """
        ...


class LocalBlobs(Protocol):
    """This node's blobs: cached, arriving from a registry, or to be had from S3."""

    def has(self, digest: Digest) -> bool:
        """Tell whether the whole blob is on the disk. Blocks."""
        ...

    async def get(self, digest: Digest, tenants: Iterable[str] = ()) -> LocalBlob:
        """Wait until the blob's bytes are here or arriving, and return it; *tenants* want it."""
        ...

    def note_present(self, blob: BlobRecord, tenant: str = "") -> None:
        """Say that the blob is in the content store, so that :meth:`get` may bring it from there, for *tenant*, too."""
        ...


class SnapshotNotes(Protocol):
    """Is told which snapshots nodes have, or are getting; see :class:`cluster.solver_ports.Whereabouts`."""

    async def note_arriving(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node is getting the snapshots of *chains*; may raise UnavailableError."""
        ...

    async def note_here(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has the snapshots of *chains*; may raise UnavailableError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """A filesystem that is on this node."""

    #: Where it is mounted; None where it is not.
    path: Path | None
    layers: tuple[LayerFetch, ...]
    #: Seconds for which it waited for room on the disk.
    disk_waited_s: float = 0.0


class Extractor:
    """Extracts chains on one node.

    *notes* is told once when an extraction begins, of what it lacks, and once when it has ended well, of all its chain.
    Of one that fails nothing is told: what was noted lapses.
    """

    def __init__(
        self,
        *,
        node: str,
        unlazier: Unlazier,
        refs: RefStore,
        progress: ProgressStore,
        blobs: LocalBlobs,
        snapshotter: Snapshotter,
        threads: Executor,
        max_ahead: int,
        deadline_s: float,
        clock: Callable[[], float],
        notes: SnapshotNotes | None = None,
        disk: NodeDisk | None = None,
    ) -> None:
        self._node = node
        self._unlazier = unlazier
        self._refs = refs
        self._progress = progress
        self._blobs = blobs
        self._snapshotter = snapshotter
        self._threads = threads
        self._max_ahead = max_ahead
        self._deadline_s = deadline_s
        self._clock = clock
        self._notes = notes
        self._disk = disk or BoundlessDisk()
        #: What layers have come to, by digest, the latest last.
        self._unpacked_bytes: OrderedDict[Digest, int] = OrderedDict()
        self._flights: Flights[None, Caller] = Flights("snapshots")
        #: What is being unpacked, by chain ID.
        self._unpacking: dict[Digest, _Stoppable] = {}
        #: Chains with a thread, or in line for one, whose parents are published or came before them, all the way down.
        self._grounded: set[Digest] = set()
        #: Layers with a thread, or in line for one, of which that isn't so.
        self._ahead = 0
        #: Set, and replaced, when either changes.
        self._moved = asyncio.Event()
        #: Notified when a snapshot is published here, and when an unpacking is to stop.
        self._published = threading.Condition()

    async def extract(
        self, chain: Sequence[RefState], caller: Caller, *, mount: bool = True, disk_wait_s: float | None = None
    ) -> Extracted:
        """Unpack *chain* (lowest layer first; none: an empty filesystem) here and, if *mount*, mount it read-only.

        Disk for all that is missing is reserved first, within *disk_wait_s* (None: as configured). Layers are fetched
        in parallel and unpacked while they arrive; the lowest starts first, because everything above waits for it
        where it must.

        Raises:
            NodeDiskError: there is no room for it here, and none came.
            ClusterError: a layer can't be had or unpacked; what is complete stays for the next call.
        """
        for _ in range(_MAX_TRIES - 1):
            with contextlib.suppress(SnapshotGoneError):  # a snapshot was removed since it was seen here: once more
                return await self._extract(chain, caller, mount=mount, disk_wait_s=disk_wait_s)
        return await self._extract(chain, caller, mount=mount, disk_wait_s=disk_wait_s)

    async def _extract(
        self, chain: Sequence[RefState], caller: Caller, *, mount: bool, disk_wait_s: float | None
    ) -> Extracted:
        chains = [state.record.chain for state in chain]
        lacking = await self._in_thread(lambda: {each for each in chains if not self._snapshotter.has(each)})
        await self._note_arriving([each for each in chains if each in lacking])
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                self._reserved(chain, lacking, caller, disk_wait_s) as disk_waited_s,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(self._layer(state, caller)) for state in chain]
        except TimeoutError as exc:
            raise DeadlineExceededError("extract", f"not done after {self._deadline_s:.0f} s") from exc
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        await self._note_here(chains)
        layers = tuple(task.result() for task in tasks)
        if not mount:
            return Extracted(path=None, layers=layers, disk_waited_s=disk_waited_s)
        top = chain[-1].record.chain if chain else EMPTY_CHAIN
        await ahit(FaultPoint.MOUNT_BEFORE)
        path = await self._in_thread(lambda: self._snapshotter.mount(top, mount_name(top)))
        return Extracted(path=path, layers=layers, disk_waited_s=disk_waited_s)

    async def _note_arriving(self, chains: Sequence[Digest]) -> None:
        if self._notes is not None and chains:
            with contextlib.suppress(ClusterError):  # a hint
                await self._notes.note_arriving(self._node, chains)

    async def _note_here(self, chains: Sequence[Digest]) -> None:
        if self._notes is not None and chains:
            with contextlib.suppress(ClusterError):
                await self._notes.note_here(self._node, chains)

    @contextlib.asynccontextmanager
    async def _reserved(
        self, chain: Sequence[RefState], lacking: set[Digest], caller: Caller, wait_s: float | None
    ) -> AsyncIterator[float]:
        """Reserve disk for the snapshots that are lacking, and for those of their blobs that are not here.

        Gives the seconds for which that was waited for.
        """
        waiting = [state.record for state in chain if state.record.chain in lacking]
        began_s, is_told = self._clock(), False

        async def tell(phase: LayerPhase, detail: str) -> None:
            nonlocal is_told
            is_told = True
            for record in waiting:
                await self._tell(caller, record, phase, detail)

        async with contextlib.AsyncExitStack() as stack:
            if waiting:
                parts = await self._in_thread(lambda: self._parts(chain, lacking))
                names = waiting[-1].image_refs or (f"snapshot {waiting[-1].chain}",)
                on_wait = partial(tell, LayerPhase.WAITING)
                reserved = self._disk.reserved(f"extracting {names[0]}", parts, on_wait, wait_s=wait_s)
                try:
                    await stack.enter_async_context(reserved)
                except asyncio.CancelledError:
                    if is_told:
                        await asyncio.shield(tell(LayerPhase.CANCELLED, ""))
                    raise
                except ClusterError as exc:
                    await tell(LayerPhase.FAILED, str(exc))
                    raise
            yield self._clock() - began_s if is_told else 0.0

    def _parts(self, chain: Sequence[RefState], lacking: set[Digest]) -> list[Part]:
        records = [state.record for state in chain]
        blobs = [
            record.blob for record in records if record.chain in lacking and not self._blobs.has(record.blob.digest)
        ]
        snapshots = snapshot_parts(
            [(record.chain, record.blob) for record in records],
            lacking,
            self._unpacked_bytes.get,
            are_whole=self._snapshotter.name == "copying",
        )
        return [*(Part.of_blob(blob.digest, blob.size_bytes) for blob in blobs), *snapshots]

    async def _layer(self, state: RefState, caller: Caller) -> LayerFetch:
        record = state.record
        started_s = self._clock()
        # Used: whoever removes it has asked before this whether the caller's lease holds it, and asks again.
        if await self._in_thread(lambda: self._snapshotter.use(record.chain)):
            await self._unlazier.admit(record.blob, caller, state.present.source if state.present else "")
            self._unlazier.note(record.blob, caller, "present", "snapshot", self._clock() - started_s)
            await self._tell(caller, record, LayerPhase.PRESENT)
            return LayerFetch(
                digest=record.blob.digest,
                source="snapshot",
                bytes_fetched=0,
                seconds=self._clock() - started_s,
                joined=False,
            )
        # Every caller drives the fetch with its own credentials; unpacking only needs that somebody does. The
        # blob is in the key: who comes with another compression of the chain drives the fetch of that one.
        key = f"snapshot:{record.chain}:{record.blob.digest}"
        unpacking = asyncio.ensure_future(
            self._flights.run(key, lambda context: self._unpack(record, context), caller=caller)
        )
        try:
            fetch = await self._unlazy(record, caller)
            looked_s = self._clock()
            while not unpacking.done():
                await self._tell(caller, record, LayerPhase.EXTRACTING)
                await asyncio.wait({unpacking}, timeout=_TELL_EVERY_S)
                if not unpacking.done() and self._clock() - looked_s >= _LOST_LOOK_S:
                    fetch = await self._again_if_lost(record, caller, fetch)
                    looked_s = self._clock()
            joined = unpacking.result().joined
        except asyncio.CancelledError:
            await self._drop(unpacking)
            await asyncio.shield(self._tell(caller, record, LayerPhase.CANCELLED))
            raise
        except BaseException as exc:
            await self._drop(unpacking)
            await self._tell(caller, record, LayerPhase.FAILED, str(exc))
            raise
        await self._tell(caller, record, LayerPhase.JOINED if joined else LayerPhase.DONE)
        return fetch

    async def _unlazy(self, record: RefRecord, caller: Caller) -> LayerFetch:
        fetch, blob = await self._unlazier.bring(record.blob, caller)
        self._blobs.note_present(blob, caller.tenant)
        return fetch

    async def _again_if_lost(self, record: RefRecord, caller: Caller, fetch: LayerFetch) -> LayerFetch:
        """Fetch the blob anew where it turned out to be gone from the content store meanwhile."""
        (blob,) = await self._refs.blobs([record.blob.digest])
        if blob is None:
            return await self._unlazy(record, caller)
        self._blobs.note_present(blob, caller.tenant)
        return fetch

    async def _drop(self, unpacking: asyncio.Future[FlightOutcome[None]]) -> None:
        unpacking.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClusterError):
            await unpacking

    # -- unpacking ---------------------------------------------------------------------------------

    async def _unpack(self, record: RefRecord, context: FlightContext[Caller]) -> None:
        """Unpack one layer as its bytes come; try anew where they came wrong and come again."""
        for attempt in range(1, _MAX_TRIES + 1):
            about = {tracing.BLOB: record.blob.digest, tracing.CHAIN: record.chain}
            with tracing.span("bring", about):
                blob = await self._blobs.get(record.blob.digest, [caller.tenant for caller in context.callers])
            await ahit(FaultPoint.EXTRACT_BEFORE)
            try:
                with tracing.span("unpack", about):
                    await self._apply(record, blob)
            except ClusterError:
                # Bytes are unpacked before they are known to be right: if they were wrong, that is the error.
                try:
                    await blob.verified()
                except ClusterError:
                    if attempt < _MAX_TRIES:
                        continue
                    raise
                raise
            self._notify()
            return

    async def _apply(self, record: RefRecord, blob: LocalBlob) -> None:
        async with self._turn(record):
            await self._apply_in_thread(record, blob)

    async def _apply_in_thread(self, record: RefRecord, blob: LocalBlob) -> None:
        loop = asyncio.get_running_loop()
        stream = self._unpacking[record.chain] = _Stoppable(blob.open())

        def await_parent() -> None:
            if record.parent_chain is not None:
                self._await_published(record.parent_chain, stream)

        def apply() -> AppliedLayer:
            with self._disk.spending(snapshot_key(record.chain), stream.raise_if_stopped) as spend:
                return self._snapshotter.apply(
                    chain=record.chain,
                    parent=record.parent_chain,
                    layer=record.blob,
                    stream=stream,
                    await_parent=await_parent,
                    spend=spend,
                )

        applying = loop.run_in_executor(self._threads, apply)
        try:
            self._remember(record.blob.digest, await asyncio.shield(applying))
        except asyncio.CancelledError:
            stream.stop()
            self._notify()
            with contextlib.suppress(Exception):
                await applying
            raise
        finally:
            if self._unpacking.get(record.chain) is stream:
                del self._unpacking[record.chain]
            stream.close()

    @contextlib.asynccontextmanager
    async def _turn(self, record: RefRecord) -> AsyncIterator[None]:
        """Wait until a layer may ask for a thread, which it holds until its parent is published.

        Layers begin as their bytes come, in whatever order. Were all to have a thread at once, the upper ones of very
        long chains could hold every one, and the lowest be in line behind those that wait for them, until the
        deadline. So a layer goes before its parent only as one of *max_ahead*; the other threads are had in the
        order of chains, and the first of those in line never waits for one that is behind it.
        """
        parent, is_to_look = record.parent_chain, True
        while True:
            moved = self._moved
            if parent is None or parent in self._grounded or (is_to_look and self._snapshotter.has(parent)):
                is_grounded = True
                break
            if self._ahead < self._max_ahead:
                is_grounded = False
                break
            is_to_look = False
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await moved.wait()
            except TimeoutError:
                is_to_look = True  # another process of this node may have published it
        if is_grounded:
            self._grounded.add(record.chain)
        else:
            self._ahead += 1
        self._move()
        try:
            yield
        finally:
            if is_grounded:
                self._grounded.discard(record.chain)
            else:
                self._ahead -= 1
            self._move()

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _remember(self, digest: Digest, applied: AppliedLayer) -> None:
        self._unpacked_bytes[digest] = taken_bytes(applied.tar_bytes, applied.entries)
        self._unpacked_bytes.move_to_end(digest)
        while len(self._unpacked_bytes) > _REMEMBERED:
            self._unpacked_bytes.popitem(last=False)

    def _await_published(self, chain: Digest, stream: _Stoppable) -> None:
        """Block this thread until the snapshot is there.

        In this very thread: were it to ask another of the pool, the pool could fill up with layers that wait
        for their parents, and none be left to find out that a parent is there.
        """
        until_s = self._clock() + self._deadline_s
        with self._published:
            while not self._snapshotter.has(chain):
                stream.raise_if_stopped()
                if self._clock() >= until_s:
                    raise DeadlineExceededError(f"snapshot {chain}", "it was not unpacked")
                self._published.wait(_LOOK_EVERY_S)  # another process of this node may publish it

    def _notify(self) -> None:
        with self._published:
            self._published.notify_all()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _tell(self, caller: Caller, record: RefRecord, phase: LayerPhase, detail: str = "") -> None:
        if streams := caller.streams(record.blob.digest):
            size = record.blob.size_bytes
            if phase is LayerPhase.EXTRACTING:
                stream = self._unpacking.get(record.chain)
                done = 0 if stream is None else stream.position
            else:
                done = 0 if phase in (LayerPhase.CANCELLED, LayerPhase.FAILED) else size
            item = ProgressItem(
                item=f"extract:{self._node}:{record.chain}",
                phase=phase,
                current_bytes=done,
                total_bytes=size,
                detail=detail,
            )
            await self._progress.publish(streams, item)


class _Stoppable:
    """A stream that another thread can end, whatever it waits for."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._is_stopped = False
        #: Bytes that were read.
        self.position = 0

    def readinto(self, buffer: memoryview) -> int:
        self.raise_if_stopped()
        count = self._stream.readinto(buffer)
        self.position += count
        return count

    def raise_if_stopped(self) -> None:
        if self._is_stopped:
            raise UnavailableError("extract", "it was cancelled")

    def stop(self) -> None:
        self._is_stopped = True
        self.close()

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
