"""The op worker: a shell, one a node, around the ops of builds. The node's fetch worker brings it their inputs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from actors.boot import Boot, Starter, Stores, build_stores, new_token, node_root
from actors.op_log import OpLog
from actors.session_host import SessionServer
from actors.shell import answers
from cluster import tracing
from cluster.descriptor import Compression
from cluster.errors import ClusterError
from cluster.faultpoints import FaultPoint, ahit
from cluster.graph import decode_vertex
from cluster.metrics import OP_SECONDS, OPS
from cluster.op_messages import ContentKeyRequest, ContentKeyResult, RunOpRequest, RunOpResult, WatchOpRequest
from cluster.ref import RefId
from cluster.solver.values import Result
from cluster.wire import decode
from storage.blobs import S3ContentStore
from storage.cache_keys import RedisKeyStore
from storage.containers.runc import Runc
from storage.disk_ledger import DiskLedger
from storage.job_events import RedisJobEvents
from storage.keys import Keys
from storage.layer_upload import LayerStore
from storage.local_trees import LocalTrees
from storage.node_cache import NodeCache
from storage.node_roots import hold_node_root
from storage.op_performer import OpPerformer
from storage.presence import Presence
from storage.renewer import RedisFlightRenewer
from storage.snapshots import LayerLimits, choose

log = structlog.get_logger()

#: Threads for what blocks: files, mounts, S3.
_THREADS = 64


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Everything an op worker is made of."""

    stores: Stores
    performer: OpPerformer
    keys: RedisKeyStore
    events: RedisJobEvents
    #: Ops that run at once.
    slots: asyncio.Semaphore


class OpWorker(SessionServer):
    """One node's op worker."""

    def __init__(self, boot: bytes) -> None:
        super().__init__()
        self._starter = Starter(decode("boot", Boot, boot))
        self._parts: _Parts | None = None
        #: What the ops that run have said, by run.
        self._logs: dict[str, OpLog] = {}
        #: How many of them have a place.
        self._running = 0

    async def _started(self) -> _Parts:
        await self._starter.start(self._build)
        if self._parts is None:
            raise RuntimeError("started without parts")
        return self._parts

    async def _build(self) -> Presence:
        boot = self._starter.boot
        config = boot.config
        stores = build_stores(config, name=boot.name)
        keys = Keys(config.farm.name)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ops")
        # asyncio's own has six here, and an upload keeps one: ending a container must not wait for these.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="blocking"))
        root = node_root(boot)
        await asyncio.to_thread(hold_node_root, root)
        cache = await asyncio.to_thread(NodeCache, root / "cache", config.node.cache_bytes)
        containers = Runc(root / "containers")
        snapshotter = await asyncio.to_thread(
            choose, root / "snapshots", config.node.snapshotter, LayerLimits.of(config.node)
        )

        store = S3ContentStore(config.s3)
        with contextlib.suppress(ClusterError):
            # Making the client takes a second, which the first op need not wait for.
            await asyncio.to_thread(store.ensure_bucket)
        layers = LayerStore(
            worker=f"{boot.name}/{new_token()}",
            store=store,
            flights=stores.flights,
            renewer=RedisFlightRenewer(config.redis, keys),
            new_token=new_token,
            flight_ttl_s=config.flight.lease_ttl_s,
            part_bytes=config.fetch.part_bytes,
        )
        performer = OpPerformer(
            snapshotter=snapshotter,
            containers=containers,
            trees=LocalTrees(stores.link, keys, store, threads=threads),
            layers=layers,
            refs=stores.refs,
            leases=stores.leases,
            threads=threads,
            disk=DiskLedger(root, make_room=cache.make_room, wait_s=config.node.disk_wait_s),
            compression=Compression(config.build.compression),
        )

        def recover() -> list[str]:
            # Containers first: what still runs in one writes to what is removed next.
            return [*containers.recover(), *snapshotter.recover(), *performer.recover()]

        if left := await asyncio.to_thread(recover):
            log.info("node.recovered", removed=len(left))
        self._parts = _Parts(
            stores=stores,
            performer=performer,
            keys=RedisKeyStore(stores.link, keys),
            events=RedisJobEvents(stores.link, keys),
            slots=asyncio.Semaphore(config.build.ops_per_node),
        )
        self._show_ops()
        return stores.presence

    async def ready(self) -> bool:
        """Build what is needed and say so."""
        await self._started()
        return True

    # -- calls -----------------------------------------------------------------------------------------

    @answers("run-op", RunOpRequest)
    async def run_op(self, request: RunOpRequest) -> RunOpResult:
        """Carry an op out and publish what it came to, before anybody hears of it."""
        parts = await self._started()
        vertex = decode_vertex(request.vertex)
        started_s = time.monotonic()
        bound = log.bind(trace=request.session.trace, vertex=vertex.digest, op=vertex.kind)
        told = self._logs[request.run_id] = OpLog(vertex.digest, parts.events, request.jobs)

        self._show_ops()

        async def secret(secret_id: str) -> bytes | None:
            return await self._sessions.ask_secret(request.session, secret_id)

        try:
            async with self._sessions.serving(request.session), self._place(parts):
                with tracing.span("op", {tracing.VERTEX: vertex.digest, "lazyfarm.op": vertex.kind}):
                    ref = await parts.performer.run(
                        vertex,
                        request.inputs,
                        lease_id=request.lease_id,
                        secrets=secret,
                        log=told.tell,
                        timeout_s=request.timeout_s,
                        origins=request.origins,
                        disk_wait_s=request.disk_wait_s,
                    )
                await ahit(FaultPoint.RESULT_RECORDED)
                await parts.keys.publish(request.keys, Result(ref=ref, config=request.config))
                await ahit(FaultPoint.RESULT_PUBLISHED)
                await self._note_here(parts, ref)
        except BaseException as exc:
            OP_SECONDS.observe(time.monotonic() - started_s, op=vertex.kind, outcome="failed")
            bound.warning(
                "op.failed",
                error_type=type(exc).__name__,
                error=str(exc),
                elapsed_s=round(time.monotonic() - started_s, 3),
            )
            raise
        finally:
            del self._logs[request.run_id]
            self._show_ops()
        OP_SECONDS.observe(time.monotonic() - started_s, op=vertex.kind, outcome="ok")
        bound.info("op.complete", ref=ref or "", elapsed_s=round(time.monotonic() - started_s, 3))
        return RunOpResult(ref=ref)

    @contextlib.asynccontextmanager
    async def _place(self, parts: _Parts) -> AsyncIterator[None]:
        with tracing.span("wait for a place"):
            await parts.slots.acquire()
        self._running += 1
        self._show_ops()
        try:
            yield
        finally:
            self._running -= 1
            parts.slots.release()

    def _show_ops(self) -> None:
        OPS.set(self._running, state="running")
        OPS.set(len(self._logs) - self._running, state="waiting")

    async def _note_here(self, parts: _Parts, ref: RefId | None) -> None:
        """Say that this node has what was made, so that what is made of it comes here, too."""
        with contextlib.suppress(ClusterError):
            states = await parts.stores.refs.get([] if ref is None else [ref])
            chains = [state.record.chain for state in states if state is not None]
            await parts.stores.whereabouts.note_here(self._starter.boot.node, chains)

    @answers("watch-op", WatchOpRequest)
    async def watch_op(self, request: WatchOpRequest) -> bool:
        """Tell a further job what an op says; False where it runs no more."""
        await self._started()
        told = self._logs.get(request.run_id)
        if told is not None:
            await told.add(request.job)
        return told is not None

    @answers("content-key", ContentKeyRequest)
    async def content_key(self, request: ContentKeyRequest) -> ContentKeyResult:
        """Digest what an op uses of an input."""
        parts = await self._started()
        async with self._sessions.serving(request.session):
            digest = await parts.performer.content_key(
                decode_vertex(request.vertex), request.index, request.input, timeout_s=request.timeout_s
            )
        return ContentKeyResult(digest=digest)
