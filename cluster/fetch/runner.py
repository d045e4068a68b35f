"""Unlazy: one flight for the cluster, seen from one process.

Callers of this process coalesce first (:mod:`cluster.flight.runner`); then this process joins or owns
the cluster's flight (:class:`cluster.ports.FlightStore`). Whoever owns it runs the transfer in a task of
its own, so that the first caller's end is not the fetch's; everybody else waits, woken by push, with a
slow poll behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, assert_never

from cluster import tracing
from cluster.audit import AuditEntry, NoAudit, Operation, error_of, handle_of, outcome_of
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.disk_room import BoundlessDisk, NodeDisk, Part
from cluster.errors import (
    AccessDeniedError,
    ClusterError,
    DeadlineExceededError,
    InternalError,
    NeedsRemoteProvidersError,
    NodeDiskError,
    SessionGoneError,
    StaleFenceError,
    UnavailableError,
)
from cluster.fair.runner import Ask, FairSlots
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.access import Admission
from cluster.fetch.together import Together
from cluster.flight.runner import FlightContext, FlightOutcome, Flights
from cluster.flight.values import (
    Aborting,
    Committed,
    Elsewhere,
    Failed,
    Fence,
    Joined,
    Owned,
    Present,
    Progressed,
    UploadState,
    Vacated,
)
from cluster.job import parse_layer_stream
from cluster.lease import LeaseId
from cluster.messages import LayerFetch
from cluster.metrics import FLIGHT_WAIT_SECONDS
from cluster.ports import AuditNotes, Authorizer, FlightRenewer, FlightStore, ProgressStore, RefStore
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import DescHandler, ProviderHandle
from cluster.ref import BlobRecord
from cluster.tracing import Span
from cluster.wire import decode_error, encode_error


@dataclass(frozen=True, kw_only=True, eq=False)
class Caller:
    """One caller of unlazy: whose credentials answer, which lease pins, and who looks on."""

    authorizer: Authorizer
    lease_id: LeaseId
    #: Providers that this caller may use, by digest, as :class:`cluster.fetch.access.AccessControl` said.
    providers: Mapping[Digest, Sequence[ProviderHandle]]
    #: Whose share of a node its work uses; see :mod:`cluster.fair.state`.
    tenant: str = ""
    #: ID of the job that it calls for; "" for none.
    job: str = ""
    #: Progress streams of the call.
    progress: tuple[str, ...] = ()
    #: Those of digests whose handlers name their own.
    own_progress: Mapping[Digest, tuple[str, ...]] = field(default_factory=dict)
    #: False once the caller's session has gone.
    is_live: Callable[[], bool] = field(default=lambda: True)

    def streams(self, digest: Digest) -> tuple[str, ...]:
        """Return the progress streams of a blob: those that its handlers name, else those of the call."""
        return self.own_progress.get(digest, self.progress)

    def entry(self, operation: Operation, blob: Descriptor) -> AuditEntry:
        """Return what the audit stream should know of this caller, who needs *blob*."""
        vertices = (parse_layer_stream(stream) for stream in self.streams(blob.digest))
        job, vertex = next((found for found in vertices if found is not None), (self.job, ""))
        known = (handle for handle in self.providers.get(blob.digest, ()) if not handle.is_farm)
        proven = next((self.authorizer.identity(handle.registry) for handle in known), "")
        return AuditEntry(
            operation=operation,
            who=self.tenant,
            job=job,
            vertex=vertex,
            credential=handle_of(proven),
            digest=blob.digest,
            size_bytes=blob.size_bytes,
        )


def progress_of(handlers: Iterable[DescHandler]) -> dict[Digest, tuple[str, ...]]:
    """Return, for each digest, the progress streams that its handlers name, where there are any."""
    found: dict[Digest, dict[str, None]] = {}
    for handler in handlers:
        if handler.progress is not None:
            found.setdefault(handler.digest, {})[handler.progress] = None
    return {digest: tuple(streams) for digest, streams in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a transfer came to: the blob is in S3, verified, not yet committed."""

    blob: BlobRecord
    bytes_fetched: int
    source: str
    #: Whose credentials were used last, and their handle; None and "" where it was the farm itself.
    caller: Caller | None = None
    credential: str = ""


class Transfers(Protocol):
    """Performs transfers; implemented over threads in ``storage``."""

    async def fetch(
        self,
        descriptor: Descriptor,
        callers: Callable[[], Sequence[Caller]],
        fence: Fence,
        upload: UploadState | None,
        report: Callable[[int, int], None],
    ) -> Fetched:
        """Bring the blob into the content store, with the credentials of any of *callers*.

        Cancelling stops it and waits until it has stopped; an unfinished upload is left for a successor.

        Raises:
            SessionGoneError: credentials were needed and no caller is left that could answer.
            NeedsRemoteProvidersError: no caller has a provider for it.
            ClusterError: no source has it right.
        """
        ...

    def settle(self, fetched: Fetched, *, committed: bool) -> None:
        """Keep (committed) or drop what the transfer left on this node's disk."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """How a blob came to be present, as one process saw it."""

    blob: BlobRecord
    bytes_fetched: int
    source: str
    #: True where another process's flight, or an earlier one, brought it.
    elsewhere: bool
    #: The span under which it was waited for, or fetched.
    trace: str = ""


#: Seconds from one look for another's flight to the next, times the number of fetches that wait for a slot.
_LOOK_PACE_S = 0.1


@dataclass(frozen=True, slots=True)
class _Turn:
    """The flight is ours, and a slot to fetch in."""

    owned: Owned
    slot: Ask


class _OwnershipLostError(Exception):
    """This process owns the flight no more: join again. Never leaves this module."""


class _Ownership:
    """One flight that this process owns, run in a task of its own until it is over."""

    def __init__(self, owned: Owned) -> None:
        self.fence: Fence = owned.fence
        self.upload: UploadState | None = owned.upload
        self.task: asyncio.Task[_Arrival] | None = None
        #: True once the renewer found that another owns the flight, or may by now.
        self.is_lost = False
        #: True once the flight is told how it ended: then there is nothing left to stop.
        self.is_ending = False
        #: When it began to transfer; None: not yet.
        self.began_s: float | None = None
        #: Callers whose credentials the transfer could use, in the order in which they came.
        self.asked: dict[Caller, None] = {}
        self._loop = asyncio.get_running_loop()

    def lose_from_thread(self) -> None:
        """End the task: what it does from now on would be in vain."""
        self._loop.call_soon_threadsafe(self._lose)

    def _lose(self) -> None:
        self.is_lost = True
        # t=0  the transfer fails; the flight is being told, and Redis does not answer
        # t=1  the renewer gives the flight up: a cancellation now would be one that nobody asked for
        if self.task is not None and not self.is_ending:
            self.task.cancel()


class Unlazier:
    """Makes sure that blobs are in the content store, each fetched once for the whole cluster."""

    def __init__(
        self,
        *,
        worker: str,
        refs: RefStore,
        flights: FlightStore,
        renewer: FlightRenewer,
        progress: ProgressStore,
        transfers: Transfers,
        access: Admission,
        new_token: Callable[[], str],
        ttl_s: float,
        poll_s: float,
        deadline_s: float,
        max_transfers: int,
        clock: Callable[[], float],
        disk: NodeDisk | None = None,
        audit: AuditNotes | None = None,
    ) -> None:
        self._worker = worker
        self._refs = refs
        self._store = flights
        self._renewer = renewer
        self._progress = progress
        self._transfers = transfers
        self._access = access
        self._new_token = new_token
        self._ttl_s = ttl_s
        self._poll_s = poll_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._disk = disk or BoundlessDisk()
        self._audit = audit or NoAudit()
        self._flights: Flights[_Arrival, Caller] = Flights("unlazy")
        self._slots = FairSlots(max_transfers)
        #: Layers of an image are wanted together, and come home together: one request to Redis for many of them.
        self._looks: Together[None, Digest, BlobRecord | None] = Together(lambda _all, digests: refs.blobs(digests))
        self._pins: Together[LeaseId, Digest, BlobRecord | None] = Together(
            lambda lease_id, digests: refs.hold_blobs(digests, lease_id=lease_id)
        )
        self._background: set[asyncio.Task[Any]] = set()

    async def unlazy(self, descriptor: Descriptor, caller: Caller) -> LayerFetch:
        """Make the blob present and pin it in the caller's own lease.

        Raises:
            NeedsRemoteProvidersError: it is lazy and no provider can be used any more; or it came from
                elsewhere, and this caller's repositories don't have it.
            DeadlineExceededError: it took longer than the flight deadline.
            LeaseLostError: the caller's lease is gone; the blob is present all the same.
            ClusterError: no source has it right.
        """
        fetch, _ = await self.bring(descriptor, caller)
        return fetch

    async def bring(self, descriptor: Descriptor, caller: Caller) -> tuple[LayerFetch, BlobRecord]:
        """Do what :meth:`unlazy` does, and return the blob, too."""
        about: tracing.Attributes = {tracing.BLOB: descriptor.digest, "lazyfarm.blob.size": descriptor.size_bytes}
        with tracing.span("unlazy", about) as span:
            fetch, blob = await self._unlazy(descriptor, caller, span)
            span.put(
                {
                    "lazyfarm.source": fetch.source,
                    "lazyfarm.joined": fetch.joined,
                    "lazyfarm.fetched_bytes": fetch.bytes_fetched,
                }
            )
            return fetch, blob

    async def _unlazy(self, descriptor: Descriptor, caller: Caller, span: Span) -> tuple[LayerFetch, BlobRecord]:
        digest = descriptor.digest
        started_s = self._clock()
        item = _Item(self._progress, caller.streams(digest), digest, descriptor.size_bytes, self._spawn)
        try:
            async with asyncio.timeout(self._deadline_s):
                blob, outcome = await self._bring_and_pin(descriptor, caller, item)
        except TimeoutError as exc:
            error = DeadlineExceededError(f"unlazy of {digest}", f"not done after {self._deadline_s:.0f} s")
            self._note_failure(descriptor, caller, error, started_s)
            await item.end(LayerPhase.FAILED, str(error))
            raise error from exc
        except asyncio.CancelledError as exc:
            self._note_failure(descriptor, caller, exc, started_s)
            self._spawn(item.end(LayerPhase.CANCELLED))
            raise
        except ClusterError as exc:
            self._note_failure(descriptor, caller, exc, started_s)
            await item.end(LayerPhase.FAILED, str(exc))
            raise
        if outcome is None:
            self.note(descriptor, caller, "present", "s3", self._clock() - started_s)
            await item.end(LayerPhase.PRESENT)
            fetch = LayerFetch(
                digest=digest, source="present", bytes_fetched=0, seconds=self._clock() - started_s, joined=False
            )
            return fetch, blob
        arrival = outcome.value
        joined = outcome.joined or arrival.elsewhere
        how = "joined" if joined else "fetched"
        self.note(descriptor, caller, how, arrival.source, self._clock() - started_s)
        if outcome.joined:
            span.link(arrival.trace)
        await item.end(LayerPhase.JOINED if joined else LayerPhase.DONE, arrival.source)
        fetch = LayerFetch(
            digest=digest,
            source=arrival.source,
            bytes_fetched=0 if joined else arrival.bytes_fetched,
            seconds=self._clock() - started_s,
            joined=joined,
        )
        return fetch, blob

    async def _bring_and_pin(
        self, descriptor: Descriptor, caller: Caller, item: _Item
    ) -> tuple[BlobRecord, FlightOutcome[_Arrival] | None]:
        """Make the blob present and pin it; return it, and what its flight came to, None where it was present."""
        digest = descriptor.digest
        while True:
            blob = await self._looks.ask(None, digest)
            outcome = None
            if blob is not None:
                await self.admit(descriptor, caller, blob.source)
            else:
                item.moved(LayerPhase.WAITING, 0)
                key = f"blob:{digest}"
                # Its flight may be far back in the line of another, who has thousands.
                self._slots.also_for(key, caller.tenant)
                outcome = await self._flights.run(
                    key,
                    lambda context: self._fly(descriptor, context),
                    caller=caller,
                    on_progress=lambda current, _total: item.moved(LayerPhase.FETCHING, current),
                )
                # Whose credentials brought it says nothing of this caller's access.
                await self.admit(descriptor, caller, outcome.value.blob.source)
                await ahit(FaultPoint.PIN_BEFORE)
            # t=0  the blob is seen to be present, and nobody holds it (any more)
            # t=1  it is collected
            # t=2  it would be pinned: so that step looks again, and pins only what is there
            held = await self._try_pin(caller, digest)
            if held is not None:
                return held, outcome

    def note(self, blob: Descriptor, caller: Caller, outcome: str, source: str, seconds: float) -> None:
        """Note in the audit stream how a caller got *blob*."""
        entry = caller.entry(Operation.UNLAZY, blob)
        self._audit.note(replace(entry, outcome=outcome, source=source, seconds=seconds))

    def _note_failure(self, blob: Descriptor, caller: Caller, error: BaseException, started_s: float) -> None:
        entry = caller.entry(Operation.UNLAZY, blob)
        seconds = self._clock() - started_s
        self._audit.note(replace(entry, outcome=outcome_of(error), error=error_of(error), seconds=seconds))

    async def admit(self, descriptor: Descriptor, caller: Caller, came_from: str) -> None:
        """Let *caller* have the blob's bytes; see :class:`cluster.fetch.access.Admission`."""
        await self._access.admit(caller.authorizer, descriptor, caller.providers.get(descriptor.digest, ()), came_from)

    async def aclose(self) -> None:
        """Stop every flight of this process; others take over what they still need."""
        with contextlib.suppress(DeadlineExceededError):
            await self._flights.aclose(5.0)
        for task in list(self._background):
            task.cancel()
        if self._background:
            await asyncio.wait(self._background, timeout=5.0)

    # -- the cluster's flight ----------------------------------------------------------------------

    async def _fly(self, descriptor: Descriptor, context: FlightContext[Caller]) -> _Arrival:
        """Take part in the cluster's flight, as a part of the trace of the caller that came first."""
        with tracing.span("flight", {tracing.BLOB: descriptor.digest}) as span:
            arrival = await self._take_part(descriptor, context)
            span.put({"lazyfarm.flight.role": "waiter" if arrival.elsewhere else "owner"})
            return replace(arrival, trace=span.traceparent)

    async def _take_part(self, descriptor: Descriptor, context: FlightContext[Caller]) -> _Arrival:
        """Join or own the cluster's flight until the blob is present, or the flight this waited for failed."""
        key = f"blob:{descriptor.digest}"
        async with contextlib.AsyncExitStack() as room:
            has_waited = False
            outcome: _Turn | Elsewhere | None = None
            while True:
                match outcome:
                    case None:
                        outcome = await self._turn(key, context)
                    case Present(blob=blob):
                        return _Arrival(blob=blob, bytes_fetched=0, source="present", elsewhere=True)
                    case _Turn():
                        try:
                            with contextlib.suppress(_OwnershipLostError):
                                return await self._own(descriptor, outcome, context)
                        except NodeDiskError:
                            if has_waited:
                                raise
                            # Not as its owner: another node, which has room, may fetch it meanwhile.
                            has_waited = True
                            await self._wait_for_room(descriptor, room)
                        outcome = None
                    case Joined():
                        await ahit(FaultPoint.FLIGHT_JOINED)
                        ended = await self._wait(key, outcome, context)
                        if isinstance(ended, _Arrival):
                            return ended
                        outcome = ended
                    case Aborting(fence_number=number, lease_remaining_s=remaining_s):
                        await self._wait_end(key, number, remaining_s)
                        outcome = None
                    case _:
                        assert_never(outcome)

    async def _wait_for_room(self, blob: Descriptor, room: contextlib.AsyncExitStack) -> None:
        """Wait for room on this node's disk, and leave it to *room*; or until another node has brought the blob.

        Raises:
            NodeDiskError: neither came.
        """
        reserving = asyncio.create_task(room.enter_async_context(self._reserved(blob)))
        try:
            while not reserving.done():
                if (await self._refs.blobs([blob.digest]))[0] is not None:
                    return
                await asyncio.wait([reserving], timeout=self._poll_s)
        finally:
            if not reserving.done():
                reserving.cancel()
                await asyncio.wait([reserving])
        reserving.result()

    def _reserved(self, blob: Descriptor) -> contextlib.AbstractAsyncContextManager[None]:
        """Wait for room on this node's disk, and hold it for the body."""

        async def on_wait(_said: str) -> None:
            """Say nothing: the item has been waiting from the start."""

        part = Part.of_blob(blob.digest, blob.size_bytes)
        return self._disk.reserved(f"fetching {blob.digest}", [part], on_wait)

    async def _turn(self, key: str, context: FlightContext[Caller]) -> _Turn | Elsewhere:
        """Own the flight, with a slot to fetch in; or return where else the blob is, or comes from.

        Nobody owns what it has no slot for: a node with a free one takes it meanwhile, and an owner that dies
        leaves few flights behind, so that few of those who wait find out at the same moment.
        """
        slot = self._slots.ask(key, (caller.tenant for caller in context.callers))
        is_kept = False
        try:
            with tracing.span("wait for a slot"):
                while not slot.granted.done():
                    if (elsewhere := await self._join_another(key)) is not None:
                        return elsewhere
                    await asyncio.wait([slot.granted], timeout=max(self._poll_s, self._slots.waiting * _LOOK_PACE_S))
            outcome = await self._store.join(key, worker=self._worker, token=self._new_token(), ttl_s=self._ttl_s)
            if not isinstance(outcome, Owned):
                return outcome
            is_kept = True
            return _Turn(outcome, slot)
        finally:
            if not is_kept:
                self._slots.leave(slot)

    async def _join_another(self, key: str) -> Elsewhere | None:
        return await self._store.join_another(key, worker=self._worker, ttl_s=self._ttl_s)

    async def _wait(self, key: str, joined: Joined, context: FlightContext[Caller]) -> _Arrival | Elsewhere | None:
        """Wait for another process's flight; where it ended without an outcome, return what joining again came to.

        Raises:
            ClusterError: the flight failed while we waited for it.
        """
        context.report(joined.current_bytes, joined.total_bytes)
        tracing.current().link(joined.trace)
        self._renewer.keep_waiting(key, worker=self._worker, ttl_s=self._ttl_s)
        began_s = self._clock()
        try:
            ended = await self._hear_end(key, joined, context)
        except asyncio.CancelledError:
            await asyncio.shield(self._spawn(self._leave(key)))
            raise
        finally:
            self._renewer.drop_waiting(key)
            FLIGHT_WAIT_SECONDS.add(self._clock() - began_s)
        match ended:
            case Committed(blob=blob):
                return _Arrival(blob=blob, bytes_fetched=0, source=f"flight of {joined.owner}", elsewhere=True)
            case Failed(error=error):
                raise decode_error(error)
            case Vacated():
                return None
            case _:
                return ended

    async def _hear_end(
        self, key: str, joined: Joined, context: FlightContext[Caller]
    ) -> Committed | Failed | Vacated | Elsewhere | None:
        """Listen until the flight under that fence ends; return how, or what joining again came to instead.

        A look at a flight that goes on costs one operation, to join it again: thousands of nodes wait for dozens of
        layers each, and what they ask meanwhile is what a farm's Redis has to do most of.
        """
        async with self._store.events(key) as events:
            # What ended between the join and the subscription was not heard.
            ended = await self._store.outcome(key, joined.fence_number)
            due_s = self._due_s(joined)
            while ended is None:
                try:
                    async with asyncio.timeout(max(0.01, due_s - self._clock())):
                        event = await anext(events)
                except (TimeoutError, StopAsyncIteration):
                    again = await self._join_another(key)
                    if not isinstance(again, Joined) or again.fence_number != joined.fence_number:
                        return await self._unheard_end(key, joined, again)
                    due_s = self._due_s(again)
                    continue
                if event.fence_number != joined.fence_number:
                    continue
                if not isinstance(event, Progressed):
                    return event
                context.report(event.current_bytes, event.total_bytes)
            return ended

    def _due_s(self, joined: Joined) -> float:
        """Return when to look at a flight that nothing is heard of."""
        return self._clock() + min(self._poll_s, joined.lease_remaining_s + 0.05)

    async def _unheard_end(
        self, key: str, joined: Joined, again: Elsewhere | None
    ) -> Committed | Failed | Elsewhere | None:
        """Return how the flight that was waited for ended, where that is known, else what joining again came to."""
        ended = await self._store.outcome(key, joined.fence_number)
        return ended if isinstance(ended, Committed | Failed) else again

    async def _leave(self, key: str) -> None:
        """Stop waiting. Whether the work goes on is the owner's affair: it may have callers of its own."""
        with contextlib.suppress(ClusterError):
            await self._store.leave(key, worker=self._worker)

    async def _wait_end(self, key: str, fence_number: int, remaining_s: float) -> None:
        """Wait until the flight under that fence is over, at most until its owner's lease has lapsed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(remaining_s + 0.1), self._store.events(key) as events:
                if await self._store.outcome(key, fence_number) is not None:
                    return
                async for event in events:
                    if event.fence_number == fence_number and not isinstance(event, Progressed):
                        return

    # -- owning ------------------------------------------------------------------------------------

    async def _own(self, descriptor: Descriptor, turn: _Turn, context: FlightContext[Caller]) -> _Arrival:
        """Run the flight in a task of its own and wait for it; leaving it alone if others wait."""
        ownership = _Ownership(turn.owned)
        ownership.task = asyncio.create_task(self._run_owned(descriptor, ownership, context))
        ownership.task.add_done_callback(lambda _: self._slots.leave(turn.slot))
        self._track(ownership.task)
        try:
            return await asyncio.shield(ownership.task)
        except asyncio.CancelledError:
            if not ownership.task.done():
                await self._abandon(ownership)
            raise

    async def _abandon(self, ownership: _Ownership) -> None:
        """The last local caller left: stop, unless another process waits; then go on for it, and keep asking."""
        looked = asyncio.Event()
        self._spawn(self._stop_when_unwanted(ownership, looked))
        await looked.wait()

    async def _stop_when_unwanted(self, ownership: _Ownership, looked: asyncio.Event) -> None:
        """Stop the work as soon as nobody waits for it; *looked* is set after the first look."""
        try:
            while not await self._stop_if_unwanted(ownership):
                looked.set()
                if ownership.task is not None:
                    await asyncio.wait({ownership.task}, timeout=self._poll_s)
        finally:
            looked.set()

    async def _stop_if_unwanted(self, ownership: _Ownership) -> bool:
        task = ownership.task
        if task is None or task.done():
            return True
        try:
            unwanted = await self._store.abort_if_unwanted(ownership.fence)
        except StaleFenceError:
            unwanted = True
        except ClusterError:
            unwanted = False
        if not unwanted:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _run_owned(
        self, descriptor: Descriptor, ownership: _Ownership, context: FlightContext[Caller]
    ) -> _Arrival:
        """Fetch, commit and end the flight; whatever happens, the flight is told of it."""
        fence = ownership.fence
        await ahit(FaultPoint.FLIGHT_OWNED)
        self._renewer.keep(fence, ttl_s=self._ttl_s, on_lost=ownership.lose_from_thread)
        try:
            return await self._fetch_and_commit(descriptor, ownership, context)
        except (StaleFenceError, _OwnershipLostError) as exc:
            raise _OwnershipLostError from exc
        except asyncio.CancelledError as exc:
            await self._end(ownership, self._store.vacate(fence, entry=self._given_up(descriptor, ownership, exc)))
            if ownership.is_lost:
                raise _OwnershipLostError from None
            raise
        except (AccessDeniedError, NeedsRemoteProvidersError, SessionGoneError) as exc:
            # Our callers may not, or can't answer any more; a waiter elsewhere may: it takes over and resumes.
            await self._end(ownership, self._store.vacate(fence, entry=self._given_up(descriptor, ownership, exc)))
            if any(caller.is_live() for caller in context.callers if caller not in ownership.asked):
                raise _OwnershipLostError from exc  # somebody joined meanwhile whose credentials weren't tried
            if isinstance(exc, SessionGoneError):
                raise NeedsRemoteProvidersError((descriptor.digest,)) from exc
            raise
        except NodeDiskError as exc:
            # Nobody else's affair: a waiter on another node takes over and resumes.
            await self._end(ownership, self._store.vacate(fence, entry=self._given_up(descriptor, ownership, exc)))
            raise
        except ClusterError as exc:
            entry = replace(self._given_up(descriptor, ownership, exc), outcome="failed")
            await self._end(ownership, self._store.fail(fence, encode_error(exc), entry=entry))
            raise
        except Exception as exc:
            # Our bug: nobody shall wait until the lease lapses, only to meet it again.
            error = InternalError(f"unlazy of {descriptor.digest}: {type(exc).__name__}: {exc}")
            entry = replace(self._given_up(descriptor, ownership, exc), outcome="failed")
            await self._end(ownership, self._store.fail(fence, encode_error(error), entry=entry))
            raise error from exc
        finally:
            self._renewer.drop(fence)

    async def _fetch_and_commit(
        self, descriptor: Descriptor, ownership: _Ownership, context: FlightContext[Caller]
    ) -> _Arrival:
        fence = ownership.fence

        def callers() -> Sequence[Caller]:
            ownership.asked.update(dict.fromkeys(context.callers))
            return context.callers

        ownership.began_s = self._clock()
        with tracing.span("transfer", {tracing.BLOB: descriptor.digest}) as span:
            fetched = await self._transfers.fetch(descriptor, callers, fence, ownership.upload, context.report)
            span.put({"lazyfarm.source": fetched.source, "lazyfarm.fetched_bytes": fetched.bytes_fetched})
        is_committed = False
        try:
            await ahit(FaultPoint.COMMIT_BEFORE)
            # t=0  the store commits, and forgets the flight; its answer is on its way
            # t=1  a renewal finds no flight: that is not a loss, and the commit itself says if it came too late
            ownership.is_ending = True
            await self._store.commit(fence, fetched.blob, entry=self._attempt(descriptor, ownership, fetched))
            is_committed = True
        except UnavailableError as exc:
            if ownership.is_lost:
                raise _OwnershipLostError from exc
            raise
        finally:
            self._transfers.settle(fetched, committed=is_committed)
        await ahit(FaultPoint.COMMIT_AFTER)
        return _Arrival(blob=fetched.blob, bytes_fetched=fetched.bytes_fetched, source=fetched.source, elsewhere=False)

    def _given_up(self, blob: Descriptor, ownership: _Ownership, error: BaseException) -> AuditEntry:
        return replace(self._attempt(blob, ownership), outcome="vacated", error=error_of(error))

    def _attempt(self, blob: Descriptor, ownership: _Ownership, fetched: Fetched | None = None) -> AuditEntry:
        """Return what the audit stream should know of an owner's attempt, at its end."""
        caller = (fetched and fetched.caller) or next(iter(ownership.asked), None)
        entry = (
            AuditEntry(operation=Operation.FETCH, digest=blob.digest, size_bytes=blob.size_bytes)
            if caller is None
            else caller.entry(Operation.FETCH, blob)
        )
        if fetched is not None:
            entry = replace(
                entry,
                outcome="committed",
                credential=fetched.credential,
                source=fetched.source,
                moved_bytes=fetched.bytes_fetched,
            )
        seconds = 0.0 if ownership.began_s is None else self._clock() - ownership.began_s
        return replace(entry, by=self._worker, fence=ownership.fence.number, seconds=seconds)

    async def _end(self, ownership: _Ownership, step: Coroutine[object, object, None]) -> None:
        """Tell the flight store how it ended; where that can't be told, the lease lapses and says so."""
        ownership.is_ending = True
        with contextlib.suppress(ClusterError, TimeoutError):
            async with asyncio.timeout(5.0):
                await step

    async def _try_pin(self, caller: Caller, digest: Digest) -> BlobRecord | None:
        """Pin the blob in the caller's lease and return it; None where it isn't present."""
        return await self._pins.ask(caller.lease_id, digest)

    def _spawn(self, work: Coroutine[object, object, object]) -> asyncio.Task[object]:
        task = asyncio.create_task(work)
        self._track(task)
        return task

    def _track(self, task: asyncio.Task[Any]) -> None:
        self._background.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: whoever waits has it already


class _Item:
    """One layer's progress item for one caller: moves, then ends exactly once."""

    def __init__(
        self,
        store: ProgressStore,
        streams: tuple[str, ...],
        digest: Digest,
        total_bytes: int,
        spawn: Callable[[Coroutine[object, object, object]], asyncio.Task[object]],
    ) -> None:
        self._store = store
        self._streams = streams
        self._digest = digest
        self._total_bytes = total_bytes
        self._spawn = spawn
        self._last: asyncio.Task[object] | None = None

    def moved(self, phase: LayerPhase, current_bytes: int) -> None:
        """Publish where the item stands, unless the last publication is still under way."""
        if self._streams and (self._last is None or self._last.done()):
            self._last = self._spawn(self._publish(phase, current_bytes, ""))

    async def end(self, phase: LayerPhase, detail: str = "") -> None:
        """Publish the end, after whatever was published before."""
        if not self._streams:
            return
        if self._last is not None:
            await asyncio.wait({self._last})
        done = 0 if phase in (LayerPhase.CANCELLED, LayerPhase.FAILED) else self._total_bytes
        await self._publish(phase, done, detail)

    async def _publish(self, phase: LayerPhase, current_bytes: int, detail: str) -> None:
        await self._store.publish(
            self._streams,
            ProgressItem(
                item=f"fetch:{self._digest}",
                phase=phase,
                current_bytes=current_bytes,
                total_bytes=self._total_bytes,
                detail=detail,
            ),
        )
