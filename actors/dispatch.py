"""Ops of builds, by who does them: images and merges here, without a byte moving; all others on a node that is chosen.

Implements :class:`cluster.solver.ports.OpRunner` for a scheduler. A node's fetch worker brings the inputs, its op
worker does the op and publishes what it came to. A worker that dies is replaced by another, or by itself restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import structlog

from actors.boot import Stores, new_token
from actors.handles import OpWorkerHandle
from actors.holds import Holds
from actors.job_sessions import JobSessions, WorkSession
from actors.placement import Placement
from actors.remote_caches import RemoteCaches
from actors.workers import RETRY_PAUSE_S, RETRY_S, Workers
from cluster import tracing
from cluster.cache.origins import origin_of, origins_of
from cluster.cache.runner import usable_providers
from cluster.config import Config
from cluster.digest import Digest, digest_of
from cluster.errors import (
    ActorLostError,
    BlobNotFoundError,
    ClusterError,
    ContainerError,
    InternalError,
    MissingSecretError,
    NeedsRemoteProvidersError,
    NodeDiskError,
    NodeNotFoundError,
    OpError,
    SessionGoneError,
    SnapshotError,
    StaleFenceError,
    first_error,
)
from cluster.flight.values import Aborting, Failed, Fence, Joined, Owned, Present, Progressed
from cluster.graph import DiffOp, FileOp, ImageOp, MergeOp, RunOp, Vertex, content_inputs, encode_vertex, op_digest
from cluster.job import JobId, layer_stream
from cluster.lease import LeaseId
from cluster.messages import ExtractRequest, ResolveRequest, ResolveResult
from cluster.op_messages import ContentKeyRequest, RunOpRequest, WatchOpRequest
from cluster.origin import merge_origins
from cluster.ports import FlightRenewer
from cluster.provider import FARM, DescHandler
from cluster.ref import RefId, RefRecord, RefState
from cluster.solver.ports import KeyStore, OpResult, VertexUse
from cluster.solver.values import CacheMap, CacheRecord, Exportable, HoldId, Result
from cluster.wire import decode, decode_error, encode, encode_error

T = TypeVar("T")

#: Does an op; sets the event while a worker has it.
_Work = Callable[[asyncio.Event], Awaitable[Result]]

log = structlog.get_logger()

#: Workers that one op may lose: one that it takes down with it is no bad luck the third time.
_MAX_LOST = 3
#: Seconds between looks at who else an op is done for.
_LOOK_S = 1.0
_CALL_S = 60.0

#: What another node, or the same one later, may do better.
_ELSEWHERE = (ActorLostError, NodeNotFoundError, NodeDiskError, SnapshotError)


class OpDispatcher:
    """Carries ops out for one scheduler.

    Args:
        name: Of the scheduler's process.
        config: The farm's.
        stores: Its adapters.
        keys: Where results are looked up and published.
        sessions: Who answers for jobs.
        holds: What is held for uses of vertices.
        renewer: Renews flights.
        placement: Says where.
        workers: Do it.
        caches: Remote caches that jobs name.
        published: What a job's vertices published of some cache opts (:meth:`cluster.solver.runner.Solver.cache_opts`).
    """

    def __init__(
        self,
        *,
        name: str,
        config: Config,
        stores: Stores,
        keys: KeyStore,
        sessions: JobSessions,
        holds: Holds,
        renewer: FlightRenewer,
        placement: Placement,
        workers: Workers,
        caches: RemoteCaches,
        published: Callable[[JobId, Digest, Sequence[str]], Mapping[str, bytes]],
    ) -> None:
        self._name = name
        self._config = config
        self._stores = stores
        self._keys = keys
        self._sessions = sessions
        self._holds = holds
        self._renewer = renewer
        self._placement = placement
        self._workers = workers
        self._caches = caches
        self._published = published
        #: Images as jobs have resolved them, by job.
        self._resolved: dict[JobId, dict[Digest, ResolveResult]] = {}
        #: What is done under flights, by hold: also what goes on when its jobs have gone.
        self._working: dict[HoldId, asyncio.Task[Result]] = {}

    def forget(self, job: JobId) -> None:
        """Forget what is known for the sake of a job that has ended."""
        self._resolved.pop(job, None)

    # -- the port ------------------------------------------------------------------------------------------------

    def try_cache_map(self, vertex: Vertex) -> CacheMap | None:
        """Return the cache map of any op but an image's."""
        if isinstance(vertex.op, ImageOp):
            return None
        return CacheMap(key=op_digest(vertex.op), slow_inputs=content_inputs(vertex.op))

    async def cache_map(self, job: JobId, vertex: Vertex) -> CacheMap:
        """Return an op's cache map; an image's manifest is read for it, with the job's own access."""
        if (known := self.try_cache_map(vertex)) is not None:
            return known
        resolved = await self._resolve(job, vertex)
        by_digest: dict[Digest, list[DescHandler]] = {}
        for handler in resolved.handlers:
            told = replace(handler, progress=layer_stream(job, vertex.digest))
            by_digest.setdefault(handler.digest, []).append(told)
        image = resolved.image
        return CacheMap(
            key=digest_of(f"image\n{image.manifest.digest}\n{image.platform}".encode()),
            opts={_opt(digest): encode("desc-handlers", handlers) for digest, handlers in by_digest.items()},
        )

    async def load(self, use: VertexUse, record: CacheRecord, opts: Mapping[str, bytes]) -> Result | None:
        """Hold a result, lazily, as one of the jobs that may use all of it."""
        result = record.result
        if self._caches.is_imported(record):
            return await self._caches.load(record, self._sessions.authorizer(_jobs(use)), await self._lease(use))
        if result.ref is not None:
            await self._stores.cache.get(
                RefId(result.ref),
                handlers=_handlers(opts),
                authorizer=self._sessions.authorizer(_jobs(use)),
                lease_id=await self._lease(use),
            )
        return result

    async def content_key(self, use: VertexUse, index: int, source: Result, opts: Mapping[str, bytes]) -> Digest:
        """Return the digest of what the op uses of an input, from a node that has it."""
        del opts  # what the vertices published is asked for by digest
        chain = await self._chain(source)
        session = self._sessions.asking(lambda: _jobs(use))

        async def on(node: str, patience: _DiskPatience) -> Digest:
            with patience.spent_in_vain():
                await self._bring(use, node, [chain], session, patience)
            worker = self._workers.op_worker(node)
            request = ContentKeyRequest(
                session=session.info,
                vertex=encode_vertex(use.vertex),
                index=index,
                input=_top(chain),
                lease_id=await self._lease(use),
                timeout_s=self._config.build.op_timeout_s,
            )
            async with session.at(worker):
                found = await worker.content_key(request, timeout_s=self._config.build.op_timeout_s + _CALL_S)
            return found.digest

        return await self._somewhere(use, [chain], session, on)

    async def run(
        self,
        use: VertexUse,
        inputs: Sequence[Result | None],
        keys: Sequence[Digest],
        opts: Mapping[str, bytes],
        *,
        ignores_cache: bool,
    ) -> OpResult:
        """Carry an op out, once at a time for the whole farm."""
        match use.vertex.op:
            case ImageOp():
                use.began()
                return OpResult(result=await self._publish(keys, await self._image(use)))
            case MergeOp():
                use.began()
                chains = [await self._chain(each) for each in inputs]
                made = await self._stack(use, [state for chain in chains for state in chain], opts)
                return OpResult(result=await self._publish(keys, _upon(inputs, made)))
            case DiffOp():
                lower, upper = [await self._chain(each) for each in inputs]
                if _ids(upper[: len(lower)]) == _ids(lower):
                    use.began()
                    made = await self._stack(use, upper[len(lower) :], opts, lower)
                    return OpResult(result=await self._publish(keys, Result(ref=made)))
            case _:
                pass
        if ignores_cache:
            stale = frozenset(await self._keys.lookup(keys))
            return OpResult(result=await self._on_some_node(use, inputs, keys, stale))
        return await self._once(use, keys, lambda running: self._on_some_node(use, inputs, keys, running=running))

    async def keep(self, job: JobId, vertex: Vertex, result: Result, opts: Mapping[str, bytes]) -> None:
        """Hold a target's result by the job's own lease."""
        del vertex
        if result.ref is not None:
            await self._stores.cache.get(
                RefId(result.ref),
                handlers=_handlers(opts),
                authorizer=self._sessions.authorizer([job]),
                lease_id=job_lease(job),
            )

    async def finish(self, job: JobId, exportables: Sequence[Exportable]) -> None:
        """Write the remote caches that the job names."""
        resolved = self._resolved.get(job, {}).values()
        handlers = [handler for image in resolved for handler in image.handlers]
        await self._caches.write(job, exportables, handlers, job_lease(job))

    async def has_lost(self, error: ClusterError) -> bool:
        """Tell whether *error* is for want of layers that builds made and that are gone: they can be made again."""
        match error:
            case NeedsRemoteProvidersError(digests=named):
                digests = [Digest(digest) for digest in named]
            case BlobNotFoundError(digest=named_one):
                digests = [Digest(named_one)]
            case _:
                return False
        try:
            stored, present = await asyncio.gather(
                self._stores.refs.providers(digests), self._stores.refs.blobs(digests)
            )
        except ClusterError:
            return False
        return any(FARM in known and blob is None for known, blob in zip(stored, present, strict=True))

    async def release(self, hold: HoldId) -> None:
        """Let go of what is held, once nothing runs any more that is done under it."""
        if (working := self._working.get(hold)) is not None:
            await asyncio.wait([working])
        await self._holds.release(str(hold))

    # -- images and chains -----------------------------------------------------------------------------------------

    async def _resolve(self, job: JobId, vertex: Vertex) -> ResolveResult:
        op = vertex.op
        if not isinstance(op, ImageOp):
            raise InternalError(f"vertex {vertex.digest} is resolved and no image")
        session = self._sessions.asking(lambda: [job])
        request = ResolveRequest(
            session=session.info,
            image=op.reference,
            platform=op.platform or None,
            plain_http=op.plain_http,
            lease_id=job_lease(job),
        )

        timeout_s = self._config.flight.deadline_s
        resolved: ResolveResult = await self._workers.on_any(
            lambda worker: session.calling(worker, worker.resolve_image(request, timeout_s=timeout_s))
        )
        self._resolved.setdefault(job, {})[vertex.digest] = resolved
        return resolved

    async def _image(self, use: VertexUse) -> Result:
        known = (self._resolved.get(job, {}).get(use.vertex.digest) for job in _jobs(use))
        resolved = next((found for found in known if found is not None), None)
        if resolved is None:
            resolved = await self._resolve(_jobs(use)[0], use.vertex)
        if not resolved.image.layers:
            return Result(ref=None, config=resolved.config)
        states = await self._stores.cache.get_by_blob(
            resolved.image.layers,
            parent=None,
            handlers=resolved.handlers,
            authorizer=self._sessions.authorizer(_jobs(use)),
            lease_id=await self._lease(use),
            image_ref=resolved.image.name,
        )
        return Result(ref=states[-1].record.id, config=resolved.config)

    async def _stack(
        self,
        use: VertexUse,
        layers: Sequence[RefState],
        opts: Mapping[str, bytes],
        below: Sequence[RefState] = (),
    ) -> RefId | None:
        """Make the refs of layers on top of one another, the first one lowest; no byte moves.

        *below* is what they stood on and don't any more: what was built on that is open by it all the same.
        """
        if not layers:
            return None
        authorizer = self._sessions.authorizer(_jobs(use))
        await usable_providers(self._stores.access, authorizer, layers, _handlers(opts))
        records: list[RefRecord] = []
        for layer in layers:
            old, origins = layer.record, layer.record.origins
            if origins and below:
                origins = await self._origins(use, [*below, layer], layers)
            record = RefRecord.over(old.blob, records[-1] if records else None)
            records.append(replace(record, image_refs=old.image_refs, description=old.description, origins=origins))
        states = await self._stores.refs.get_or_create(records, {}, lease_id=await self._lease(use))
        return states[-1].record.id

    async def _origins(self, use: VertexUse, states: Sequence[RefState], chain: Sequence[RefState]) -> tuple[str, ...]:
        """Return by what a layer that is made of *states* is open in *chain*: first by what it is to each of its jobs.

        Then by any other way in which *states* may be had: a job that comes to it while it is made may have that alone.
        """
        beside = {state.record.blob.digest for state in chain}
        origins: dict[str, None] = {}
        for job in _jobs(use):
            with contextlib.suppress(SessionGoneError):
                authorizer = self._sessions.authorizer([job])
                origins[await origin_of(self._stores.access, authorizer, states, beside=beside)] = None
        return merge_origins((), (*origins, *origins_of(states, beside=beside)))

    async def _as_brought(self, states: Sequence[RefState]) -> list[RefState]:
        """Return states that were lazy with the blobs that have come meanwhile: they say where their bytes are from."""
        lazy = list(dict.fromkeys(state.record.blob.digest for state in states if state.is_lazy))
        blobs = dict(zip(lazy, await self._stores.refs.blobs(lazy) if lazy else (), strict=True))
        return [replace(s, present=blobs[s.record.blob.digest]) if s.is_lazy else s for s in states]

    async def _chain(self, result: Result | None) -> list[RefState]:
        if result is None or result.ref is None:
            return []
        return await self._stores.refs.chain(RefId(result.ref))

    async def _publish(self, keys: Sequence[Digest], result: Result) -> Result:
        await self._keys.publish(keys, result)
        return result

    # -- once for the farm -----------------------------------------------------------------------------------------

    async def _once(self, use: VertexUse, keys: Sequence[Digest], work: _Work) -> OpResult:
        """Do *work* under a flight on the vertex; where another scheduler has done it meanwhile, take that.

        Raises:
            OpError: as *work* raises, here or where it was waited for.
            ClusterError: as *work* raises.
        """
        key = f"vertex:{use.vertex.digest}"
        flights, ttl_s = self._stores.flights, self._config.flight.lease_ttl_s
        is_waiting = False
        try:
            while True:
                outcome = await flights.join(key, worker=self._name, token=new_token(), ttl_s=ttl_s)
                match outcome:
                    case Owned(fence=fence):
                        is_waiting = False
                        return await self._owned(use, keys, work, fence)
                    case Joined() | Aborting():
                        if isinstance(outcome, Joined):
                            tracing.current().link(outcome.trace)
                        # Left in the end only: between two looks, too, the owner is to know of who waits.
                        is_waiting = True
                        await self._ended(key, outcome.fence_number, outcome.lease_remaining_s)
                    case Present():
                        raise InternalError(f"{key} is no blob")
        finally:
            if is_waiting:
                await asyncio.shield(_tried(flights.leave(key, worker=self._name)))

    async def _owned(self, use: VertexUse, keys: Sequence[Digest], work: _Work, fence: Fence) -> OpResult:
        flights = self._stores.flights
        self._renewer.keep(fence, ttl_s=self._config.flight.lease_ttl_s, on_lost=lambda: None)
        failure: OpError | None = None
        try:
            found = await self._found(use, keys)
            if found is not None:
                return OpResult(result=found, was_cached=True)
            return OpResult(result=await self._while_wanted(use, work, fence))
        except MissingSecretError:
            raise  # another's driver may give it
        except OpError as exc:
            failure = exc
            raise
        finally:
            self._renewer.drop(fence)
            # What the command itself came to is as true for those who wait; all else they try anew.
            end = flights.fail(fence, encode_error(failure)) if failure else flights.vacate(fence)
            await asyncio.shield(_tried(end))

    async def _while_wanted(self, use: VertexUse, work: _Work, fence: Fence) -> Result:
        """Do *work*; cancelled while a worker has it, go on for as long as other schedulers wait for it.

        All jobs of this scheduler that wanted it may have gone: those of others neither begin anew nor know of it.
        """
        running = asyncio.Event()
        working = self._working[use.hold] = asyncio.ensure_future(work(running))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            while running.is_set() and not working.done() and await self._is_waited_for(fence):
                await asyncio.wait([working], timeout=_LOOK_S)
            if working.done():
                return working.result()
            raise
        finally:
            working.cancel()
            await asyncio.wait([working])
            del self._working[use.hold]

    async def _is_waited_for(self, fence: Fence) -> bool:
        """Tell whether others wait for a flight; where nobody does, nobody may join it from now on."""
        try:
            return not await self._stores.flights.abort_if_unwanted(fence)
        except StaleFenceError:
            return False  # another owns it, and runs it
        except ClusterError:
            return True  # Redis is away: asked again in a moment

    async def _found(
        self, use: VertexUse, keys: Sequence[Digest], stale: Collection[CacheRecord] = ()
    ) -> Result | None:
        """Return a result that was published under one of *keys* since these were looked up, but for *stale* ones."""
        records = [record for record in await self._keys.lookup(keys) if record not in stale]
        for record in sorted(records, key=lambda record: record.created_wall_s, reverse=True):
            with contextlib.suppress(ClusterError):
                opts = await self._opts(use, record.result)
                if (found := await self.load(use, record, opts)) is not None:
                    return found
        return None

    async def _opts(self, use: VertexUse, result: Result) -> Mapping[str, bytes]:
        chain = await self._chain(result)
        return self._published(_jobs(use)[0], use.vertex.digest, [_opt(state.record.blob.digest) for state in chain])

    async def _ended(self, key: str, fence_number: int, remaining_s: float) -> None:
        """Wait until the flight under that fence has ended or its lease lapsed, or a little while.

        Raises:
            ClusterError: it failed while this waited.
        """
        flights = self._stores.flights
        try:
            with contextlib.suppress(TimeoutError, StopAsyncIteration):  # looked at anew by who joins again
                wait_s = min(self._config.flight.poll_s, remaining_s + 0.1)
                async with asyncio.timeout(wait_s), flights.events(key) as events:
                    ended = await flights.outcome(key, fence_number)
                    while ended is None:
                        event = await anext(events)
                        if event.fence_number == fence_number and not isinstance(event, Progressed):
                            ended = event
                    if isinstance(ended, Failed):
                        raise decode_error(ended.error)
        finally:
            await asyncio.shield(_tried(flights.leave(key, worker=self._name)))

    # -- on a node ---------------------------------------------------------------------------------------------------

    async def _on_some_node(
        self,
        use: VertexUse,
        inputs: Sequence[Result | None],
        keys: Sequence[Digest],
        stale: Collection[CacheRecord] = (),
        running: asyncio.Event | None = None,
    ) -> Result:
        """Run an op on a node; what is published under *keys* already, and won't do, is *stale*.

        *running* is set while a worker has it, which needs nothing more of its jobs then.
        """
        chains = [await self._chain(each) for each in inputs]
        session = self._sessions.asking(lambda: _jobs(use))
        config = next((each.config for each in inputs[:1] if each is not None), None)
        # A run's and a file op's layer comes on top of their first input; any other on nothing.
        below = chains[0] if isinstance(use.vertex.op, RunOp | FileOp) and chains else []
        others = [state for chain in chains if chain is not below for state in chain]
        lost = 0

        async def on(node: str, patience: _DiskPatience) -> Result:
            nonlocal lost
            if lost and (found := await self._found(use, keys, stale)) is not None:
                return found  # the worker that was lost had done it
            with patience.spent_in_vain():
                await self._bring(use, node, chains, session, patience)
            use.began(node)
            try:
                request = RunOpRequest(
                    session=session.info,
                    run_id=new_token(),
                    vertex=encode_vertex(use.vertex),
                    inputs=tuple(_top(chain) for chain in chains),
                    keys=tuple(keys),
                    config=config,
                    lease_id=await self._lease(use),
                    jobs=_jobs(use),
                    origins=await self._origins(use, await self._as_brought(others), below),
                    timeout_s=self._config.build.op_timeout_s,
                    disk_wait_s=patience.left_s,
                )
                if running is not None:
                    running.set()
                with patience.spent_in_vain():
                    ref = await self._run_at(use, node, request, session)
            except ActorLostError as exc:
                lost += 1
                if lost >= _MAX_LOST:
                    raise ContainerError("running an op", f"its worker died {lost} times meanwhile: {exc}") from exc
                raise
            finally:
                if running is not None:
                    running.clear()
            return Result(ref=ref, config=config)

        return await self._somewhere(use, chains, session, on)

    async def _run_at(self, use: VertexUse, node: str, request: RunOpRequest, session: WorkSession) -> RefId | None:
        worker = self._workers.op_worker(node)
        async with session.at(worker):
            watching = asyncio.create_task(self._watch(use, worker, request.run_id, set(request.jobs)))
            try:
                return (await worker.run_op(request, timeout_s=request.timeout_s + _CALL_S)).ref
            finally:
                watching.cancel()
                await asyncio.wait([watching])

    async def _watch(self, use: VertexUse, worker: OpWorkerHandle, run_id: str, told: set[JobId]) -> None:
        """Have what an op says told to jobs that come to it while it runs."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for job in use.beneficiaries():
                if job in told:
                    continue
                with contextlib.suppress(ClusterError):
                    if await worker.watch_op(WatchOpRequest(run_id=run_id, job=job), timeout_s=_CALL_S):
                        told.add(job)

    async def _bring(
        self,
        use: VertexUse,
        node: str,
        chains: Iterable[Sequence[RefState]],
        session: WorkSession,
        patience: _DiskPatience,
    ) -> None:
        """Have the snapshots of *chains* on a node, each once."""
        wanted = {chain[-1].record.id: chain for chain in chains if chain}
        if not wanted:
            return
        worker = self._workers.fetch_worker(node)
        lease_id = await self._lease(use)
        requests = [
            ExtractRequest(
                session=session.info,
                ref_id=ref_id,
                handlers=self._known_handlers(use, chain),
                lease_id=lease_id,
                mount=False,
                disk_wait_s=patience.left_s,
            )
            for ref_id, chain in wanted.items()
        ]
        async with session.at(worker):
            try:
                async with asyncio.TaskGroup() as group:
                    deadline_s = self._config.flight.deadline_s
                    tasks = [group.create_task(worker.extract(each, timeout_s=deadline_s)) for each in requests]
            except BaseExceptionGroup as errors:
                raise first_error(errors) from errors
        patience.waited(max(task.result().disk_waited_s for task in tasks))

    def _known_handlers(self, use: VertexUse, chain: Sequence[RefState]) -> tuple[DescHandler, ...]:
        """Return what the job's vertices published for a chain's layers: also whose progress their moving is."""
        digests = list(dict.fromkeys(state.record.blob.digest for state in chain))
        handlers = dict.fromkeys(self._caches.handlers(_jobs(use), digests))
        for job in _jobs(use):
            found = self._published(job, use.vertex.digest, [_opt(digest) for digest in digests])
            handlers |= dict.fromkeys(_handlers(found))
        return tuple(handlers)

    async def _somewhere(
        self,
        use: VertexUse,
        chains: Sequence[Sequence[RefState]],
        session: WorkSession,
        on: Callable[[str, _DiskPatience], Awaitable[T]],
    ) -> T:
        """Do something on the node that suits best; on the next best where that one fails to.

        It waits for room on disks once, not once on each node: when that time is over, each of the others is asked for
        what room it has.
        """
        patience = _DiskPatience(self._config.node.disk_wait_s)
        full: NodeDiskError | None = None
        give_up_s: float | None = None
        late = 0
        avoided: set[str] = set()
        while True:
            node, begun_s = "", time.monotonic()
            try:
                async with self._placement.placed(use.vertex.digest, chains, avoided) as node:
                    return await on(node, patience)
            except (*_ELSEWHERE, SessionGoneError) as exc:
                if isinstance(exc, SessionGoneError) and exc.session_id != session.info.session_id:
                    raise  # nobody is left that could answer; else it was this scheduler that was silent
                log.warning("op.again", vertex=use.vertex.digest, node=node, error=str(exc))
                now_s = time.monotonic()
                if now_s - begun_s > RETRY_S:
                    # It had gone well for long: the time for tries begins anew, though not for ever.
                    late += 1
                    give_up_s = None
                give_up_s = give_up_s or now_s + RETRY_S
                is_over = now_s > give_up_s or late >= _MAX_LOST
                if isinstance(exc, NodeDiskError):
                    full = full or exc  # the first says for how long it was waited
                    # One that was avoided is only given where there is no other.
                    if is_over or (patience.left_s == 0.0 and node in avoided):
                        raise full from None
                elif is_over:
                    raise
                avoided.add(node)
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _lease(self, use: VertexUse) -> LeaseId:
        return await self._holds.lease(str(use.hold), {"owner": "vertex", "vertex": use.vertex.digest})


class _DiskPatience:
    """For how long an op will still wait for room on a disk, of whichever node."""

    def __init__(self, wait_s: float) -> None:
        self.left_s = wait_s

    def waited(self, seconds: float) -> None:
        """Count seconds for which it waited."""
        self.left_s = max(0.0, self.left_s - seconds)

    @contextlib.contextmanager
    def spent_in_vain(self) -> Iterator[None]:
        """Count the time of a body that ends for want of room."""
        began_s = time.monotonic()
        try:
            yield
        except NodeDiskError:
            self.waited(time.monotonic() - began_s)
            raise


def job_lease(job: JobId) -> LeaseId:
    """Name the lease that holds a job's results."""
    return LeaseId(f"job-{job}")


def _jobs(use: VertexUse) -> tuple[JobId, ...]:
    return use.beneficiaries() or (use.job,)


def _opt(digest: Digest) -> str:
    """Name the cache opt with a digest's handlers, as :class:`cluster.errors.NeedsRemoteProvidersError` asks for it."""
    return f"desc-handler:{digest}"


def _handlers(opts: Mapping[str, bytes]) -> tuple[DescHandler, ...]:
    return tuple(
        handler for payload in opts.values() for handler in decode("desc-handlers", list[DescHandler], payload)
    )


def _ids(chain: Sequence[RefState]) -> list[RefId]:
    return [state.record.id for state in chain]


def _top(chain: Sequence[RefState]) -> RefId | None:
    return chain[-1].record.id if chain else None


def _upon(inputs: Sequence[Result | None], ref: RefId | None) -> Result:
    """Return a result with the config of the lowest input that has one."""
    config = next((each.config for each in inputs if each is not None and each.config is not None), None)
    return Result(ref=ref, config=config)


async def _tried(step: Awaitable[object]) -> None:
    """Take a last step; where it can't be taken, what it was to end lapses."""
    with contextlib.suppress(ClusterError):
        await step
