"""The farm as a driver that has joined its cluster has it: over Ray's actors, and Redis."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Self, TypeVar

from actors.handles import CacheShardHandle, FetchWorkerHandle, SessionServerHandle
from actors.traces import start_driver_traces
from actors.version import VERSION
from cluster import tracing
from cluster.audit import AuditEntry, AuditFilter
from cluster.cache.names import find_ref
from cluster.cache.ring import ShardRing
from cluster.collect.runner import Pruned
from cluster.collect.stock import Kept, Usage
from cluster.collect.values import Item
from cluster.collect.verify import Verified
from cluster.config import Config
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.drain import UnderWay, taking_work
from cluster.errors import (
    ActorLostError,
    FarmNotRunningError,
    NodeDrainingError,
    NodeNotFoundError,
    NotAnImageError,
    NotInstalledError,
    PageNotRunningError,
    first_error,
)
from cluster.lease import Lease, LeaseId
from cluster.messages import (
    ExtractRequest,
    ExtractResult,
    GetByBlobRequest,
    GetRequest,
    NodePruneRequest,
    NodePruneResult,
    NodeRecord,
    NodeUsageRequest,
    NodeUsageResult,
    PullRequest,
    PushRequest,
    PushResult,
    RefsResult,
    SessionInfo,
    UnlazyRequest,
    UnlazyResult,
)
from cluster.ports import AuditReader, LeaseStore
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import DescHandler, registries_of
from cluster.ref import ImageRecord, RefId, RefRecord, RefState
from cluster.reference import parse_reference
from cluster.settings import FarmSettings
from lazyfarm.collection import FarmCollection, keep_policy
from lazyfarm.drain import DRAIN_S, FarmDrain
from lazyfarm.farm import VERIFY_BYTES_PER_S, Farm
from lazyfarm.joined.builds import JoinedBuilds
from lazyfarm.joined.session import Session
from lazyfarm.leases import RedisLeases
from lazyfarm.ref import Ref
from lazyfarm.verify import FarmVerify
from storage.audit import RedisAudit
from storage.collect import RedisCollectStore
from storage.connect import connect
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.presence import Presence
from storage.progress import RedisProgressStore
from storage.refs import RedisRefStore
from storage.registry.credentials import CredentialSource
from storage.services.page import page_link

T = TypeVar("T")

#: Seconds for which a call is made again while the actor it goes to is being restarted.
_RETRY_S = 30.0
_RETRY_PAUSE_S = 0.5
#: That a look at a node's disk may take: cache mounts are measured after each use.
_NODE_USAGE_S = 600.0


class JoinedFarm(Farm):
    """A farm whose cluster this driver has joined; :meth:`lazyfarm.farm.Farm.connect` makes it."""

    def __init__(self, config: Config, state_dir: Path, session: Session) -> None:
        super().__init__(config.farm.name, lease_ttl_s=config.cache.lease_ttl_s)
        self._config = config
        self._state_dir = state_dir
        self._session = session
        self._link = connect(config.redis)
        keys = Keys(config.farm.name)
        self._audit = RedisAudit(self._link, keys, config.audit, by=session.session_id)
        self._refs = RedisRefStore(self._link, keys, self._audit)
        self._leases: LeaseStore = RedisLeaseStore(self._link, keys)
        self._pins = RedisLeases.over(self._link, keys, config.cache)
        self._collection = FarmCollection.over(self._link, keys, config.collect, self._audit)
        self._presence = Presence(self._link, keys)
        self._drain = FarmDrain.over(self._link, keys)
        self._verify = FarmVerify(
            refs=self._refs,
            store=RedisCollectStore(self._link, keys),
            nodes=self._presence.nodes,
            on_node=self._on_worker,
            deadline_s=config.flight.deadline_s,
        )
        self._progress = RedisProgressStore(self._link, keys)
        self._ring = ShardRing(config.cache.shards)
        self._handles: dict[str, FetchWorkerHandle] = {}
        self._builds = JoinedBuilds(self, config, session, self._link, self._audit)

    def __repr__(self) -> str:
        return f"<Farm {self._name} in {self._state_dir}{', closed' if self._is_closed else ''}>"

    @classmethod
    async def open(cls, settings: FarmSettings, *, credentials: CredentialSource, keep: bool) -> Self:
        """Join; see :meth:`lazyfarm.farm.Farm.connect`."""
        wanted = settings.config
        if not (wanted.redis.url and wanted.ray.address):
            raise FarmNotRunningError(str(settings.state_dir), "nothing was brought up there")
        try:
            from actors.join import join_in_time  # noqa: PLC0415 - Ray, which drivers outside the cluster have not
        except ModuleNotFoundError as exc:
            raise NotInstalledError(exc.name or "Ray") from exc

        start_driver_traces(wanted)
        session = Session(wanted, credentials, keep_s=wanted.cache.keep_s if keep else None)
        try:
            await asyncio.to_thread(session.open)
            await join_in_time(wanted, state_dir=str(settings.state_dir))
            return cls(wanted, settings.state_dir, session)
        except BaseException:
            await asyncio.to_thread(session.close, discard=True)
            raise

    async def close(self, *, discard: bool = False) -> None:
        """Give back what this driver holds, and leave; see the base."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._ends_told()
        await asyncio.to_thread(self._session.close, discard=discard)
        await self._link.close()

    @property
    def session_id(self) -> str:
        """Return the ID of this driver's session."""
        return self._session.session_id

    # -- refs ------------------------------------------------------------------------------------------------

    @tracing.begins("pull")
    async def pull_told(self, image: str, platform: str | None, stream: str | None, *, plain_http: bool) -> Ref:
        """Resolve an image, and tell a progress stream of it."""
        reference = parse_reference(image)
        request = PullRequest(
            session=await self._info([reference.host], stream),
            image=image,
            platform=platform,
            plain_http=plain_http,
            lease_id=self.lease_id(),
        )
        result = await self._on_worker(
            None, lambda worker: worker.pull(request, timeout_s=self._config.flight.deadline_s)
        )
        handle = reference.handle(plain_http=plain_http)
        handlers = [DescHandler(digest=layer.digest, provider=handle) for layer in result.image.layers]
        return Ref(self, result.layers, result.image, handlers)

    @tracing.begins("get")
    async def get(self, ref: str) -> Ref:
        """Look up a ref; see the base."""
        self._raise_if_closed()
        image, ref_id = await find_ref(self._refs, ref)
        if ref_id is None:
            return Ref(self, (), image)
        chain = await self._refs.chain(ref_id)
        registries = registries_of(h for state in chain for h in state.may_be_asked)
        request = GetRequest(
            session=await self._info(registries, None), ref_id=ref_id, handlers=(), lease_id=self.lease_id()
        )
        result = await self._on_shard(
            ref_id, lambda shard: shard.get(request, timeout_s=self._config.ray.call_timeout_s)
        )
        return Ref(self, result.layers, image)

    async def get_by_blob_under(
        self,
        lease_id: LeaseId,
        descriptor: Descriptor,
        parent: Ref | None,
        handlers: Sequence[DescHandler],
        image_ref: str | None,
    ) -> Ref:
        """Make or find the ref of one layer, held by a lease."""
        registries = registries_of(h.provider for h in handlers)
        if parent is not None:
            registries |= registries_of(h for state in parent.layers for h in state.may_be_asked)
        (known,) = await self._refs.providers([descriptor.digest])
        registries |= registries_of(known)
        passed = (*(parent.handlers if parent is not None else ()), *handlers)
        below = parent.layers if parent is not None else ()
        top = RefRecord.over(descriptor, below[-1].record if below else None)
        request = GetByBlobRequest(
            session=await self._info(registries, None),
            descriptors=(descriptor,),
            parent=below[-1].record.id if below else None,
            handlers=passed,
            lease_id=lease_id,
            image_ref=image_ref,
        )
        result: RefsResult = await self._on_shard(
            top.id, lambda shard: shard.get_by_blob(request, timeout_s=self._config.ray.call_timeout_s)
        )
        return Ref(self, (*below, *result.layers), None, passed)

    async def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""
        self._raise_if_closed()
        return [state for state in await self._refs.get(await self._refs.list_refs()) if state is not None]

    async def images(self) -> list[ImageRecord]:
        """Return every image that was resolved, by name."""
        self._raise_if_closed()
        return await self._refs.images()

    async def states(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Return the records of refs, in bulk."""
        return await self._refs.get(ref_ids)

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return a ref and all below it, lowest first."""
        return await self._refs.chain(ref_id)

    async def hold(self, ref_ids: Sequence[RefId]) -> None:
        """Attach refs to this driver's lease."""
        await self._refs.use(ref_ids, lease_id=self.lease_id())

    async def push_told(self, found: Ref, target: str, stream: str | None, *, plain_http: bool) -> PushResult:
        """Push a ref's image, and tell a progress stream of it."""
        reference = parse_reference(target)
        if found.record is None:
            raise NotAnImageError(found.id)
        registries = registries_of(h for state in found.layers for h in state.may_be_asked) | {reference.host}
        request = PushRequest(
            session=await self._info(registries, stream),
            image=found.record,
            target=target,
            plain_http=plain_http,
            lease_id=self.lease_id(),
        )
        result: PushResult = await self._on_worker(
            None, lambda worker: worker.push(request, timeout_s=self._config.flight.deadline_s)
        )
        return result

    @tracing.begins("unlazy")
    async def unlazy_chain(self, ref: Ref, stream: str | None) -> UnlazyResult:
        """Unlazy a ref's whole chain at one worker."""
        request = UnlazyRequest(
            session=await self._info(_registries(ref), stream),
            ref_id=ref.id,
            handlers=ref.handlers,
            lease_id=self.lease_id(),
        )
        result: UnlazyResult = await self._on_worker(
            None, lambda worker: worker.unlazy(request, timeout_s=self._config.flight.deadline_s)
        )
        return result

    @tracing.begins("extract")
    async def extract_chain(self, ref: Ref, node: str | None, stream: str | None) -> ExtractResult:
        """Extract a ref's chain on a node; NodeDrainingError where that takes nothing new."""
        if node in {record.id for record in await self.nodes() if record.draining}:
            raise NodeDrainingError(str(node))
        request = ExtractRequest(
            session=await self._info(_registries(ref), stream),
            ref_id=ref.id,
            handlers=ref.handlers,
            lease_id=self.lease_id(),
        )
        result: ExtractResult = await self._on_worker(
            node, lambda worker: worker.extract(request, timeout_s=self._config.flight.deadline_s)
        )
        return result

    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield a progress stream's items from its start to its end."""
        return self._progress.follow(stream)

    async def _tell_end(self, stream: str) -> None:
        await self._progress.publish([stream], ProgressItem(item="", phase=LayerPhase.DONE))

    # -- leases and nodes --------------------------------------------------------------------------------------

    async def pin(self, ref: Ref, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None) -> Lease:
        """Keep a ref, and all that it stands on, when this driver has long gone; see the base."""
        self._raise_if_closed()
        ref.raise_if_released()
        return await self._pins.pin([ref.id], ttl_s=ttl_s, labels=labels)

    async def unpin(self, lease_id: LeaseId) -> None:
        """Let go of what :meth:`pin` keeps; LeaseNotFoundError where no live lease has that ID."""
        self._raise_if_closed()
        await self._pins.release(lease_id)

    async def du(self) -> Usage:
        """Return what the content store is used for: by ref and by image, what is in use, and what is avoided."""
        self._raise_if_closed()
        return await self._collection.usage()

    async def prune(
        self,
        *,
        everything: bool = False,
        keep_bytes: int = 0,
        keep_duration_s: float = 0.0,
        filters: Sequence[str] = (),
        dry_run: bool = False,
        on_removed: Callable[[Item], object] = lambda _: None,
    ) -> Pruned:
        """Remove from the content store what nobody holds; see the base."""
        self._raise_if_closed()
        return await self._collection.prune(
            everything=everything,
            keep_bytes=keep_bytes,
            keep_duration_s=keep_duration_s,
            filters=filters,
            dry_run=dry_run,
            on_removed=on_removed,
        )

    async def node_usage(self, node: str | None = None) -> list[NodeUsageResult]:
        """Return what lies on nodes' disks, and what holds it; see the base."""
        request = NodeUsageRequest()
        return await self._on_nodes(node, lambda worker: worker.node_usage(request, timeout_s=_NODE_USAGE_S))

    async def prune_nodes(
        self,
        node: str | None = None,
        *,
        keep_bytes: int = 0,
        keep_duration_s: float = 0.0,
        filters: Sequence[str] = (),
        dry_run: bool = False,
    ) -> list[NodePruneResult]:
        """Remove from nodes' disks what nothing needs there; see the base."""
        policy = keep_policy(everything=True, keep_bytes=keep_bytes, keep_duration_s=keep_duration_s, filters=filters)
        request = NodePruneRequest(policy=policy, is_dry_run=dry_run)
        timeout_s = self._config.flight.deadline_s
        return await self._on_nodes(node, lambda worker: worker.prune_node(request, timeout_s=timeout_s))

    async def verify(
        self,
        *refs: str,
        repair: bool = False,
        bytes_per_s: float = VERIFY_BYTES_PER_S,
        on_verified: Callable[[Verified], object] = lambda _: None,
    ) -> Verified:
        """Read blobs that are present, and compare their digests; see the base."""
        self._raise_if_closed()
        return await self._verify.verify(refs, repair=repair, bytes_per_s=bytes_per_s, on_verified=on_verified)

    async def kept(self, ref: str) -> Kept:
        """Return why a ref is kept; see the base."""
        self._raise_if_closed()
        return await self._collection.kept(ref)

    async def audit(
        self, *, last_s: float | None = None, job: str = "", digest: str = "", operation: str = ""
    ) -> list[AuditEntry]:
        """Return what the audit stream has; see the base."""
        self._raise_if_closed()
        wanted = AuditFilter(job=job, digest=digest, operation=operation)
        return [entry async for entry in self._audit.entries(last_s=last_s) if wanted.matches(entry)]

    async def drain(
        self, node: str, *, timeout_s: float = DRAIN_S, on_left: Callable[[UnderWay], object] = lambda _: None
    ) -> UnderWay:
        """Have a node get nothing new, and wait until it has ended what it has; see the base."""
        self._raise_if_closed()
        return await self._drain.drain(node, timeout_s=timeout_s, on_left=on_left)

    async def undrain(self, node: str) -> None:
        """Have a node take work again; NodeNotFoundError where there is no such node."""
        self._raise_if_closed()
        await self._drain.undrain(node)

    async def nodes(self) -> list[NodeRecord]:
        """Return the cluster's nodes."""
        self._raise_if_closed()
        return await self._presence.nodes()

    async def page(self) -> str:
        """Return the address that opens the farm's page, with the token in it; see the base."""
        self._raise_if_closed()
        if link := page_link(self._state_dir):
            return link
        raise PageNotRunningError(str(self._state_dir))

    # -- for what is built upon a farm -------------------------------------------------------------------------

    @property
    def builds(self) -> JoinedBuilds:
        """Return this driver's jobs."""
        return self._builds

    @property
    def link(self) -> RedisLink:
        """Return the connection to Redis."""
        return self._link

    @property
    def lease_store(self) -> LeaseStore:
        """Return where leases are kept."""
        return self._leases

    @property
    def ref_store(self) -> RedisRefStore:
        """Return where refs are recorded."""
        return self._refs

    @property
    def audit_reader(self) -> AuditReader:
        """Return the audit stream."""
        return self._audit

    def lease_id(self) -> LeaseId:
        """Return the lease of this driver, if it is live."""
        self._raise_if_closed()
        self._session.raise_if_lost()
        return self._session.lease_id

    async def hold_resources(self, resources: Sequence[str]) -> None:
        """Attach what is no ref to this driver's lease."""
        await self._leases.attach(self.lease_id(), resources)

    async def info(self, registries: Iterable[str]) -> SessionInfo:
        """Return what a call says of its caller."""
        return await self._info(set(registries), None)

    async def on_worker(self, call: Callable[[FetchWorkerHandle], Awaitable[T]]) -> T:
        """Make an idempotent call at any node's worker."""
        return await self._on_worker(None, call)

    async def _info(self, registries: Sequence[str] | set[str], stream: str | None) -> SessionInfo:
        # A credential helper may have to be run to know who we are.
        return await asyncio.to_thread(
            self._session.info, registries, progress=stream, deadline_s=self._config.flight.deadline_s
        )

    async def _on_worker(self, node: str | None, call: Callable[[FetchWorkerHandle], Awaitable[T]]) -> T:
        """Make an idempotent call at a node's worker, again while that is being restarted."""

        async def once() -> T:
            worker = await self._worker(node)
            return await self._attended(worker, call(worker))

        return await self._made(once)

    async def _on_nodes(self, node: str | None, call: Callable[[FetchWorkerHandle], Awaitable[T]]) -> list[T]:
        """Make an idempotent call at one node, or every live one at once; answers are in the nodes' order."""
        nodes = [record.id for record in await self.nodes() if record.alive] if node is None else [node]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._on_worker(each, call)) for each in nodes]
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        return [task.result() for task in tasks]

    async def _on_shard(self, key: Digest | str, call: Callable[[CacheShardHandle], Awaitable[T]]) -> T:
        """Make an idempotent call at the shard of a key, likewise."""
        shard = CacheShardHandle.of_index(self._ring.shard_of(key), farm=self._config.farm.name, version=VERSION)
        return await self._made(lambda: self._attended(shard, call(shard)))

    async def _made(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, and again where it was lost, for as long as an actor may need to come back."""
        give_up_s: float | None = None
        while True:
            try:
                return await call()
            except ActorLostError:
                give_up_s = give_up_s or time.monotonic() + _RETRY_S
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def _attended(self, server: SessionServerHandle, call: Awaitable[T]) -> T:
        attending: AbstractAsyncContextManager[None] = self._session.attending(server)
        async with attending:
            return await call

    async def _worker(self, node: str | None) -> FetchWorkerHandle:
        nodes = await self.nodes()
        if node is None:
            node = random.choice(taking_work(nodes))  # noqa: S311  # spreads load, keeps no secret
        elif node not in {record.id for record in nodes if record.alive}:
            raise NodeNotFoundError(node)
        if node not in self._handles:
            self._handles[node] = FetchWorkerHandle.of_node(node, farm=self._config.farm.name, version=VERSION)
        return self._handles[node]


def _registries(ref: Ref) -> set[str]:
    """Return the registries that may be asked for a ref's blobs."""
    stored = registries_of(h for state in ref.layers for h in state.may_be_asked)
    return stored | registries_of(h.provider for h in ref.handlers)
