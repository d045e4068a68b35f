"""The fetch worker: a shell, one a node, around unlazy, extract, pull, assemble and push."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import structlog

from actors.attending import answer_by, attending
from actors.boot import Boot, Starter, Stores, build_stores, new_token, node_root
from actors.handles import CacheShardHandle
from actors.metrics import count_pulled, count_pushed, count_unlazied
from actors.node_collection import collect_node_forever
from actors.scrubbing import scrub_copies_forever, scrub_forever
from actors.session_host import SessionAuthorizer, SessionServer
from actors.shell import answers
from cluster.audit import Operation, error_of, fault_entry, handle_of, outcome_of
from cluster.audit_calls import call_entry, push_entries, read_entry
from cluster.cache.ring import ShardRing
from cluster.cache.runner import usable_providers
from cluster.cache_options import CacheKind, CacheTarget
from cluster.collect.verify import Verified
from cluster.config import Config
from cluster.descriptor import Descriptor
from cluster.digest import EMPTY_CHAIN, Digest
from cluster.errors import ClusterError, InternalError, LeaseLostError
from cluster.fair.quota import CallQuota
from cluster.fetch.assemble import Assembler
from cluster.fetch.bucket_cache import BucketPlace
from cluster.fetch.cache_export import CacheExporter, CachePlace, RegistryPlace
from cluster.fetch.cache_import import CacheImporter
from cluster.fetch.extract import Extractor
from cluster.fetch.keep import Keeper
from cluster.fetch.pull import Puller
from cluster.fetch.push import Pusher
from cluster.fetch.runner import Caller, Unlazier, progress_of
from cluster.lease import LeaseId
from cluster.messages import (
    AssembleRequest,
    ExportCacheRequest,
    ExportCacheResult,
    ExtractRequest,
    ExtractResult,
    GetByBlobRequest,
    ImportCacheRequest,
    ImportCacheResult,
    LayerFetch,
    NodePruneRequest,
    NodePruneResult,
    NodeUsageRequest,
    NodeUsageResult,
    PullRequest,
    PullResult,
    PushRequest,
    PushResult,
    ResolveRequest,
    ResolveResult,
    SessionInfo,
    UnlazyRequest,
    UnlazyResult,
    VerifyRequest,
)
from cluster.metrics import DISK_FREE_BYTES, DISK_SIZE_BYTES, NODE_CACHE_BYTES
from cluster.ports import Authorizer, Snapshotter
from cluster.provider import DescHandler, ProviderHandle
from cluster.ref import ImageRecord, RefId, RefRecord, RefState
from cluster.reference import ImageReference, Platform, default_platform, parse_platform, parse_reference
from cluster.traffic import blob_sizes, fetch_traffic, push_traffic
from cluster.wire import decode
from storage.blobs import S3ContentStore
from storage.containers.caches import Caches
from storage.disk_ledger import DiskLedger
from storage.fetching import StoredBlobs, ThreadedTransfers
from storage.keys import Keys
from storage.local_blobs import NodeBlobs
from storage.node_cache import NodeCache
from storage.node_collect import NodeCollector
from storage.node_roots import DeadNodes, hold_node_root
from storage.presence import Presence
from storage.registry.blob import BlobSource
from storage.renewer import RedisFlightRenewer
from storage.snapshots import LayerLimits, choose
from storage.transfer import TransferLimits
from storage.verifier import Verifier, verify_copies

log = structlog.get_logger()

#: Threads of the byte path: transfers and downloads, each bounded by what a node may have under way at once.
_BYTE_THREADS = 32
#: Threads of their own for unpacking: every layer has one, also while it waits for its parent, whose bytes
#: must never wait for a thread in turn.
_UNPACK_THREADS = 512
#: Layers among these that may go before their parents: more than images have, and not all threads.
_UNPACK_AHEAD = 256
#: Parts in memory at most, of all transfers together: 96 MiB of 8 MiB parts.
_PART_BUFFERS = 12
#: Threads of their own for verifying, which sleep to keep to a rate: two rounds in the background, and commands.
_VERIFY_THREADS = 4
_SHARD_TIMEOUT_S = 60.0
_SETTLE_EVERY_S = 60.0
#: For which a node's directory must be seen without a worker: far longer than bringing a node up takes.
_DEAD_NODE_S = 3600.0
_SHOW_DISK_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Everything a worker is made of."""

    config: Config
    stores: Stores
    ring: ShardRing
    renewer: RedisFlightRenewer
    threads: ThreadPoolExecutor
    blobs: NodeBlobs
    unlazier: Unlazier
    extractor: Extractor
    pusher: Pusher
    stored: StoredBlobs
    keeper: Keeper
    assembler: Assembler
    collector: NodeCollector
    cache: NodeCache
    verifier: Verifier
    verifiers: ThreadPoolExecutor


class FetchWorker(SessionServer):
    """One node's fetch worker."""

    def __init__(self, boot: bytes) -> None:
        super().__init__()
        self._starter = Starter(decode("boot", Boot, boot))
        self._quota = CallQuota(self._starter.boot.config.fetch.calls_per_node)
        self._starter.calls = lambda: self._quota.calls
        self._parts: _Parts | None = None

    # -- starting --------------------------------------------------------------------------------------

    async def _started(self) -> _Parts:
        await self._starter.start(self._build)
        if self._parts is None:
            raise RuntimeError("started without parts")
        return self._parts

    async def _build(self) -> Presence:
        boot = self._starter.boot
        config = boot.config
        loop = asyncio.get_running_loop()
        stores = build_stores(config, name=boot.name)
        with contextlib.suppress(ClusterError):  # hints, here and below
            await stores.whereabouts.forget_node(boot.node)
        threads = ThreadPoolExecutor(_BYTE_THREADS, thread_name_prefix="bytes")
        unpackers = ThreadPoolExecutor(_UNPACK_THREADS, thread_name_prefix="unpack")
        root = node_root(boot)

        def open_node() -> tuple[S3ContentStore, NodeCache, list[str]]:
            hold_node_root(root)
            cache = NodeCache(root / "cache", config.node.cache_bytes)
            left = cache.recover()
            store = S3ContentStore(config.s3)
            # Making the client takes a second, which the first caller need not wait for.
            with contextlib.suppress(ClusterError):
                store.ensure_bucket()
            return store, cache, left

        store, cache, left = await loop.run_in_executor(threads, open_node)
        snapshotter = await loop.run_in_executor(
            threads, choose, root / "snapshots", config.node.snapshotter, LayerLimits.of(config.node)
        )
        collector = NodeCollector(
            node=boot.node,
            root=root,
            snapshotter=snapshotter,
            cache=cache,
            caches=Caches.of_node(root / "containers"),
            refs=stores.refs,
            whereabouts=stores.whereabouts,
            now_wall_s=time.time,
        )
        disk = DiskLedger(root, make_room=collector.make_room, wait_s=config.node.disk_wait_s)
        left = [*left, *await loop.run_in_executor(threads, snapshotter.recover)]
        if left:
            log.info("node.recovered", removed=len(left))
        snapshots = await loop.run_in_executor(threads, lambda: list(snapshotter.snapshots()))
        with contextlib.suppress(ClusterError):
            await stores.whereabouts.note_here(boot.node, snapshots)
        blobs = NodeBlobs(
            cache,
            store,
            stores.refs,
            loop=loop,
            threads=threads,
            downloads=config.fetch.layers_per_node,
            disk=disk,
            audit=stores.audit,
        )
        renewer = RedisFlightRenewer(config.redis, Keys(config.farm.name))
        transfers = ThreadedTransfers(
            store=store,
            flights=stores.flights,
            sources=BlobSource(config),
            buckets=stores.buckets,
            limiter=stores.limiter,
            blobs=blobs,
            threads=threads,
            limits=TransferLimits(
                part_bytes=config.fetch.part_bytes,
                whole_up_to_bytes=config.fetch.whole_up_to_bytes,
                parallel_from_bytes=config.fetch.parallel_from_bytes,
                ranges=config.fetch.ranges_per_layer,
                attempts=config.fetch.attempts,
                retry_budget_s=config.fetch.retry_budget_s,
            ),
            buffers=_PART_BUFFERS,
        )
        unlazier = Unlazier(
            worker=f"{boot.node}/{new_token()}",
            refs=stores.refs,
            flights=stores.flights,
            renewer=renewer,
            progress=stores.progress,
            transfers=transfers,
            access=stores.access,
            new_token=new_token,
            ttl_s=config.flight.lease_ttl_s,
            poll_s=config.flight.poll_s,
            deadline_s=config.flight.deadline_s,
            max_transfers=config.fetch.layers_per_node,
            clock=time.monotonic,
            disk=disk,
            audit=stores.audit,
        )
        stored = StoredBlobs(store)
        keeper = Keeper(
            worker=boot.name,
            leases=stores.leases,
            flights=stores.flights,
            renewer=renewer,
            small=stored,
            new_token=new_token,
            flight_ttl_s=config.flight.lease_ttl_s,
        )
        verifiers = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="verify")
        verifier = Verifier(stores.refs, store, threads=verifiers, grace_s=config.collect.grace_s)
        self._parts = _Parts(
            config=config,
            stores=stores,
            ring=ShardRing(config.cache.shards),
            renewer=renewer,
            threads=threads,
            blobs=blobs,
            unlazier=unlazier,
            extractor=Extractor(
                node=boot.node,
                unlazier=unlazier,
                refs=stores.refs,
                progress=stores.progress,
                blobs=blobs,
                snapshotter=snapshotter,
                threads=unpackers,
                max_ahead=_UNPACK_AHEAD,
                deadline_s=config.flight.deadline_s,
                clock=time.monotonic,
                notes=stores.whereabouts,
                disk=disk,
            ),
            pusher=Pusher(
                target=stores.registry,
                unlazier=unlazier,
                refs=stores.refs,
                blobs=stored,
                arriving=blobs,
                progress=stores.progress,
                access=stores.access,
                spawn=self._starter.background.spawn,
            ),
            stored=stored,
            keeper=keeper,
            assembler=Assembler(
                refs=stores.refs,
                leases=stores.leases,
                access=stores.access,
                keeper=keeper,
                platform=default_platform(platform.machine()),
            ),
            collector=collector,
            cache=cache,
            verifier=verifier,
            verifiers=verifiers,
        )
        dead = DeadNodes(root, grace_s=_DEAD_NODE_S, clock=time.monotonic)
        self._starter.background.spawn(collect_node_forever(collector, dead, config.node))
        self._starter.background.spawn(scrub_forever(stores, config, verifier))
        self._starter.background.spawn(scrub_copies_forever(stores, config, cache, node=boot.node, threads=verifiers))
        self._starter.background.spawn(self._settle_forever(snapshotter, threads))
        self._starter.background.spawn(_show_disk_forever(cache, threads))
        return stores.presence

    async def _settle_forever(self, snapshotter: Snapshotter, threads: ThreadPoolExecutor) -> None:
        """Flush new snapshots to the disk now and then: until that, a reboot means unpacking them again."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SETTLE_EVERY_S)
            with contextlib.suppress(ClusterError):
                await loop.run_in_executor(threads, snapshotter.settle)

    async def ready(self) -> bool:
        """Build what is needed and say so."""
        await self._started()
        return True

    @contextlib.asynccontextmanager
    async def _serving(
        self, operation: str, info: SessionInfo, **fields: str
    ) -> AsyncIterator[tuple[SessionAuthorizer, dict[str, object]]]:
        """Serve one call, and log its canonical line, with what the body puts into the yielded figures.

        Raises:
            WorkerBusyError: the caller's share of calls is used up; it comes again.
        """
        with self._quota.call(info.tenant):
            async with self._admitted(operation, info, **fields) as served:
                yield served

    @contextlib.asynccontextmanager
    async def _admitted(
        self, operation: str, info: SessionInfo, **fields: str
    ) -> AsyncIterator[tuple[SessionAuthorizer, dict[str, object]]]:
        started_s = time.monotonic()
        bound = log.bind(trace=info.trace, session=info.session_id, **fields)
        bound.debug(f"{operation}.started")
        figures: dict[str, object] = {}
        try:
            async with self._sessions.serving(info) as authorizer:
                yield authorizer, figures
        except BaseException as exc:
            elapsed_s = time.monotonic() - started_s
            bound.warning(
                f"{operation}.failed", error_type=type(exc).__name__, error=str(exc), elapsed_s=round(elapsed_s, 3)
            )
            if self._parts is not None:
                failed = replace(call_entry(operation, info, **fields), outcome=outcome_of(exc), error=error_of(exc))
                self._parts.stores.audit.note(replace(failed, seconds=elapsed_s))
            raise
        bound.info(f"{operation}.complete", **figures, elapsed_s=round(time.monotonic() - started_s, 3))

    # -- calls -----------------------------------------------------------------------------------------

    def _puller(self, parts: _Parts, session: SessionInfo) -> Puller:
        return Puller(
            manifests=parts.stores.registry,
            access=parts.stores.access,
            refs=parts.stores.refs,
            small=parts.stored,
            keeper=parts.keeper,
            get_by_blob=_ShardRefs(parts, session, farm=parts.config.farm.name, version=self._starter.boot.version),
        )

    @answers("resolve", ResolveRequest)
    async def resolve_image(self, request: ResolveRequest) -> ResolveResult:
        """Read an image's manifest and config; see :meth:`cluster.fetch.pull.Puller.resolve`."""
        parts = await self._started()
        reference, wanted = _asked(request)
        async with self._serving("resolve", request.session, image=reference.name) as (authorizer, figures):
            resolved = await self._puller(parts, request.session).resolve(
                reference, wanted, authorizer, plain_http=request.plain_http, lease_id=request.lease_id
            )
            figures.update({"digest": resolved.image.manifest.digest, "layers": len(resolved.image.layers)})
            image = resolved.record(None)
            parts.stores.audit.note(
                read_entry(Operation.RESOLVE, request, reference, image, authorizer.identity(reference.host))
            )
            return ResolveResult(image=image, config=resolved.image.config_bytes, handlers=resolved.handlers)

    @answers("pull", PullRequest)
    async def pull(self, request: PullRequest) -> PullResult:
        """Resolve an image and make refs of it; see :class:`cluster.fetch.pull.Puller`."""
        parts = await self._started()
        reference, wanted = _asked(request)
        async with self._serving("pull", request.session, image=reference.name) as (authorizer, figures):
            pulled = await self._puller(parts, request.session).pull(
                reference, wanted, authorizer, plain_http=request.plain_http, lease_id=request.lease_id
            )
            count_pulled(pulled.layers)
            parts.stores.audit.note(
                read_entry(Operation.PULL, request, reference, pulled.image, authorizer.identity(reference.host))
            )
            figures.update(
                {
                    "digest": pulled.image.manifest.digest,
                    "layers": len(pulled.layers),
                    "lazy": sum(layer.is_lazy for layer in pulled.layers),
                }
            )
            return pulled

    @answers("assemble", AssembleRequest)
    async def assemble(self, request: AssembleRequest) -> ImageRecord:
        """Make an image of a chain; see :class:`cluster.fetch.assemble.Assembler`."""
        parts = await self._started()
        name = parse_reference(request.name)
        async with self._serving("assemble", request.session, image=name.name) as (authorizer, figures):
            image = await parts.assembler.assemble(
                name,
                request.ref_id,
                request.config,
                authorizer,
                handlers=request.handlers,
                lease_id=request.lease_id,
                created_s=request.created_s,
            )
            figures.update({"digest": image.manifest.digest, "layers": len(image.layers)})
            entry = call_entry("assemble", request.session, ref=request.ref_id or "", image=image.name)
            parts.stores.audit.note(replace(entry, digest=image.manifest.digest))
            return image

    @answers("unlazy", UnlazyRequest)
    async def unlazy(self, request: UnlazyRequest) -> UnlazyResult:
        """Make every blob of a chain present, all in parallel, the lowest layer first in line."""
        parts = await self._started()
        async with self._serving("unlazy", request.session, ref=request.ref_id) as (authorizer, figures):
            chain, caller = await self._caller(parts, authorizer, request)
            layers = await _all_or_none([parts.unlazier.unlazy(s.record.blob, caller) for s in chain])
            count_unlazied(chain, layers)
            parts.stores.traffic.note(fetch_traffic(layers, chain))
            figures.update(_figures(layers))
            return UnlazyResult(ref_id=request.ref_id, layers=tuple(layers))

    @answers("extract", ExtractRequest)
    async def extract(self, request: ExtractRequest) -> ExtractResult:
        """Mount a chain on this node."""
        parts = await self._started()
        started_s = time.monotonic()
        async with self._serving("extract", request.session, ref=request.ref_id) as (authorizer, figures):
            chain, caller = await self._caller(parts, authorizer, request)
            extracted = await parts.extractor.extract(
                chain, caller, mount=request.mount, disk_wait_s=request.disk_wait_s
            )
            count_unlazied(chain, extracted.layers)
            parts.stores.traffic.note(fetch_traffic(extracted.layers, chain))
            figures.update(_figures(extracted.layers))
            parts.stores.audit.note(
                replace(
                    call_entry("extract", request.session, ref=request.ref_id),
                    source=self._starter.boot.node,
                    seconds=time.monotonic() - started_s,
                )
            )
            return ExtractResult(
                ref_id=request.ref_id,
                node=self._starter.boot.node,
                path=str(extracted.path or ""),
                seconds=time.monotonic() - started_s,
                layers=extracted.layers,
                disk_waited_s=extracted.disk_waited_s,
            )

    @answers("node-du", NodeUsageRequest)
    async def node_usage(self, request: NodeUsageRequest) -> NodeUsageResult:
        """Tell what lies on this node's disk, and what holds it."""
        del request
        parts = await self._started()
        usage = await parts.collector.usage()
        return NodeUsageResult(
            node=self._starter.boot.node,
            items=usage.items,
            free_bytes=usage.free_bytes,
            disk_bytes=usage.disk_bytes,
        )

    @answers("node-prune", NodePruneRequest)
    async def prune_node(self, request: NodePruneRequest) -> NodePruneResult:
        """Remove from this node's disk what nothing needs."""
        parts = await self._started()
        pruned = await parts.collector.prune(request.policy, is_dry_run=request.is_dry_run)
        log.info(
            "node.prune.complete",
            items=len(pruned.items),
            freed=pruned.freed_bytes,
            kept=pruned.kept,
            dry_run=pruned.is_dry_run,
        )
        return NodePruneResult(
            node=self._starter.boot.node,
            items=pruned.items,
            freed_bytes=pruned.freed_bytes,
            kept=pruned.kept,
            is_dry_run=pruned.is_dry_run,
        )

    @answers("push", PushRequest)
    async def push(self, request: PushRequest) -> PushResult:
        """Push an image; see :class:`cluster.fetch.push.Pusher`."""
        parts = await self._started()
        target = parse_reference(request.target)
        async with self._serving("push", request.session, image=request.image.name, target=target.name) as (
            authorizer,
            figures,
        ):
            chain = await parts.stores.refs.chain(request.image.ref) if request.image.ref else []
            providers = await usable_providers(parts.stores.access, authorizer, chain, ())
            caller = self._as_caller(authorizer, request.session, request.lease_id, providers)
            pushed = await parts.pusher.push(request.image, target, caller, providers, plain_http=request.plain_http)
            count_pushed(pushed.layers)
            parts.stores.traffic.note(push_traffic(pushed.layers, chain, target.host))
            entry = replace(
                call_entry("push", request.session),
                credential=handle_of(authorizer.identity(target.host)),
                source=target.handle(plain_http=request.plain_http).source,
                image=target.name,
            )
            parts.stores.audit.note(
                *push_entries(entry, pushed.layers, blob_sizes(chain)), replace(entry, digest=pushed.digest)
            )
            figures.update(
                {
                    "digest": pushed.digest,
                    "layers": len(pushed.layers),
                    "uploaded_bytes": sum(layer.bytes for layer in pushed.layers),
                }
            )
            return pushed

    @answers("verify", VerifyRequest)
    async def verify(self, request: VerifyRequest) -> Verified:
        """Verify present blobs, or this node's copies; see :mod:`storage.verifier`."""
        parts = await self._started()
        if request.copies:
            verified = await verify_copies(
                parts.cache,
                request.digests,
                node=self._starter.boot.node,
                threads=parts.verifiers,
                bytes_per_s=request.bytes_per_s,
            )
        else:
            verified = await parts.verifier.verify(
                request.digests, repair=request.repair, bytes_per_s=request.bytes_per_s
            )
        parts.stores.audit.note(*map(fault_entry, verified.faults))
        return verified

    @answers("export-cache", ExportCacheRequest)
    async def export_cache(self, request: ExportCacheRequest) -> ExportCacheResult:
        """Export results to a remote cache; see :class:`cluster.fetch.cache_export.CacheExporter`."""
        parts = await self._started()
        target = request.target
        async with self._serving("export_cache", request.session, target=target.name) as (authorizer, figures):
            exporter = CacheExporter(refs=parts.stores.refs, access=parts.stores.access)
            caller = self._as_caller(authorizer, request.session, request.lease_id, {})
            place = self._place_of(parts, target)
            exported = await exporter.export(place, target, request.candidates, request.handlers, caller)
            count_pushed(exported.layers)
            entry = replace(call_entry("export_cache", request.session), source=target.name)
            parts.stores.audit.note(
                *push_entries(entry, exported.layers, {}), replace(entry, digest=exported.digest or "")
            )
            figures.update(
                {
                    "results": exported.results,
                    "left_out": exported.left_out,
                    "layers": len(exported.layers),
                    "uploaded_bytes": sum(layer.bytes for layer in exported.layers),
                }
            )
            return exported

    @answers("import-cache", ImportCacheRequest)
    async def import_cache(self, request: ImportCacheRequest) -> ImportCacheResult:
        """Read what a remote cache holds; see :class:`cluster.fetch.cache_import.CacheImporter`."""
        parts = await self._started()
        wanted = parse_platform(request.platform) if request.platform else default_platform(platform.machine())
        async with self._serving("import_cache", request.session, source=request.source.name) as (authorizer, figures):
            importer = CacheImporter(
                registry=parts.stores.registry, buckets=parts.stores.buckets, access=parts.stores.access
            )
            imported = await importer.read(request.source, wanted, authorizer)
            parts.stores.audit.note(replace(call_entry("import_cache", request.session), source=request.source.name))
            figures.update({"results": len(imported.cache.entries), "warning": imported.warning})
            return imported

    def _place_of(self, parts: _Parts, target: CacheTarget) -> CachePlace:
        """Return where a cache goes; an inline one goes with its image, not by a call of its own."""
        if target.bucket is not None:
            return BucketPlace(
                target.bucket,
                buckets=parts.stores.buckets,
                unlazier=parts.unlazier,
                refs=parts.stores.refs,
                access=parts.stores.access,
            )
        if target.kind is not CacheKind.REGISTRY:
            raise InternalError(f"a cache of kind {target.kind.value} was to be exported by itself")
        reference = parse_reference(target.ref)
        return RegistryPlace(parts.pusher, parts.stores.registry, reference, plain_http=target.plain_http)

    async def _caller(
        self, parts: _Parts, authorizer: SessionAuthorizer, request: UnlazyRequest | ExtractRequest
    ) -> tuple[Sequence[RefState], Caller]:
        """Prove access to the whole chain, pin it in the caller's lease, and return it with its caller."""
        # An image without layers is a chain of none, which no record stands for.
        chain = [] if request.ref_id == RefId(EMPTY_CHAIN) else await parts.stores.refs.chain(request.ref_id)
        if await parts.stores.leases.get(request.lease_id) is None:
            raise LeaseLostError(request.lease_id)
        providers = await usable_providers(parts.stores.access, authorizer, chain, request.handlers)
        await parts.stores.refs.use([s.record.id for s in chain], lease_id=request.lease_id)
        return chain, self._as_caller(authorizer, request.session, request.lease_id, providers, request.handlers)

    def _as_caller(
        self,
        authorizer: SessionAuthorizer,
        session: SessionInfo,
        lease_id: LeaseId,
        providers: Mapping[Digest, Sequence[ProviderHandle]],
        handlers: Sequence[DescHandler] = (),
    ) -> Caller:
        return Caller(
            authorizer=authorizer,
            lease_id=lease_id,
            providers=providers,
            tenant=session.tenant,
            job=session.job,
            progress=(session.progress,) if session.progress else (),
            own_progress=progress_of(handlers),
            is_live=lambda: authorizer.is_live,
        )


class _ShardRefs:
    """Makes refs through the shard of the chain they belong to."""

    def __init__(self, parts: _Parts, session: SessionInfo, *, farm: str, version: str) -> None:
        self._parts = parts
        self._session = session
        self._farm = farm
        self._version = version

    async def __call__(
        self,
        descriptors: Sequence[Descriptor],
        handlers: Sequence[DescHandler],
        *,
        authorizer: Authorizer,
        lease_id: LeaseId,
        image_ref: str,
    ) -> Sequence[RefState]:
        shard = CacheShardHandle.of_index(
            self._parts.ring.shard_of(_top_of(descriptors)), farm=self._farm, version=self._version
        )
        # The manifest read just now is proof enough, but for what is here and came from elsewhere: then the shard asks
        # the registry, and whom to log in as. The driver is there for this worker; so this worker is for the shard.
        own = replace(self._session, session_id=new_token(), part_of=self._session.tenant, progress=None)
        async with attending(shard, own.session_id, partial(answer_by, authorizer)):
            result = await shard.get_by_blob(
                GetByBlobRequest(
                    session=own,
                    descriptors=tuple(descriptors),
                    parent=None,
                    handlers=tuple(handlers),
                    lease_id=lease_id,
                    image_ref=image_ref,
                ),
                timeout_s=_SHARD_TIMEOUT_S,
            )
        return result.layers


async def _show_disk_forever(cache: NodeCache, threads: ThreadPoolExecutor) -> None:
    def show() -> None:
        disk = shutil.disk_usage(cache.root)
        DISK_SIZE_BYTES.set(disk.total)
        DISK_FREE_BYTES.set(disk.free)
        NODE_CACHE_BYTES.set(cache.statistics().blob_bytes)

    while True:
        with contextlib.suppress(OSError):  # the disk is away: what was shown last stands
            await asyncio.get_running_loop().run_in_executor(threads, show)
        await asyncio.sleep(_SHOW_DISK_EVERY_S)


def _asked(request: PullRequest | ResolveRequest) -> tuple[ImageReference, Platform]:
    """Return which image is asked for, and for which platform: this node's own where none is named."""
    wanted = parse_platform(request.platform) if request.platform else default_platform(platform.machine())
    return parse_reference(request.image), wanted


def _top_of(descriptors: Sequence[Descriptor]) -> RefId:
    """Return the blob chain ID of a whole chain."""
    top: RefRecord | None = None
    for descriptor in descriptors:
        top = RefRecord.over(descriptor, top)
    if top is None:
        raise InternalError("a shard was asked for a chain without layers")
    return top.id


def _figures(layers: Sequence[LayerFetch]) -> dict[str, object]:
    """Sum layers up for a canonical log line."""
    return {
        "layers": len(layers),
        "bytes_fetched": sum(layer.bytes_fetched for layer in layers),
        "joined": sum(layer.joined for layer in layers),
    }


async def _all_or_none(calls: Sequence[object]) -> list[LayerFetch]:
    """Await all; the first error cancels the rest and is raised as itself."""
    tasks = [asyncio.ensure_future(call) for call in calls]  # type: ignore[call-overload]  # coroutines of one kind
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
