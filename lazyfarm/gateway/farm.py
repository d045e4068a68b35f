"""The farm as a driver outside the cluster has it: the same API, over the gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Self, TypeVar

from cluster import gateway as calls
from cluster.audit import AuditEntry
from cluster.collect.runner import Pruned
from cluster.collect.stock import Kept, Usage
from cluster.collect.values import Item
from cluster.collect.verify import Verified
from cluster.descriptor import Descriptor
from cluster.drain import UnderWay
from cluster.errors import ClusterError, InternalError, NotAnImageError, UnavailableError
from cluster.gateway import Answered, Asked, Nothing, RefView, Stream, Welcome
from cluster.lease import Lease, LeaseId
from cluster.messages import (
    ExtractResult,
    NodePruneResult,
    NodeRecord,
    NodeUsageResult,
    PushResult,
    UnlazyResult,
)
from cluster.ports import AuditReader, LeaseStore, ObjectInfo
from cluster.progress import ProgressItem
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from lazyfarm.drain import DRAIN_S
from lazyfarm.farm import VERIFY_BYTES_PER_S, Farm
from lazyfarm.gateway import reads
from lazyfarm.gateway.access import Access
from lazyfarm.gateway.audit import GatewayAudit
from lazyfarm.gateway.builds import GatewayBuilds
from lazyfarm.gateway.leases import GatewayLeases
from lazyfarm.gateway.link import GatewayLink
from lazyfarm.gateway.views import view_of
from lazyfarm.now import Now
from lazyfarm.ref import Ref
from lazyfarm.status import FarmStatus
from storage.registry.credentials import CredentialSource

Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")

#: Seconds that leaving may take; then the gateway finds out by itself.
_CLOSE_S = 15.0


class GatewayFarm(Farm):
    """A farm that is reached through its gateway; :meth:`lazyfarm.farm.Farm.connect` makes it.

    What a driver of the cluster does with Ray and Redis is here a call each. Refs, jobs and operations are the same.
    """

    def __init__(self, link: GatewayLink, access: Access, welcome: Welcome) -> None:
        super().__init__(welcome.farm, lease_ttl_s=welcome.lease_ttl_s)
        self._gateway = link
        self._access = access
        self._session_id = welcome.session_id
        #: Of the gateway; "": one that doesn't say.
        self.release = welcome.release
        self._leases: LeaseStore = GatewayLeases(link)
        self._builds = GatewayBuilds(self, link, access)

    def __repr__(self) -> str:
        return f"<Farm {self._name} at {self._access.url}{', closed' if self._is_closed else ''}>"

    @classmethod
    async def open(cls, access: Access, *, credentials: CredentialSource, keep: bool) -> Self:
        """Connect; see :meth:`lazyfarm.farm.Farm.connect`."""
        link = GatewayLink(access, answer=lambda asked: _answer(credentials, asked), keep=keep)
        try:
            return cls(link, access, await link.open())
        except BaseException:
            await link.close()
            raise

    async def close(self, *, discard: bool = False) -> None:
        """Give back what this driver holds, and leave; see the base."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._ends_told()
            async with asyncio.timeout(_CLOSE_S):
                await self._gateway.call(calls.CLOSE, calls.CloseCall(discard=discard))
        except (UnavailableError, TimeoutError):
            pass  # its lease lapses by itself
        finally:
            await self._gateway.close()

    @property
    def gateway(self) -> GatewayLink:
        """Return the connection, for what is looked at over it."""
        return self._gateway

    @property
    def session_id(self) -> str:
        """Return the ID of this driver's session."""
        return self._session_id

    # -- refs --------------------------------------------------------------------------------------------------

    async def pull_told(self, image: str, platform: str | None, stream: str | None, *, plain_http: bool) -> Ref:
        """Resolve an image, and tell a progress stream of it."""
        self._raise_if_closed()
        call = calls.PullCall(image=image, platform=platform, plain_http=plain_http, stream=stream)
        return self._ref(await self._gateway.call(calls.PULL, call))

    async def get(self, ref: str) -> Ref:
        """Look up a ref; see the base."""
        self._raise_if_closed()
        return self._ref(await self._gateway.call(calls.GET, calls.Named(name=ref)))

    async def get_by_blob_under(
        self,
        lease_id: LeaseId,
        descriptor: Descriptor,
        parent: Ref | None,
        handlers: Sequence[DescHandler],
        image_ref: str | None,
    ) -> Ref:
        """Make or find the ref of one layer, held by a lease."""
        call = calls.GetByBlobCall(
            descriptor=descriptor,
            parent=None if parent is None else view_of(parent),
            handlers=tuple(handlers),
            lease_id=None if lease_id == self.lease_id() else lease_id,
            image_ref=image_ref,
        )
        return self._ref(await self._gateway.call(calls.GET_BY_BLOB, call))

    async def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""
        self._raise_if_closed()
        return await self._gateway.call(calls.REFS, Nothing())

    async def images(self) -> list[ImageRecord]:
        """Return every image that was resolved, by name."""
        self._raise_if_closed()
        return await self._gateway.call(calls.IMAGES, Nothing())

    async def states(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Return the records of refs, in bulk."""
        return await self._gateway.call(calls.STATES, calls.RefIds(ids=tuple(ref_ids)))

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return a ref and all below it, lowest first."""
        return await self._gateway.call(calls.CHAIN, calls.Named(name=ref_id))

    async def hold(self, ref_ids: Sequence[RefId]) -> None:
        """Attach refs to this driver's lease."""
        await self._gateway.call(calls.HOLD, calls.RefIds(ids=tuple(ref_ids)))

    async def push_told(self, found: Ref, target: str, stream: str | None, *, plain_http: bool) -> PushResult:
        """Push a ref's image, and tell a progress stream of it."""
        if found.record is None:
            raise NotAnImageError(found.id)
        call = calls.PushCall(ref=view_of(found), target=target, plain_http=plain_http, stream=stream)
        return await self._gateway.call(calls.PUSH, call)

    async def unlazy_chain(self, ref: Ref, stream: str | None) -> UnlazyResult:
        """Unlazy a ref's whole chain at one worker."""
        self._raise_if_closed()
        return await self._gateway.call(calls.UNLAZY, calls.RefCall(ref=view_of(ref), stream=stream))

    async def extract_chain(self, ref: Ref, node: str | None, stream: str | None) -> ExtractResult:
        """Extract a ref's chain on a node of the farm: its path is there."""
        self._raise_if_closed()
        return await self._gateway.call(calls.EXTRACT, calls.RefCall(ref=view_of(ref), node=node, stream=stream))

    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield a progress stream's items from its start to its end."""
        return self._gateway.stream(calls.FOLLOW, calls.Named(name=stream))

    async def _tell_end(self, stream: str) -> None:
        with contextlib.suppress(ClusterError):  # the gateway is away, and who follows hears of that
            await self._gateway.call(calls.END_STREAM, calls.Named(name=stream))

    # -- leases and nodes --------------------------------------------------------------------------------------

    async def pin(self, ref: Ref, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None) -> Lease:
        """Keep a ref when this driver has long gone; see the base."""
        self._raise_if_closed()
        ref.raise_if_released()
        call = calls.PinCall(ref=view_of(ref), ttl_s=ttl_s, labels=dict(labels or {}))
        return await self._gateway.call(calls.PIN, call)

    async def unpin(self, lease_id: LeaseId) -> None:
        """Let go of what :meth:`pin` keeps; see the base."""
        self._raise_if_closed()
        await self._gateway.call(calls.UNPIN, calls.Named(name=lease_id))

    async def du(self) -> Usage:
        """Return what the content store is used for; see the base."""
        self._raise_if_closed()
        return await self._gateway.call(calls.DU, Nothing())

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
        call = calls.PruneCall(
            everything=everything,
            keep_bytes=keep_bytes,
            keep_duration_s=keep_duration_s,
            filters=tuple(filters),
            dry_run=dry_run,
        )

        def tell(told: calls.PruneTold) -> Pruned | None:
            if told.removed is not None:
                on_removed(told.removed)
            return told.result

        return await self._to_its_end(calls.PRUNE, call, tell)

    async def node_usage(self, node: str | None = None) -> list[NodeUsageResult]:
        """Return what lies on nodes' disks; see the base."""
        self._raise_if_closed()
        return await self._gateway.call(calls.NODE_USAGE, calls.NodeCall(node=node))

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
        self._raise_if_closed()
        call = calls.PruneCall(
            keep_bytes=keep_bytes,
            keep_duration_s=keep_duration_s,
            filters=tuple(filters),
            dry_run=dry_run,
            node=node,
        )
        return await self._gateway.call(calls.NODE_PRUNE, call)

    async def verify(
        self,
        *refs: str,
        repair: bool = False,
        bytes_per_s: float = VERIFY_BYTES_PER_S,
        on_verified: Callable[[Verified], object] = lambda _: None,
    ) -> Verified:
        """Read blobs that are present, and compare their digests; see the base."""
        self._raise_if_closed()
        call = calls.VerifyCall(refs=refs, repair=repair, bytes_per_s=bytes_per_s)

        def tell(told: calls.VerifyTold) -> Verified | None:
            if told.is_end:
                return told.verified
            on_verified(told.verified)
            return None

        return await self._to_its_end(calls.VERIFY, call, tell)

    async def kept(self, ref: str) -> Kept:
        """Return why a ref is kept; see the base."""
        self._raise_if_closed()
        return await self._gateway.call(calls.KEPT, calls.Named(name=ref))

    async def nodes(self) -> list[NodeRecord]:
        """Return the cluster's nodes."""
        self._raise_if_closed()
        return await self._gateway.call(calls.NODES, Nothing())

    async def page(self) -> str:
        """Return the address under the gateway's that opens the farm's page; see the base."""
        self._raise_if_closed()
        return self._access.url + (await self._gateway.call(calls.PAGE, Nothing())).path

    async def audit(
        self, *, last_s: float | None = None, job: str = "", digest: str = "", operation: str = ""
    ) -> list[AuditEntry]:
        """Return what the audit stream has; see the base."""
        self._raise_if_closed()
        call = calls.AuditCall(last_s=last_s, job=job, digest=digest, operation=operation)
        return [entry async for entry in self._gateway.stream(calls.AUDIT, call)]

    async def drain(
        self, node: str, *, timeout_s: float = DRAIN_S, on_left: Callable[[UnderWay], object] = lambda _: None
    ) -> UnderWay:
        """Have a node get nothing new, and wait until it has ended what it has; see the base."""
        self._raise_if_closed()

        def tell(told: calls.DrainTold) -> UnderWay | None:
            if told.is_end:
                return told.left
            on_left(told.left)
            return None

        return await self._to_its_end(calls.DRAIN, calls.DrainCall(node=node, timeout_s=timeout_s), tell)

    async def undrain(self, node: str) -> None:
        """Have a node take work again; see the base."""
        self._raise_if_closed()
        await self._gateway.call(calls.UNDRAIN, calls.Named(name=node))

    async def status(self) -> FarmStatus:
        """Return what runs, as the farm's head sees it."""
        self._raise_if_closed()
        return await self._gateway.call(reads.STATUS, Nothing())

    async def quarantined(self) -> list[ObjectInfo]:
        """Return the damaged objects that were put aside."""
        self._raise_if_closed()
        return await self._gateway.call(reads.QUARANTINED, Nothing())

    async def now(self) -> Now:
        """Return what goes on; a flight's rate is told of two looks."""
        self._raise_if_closed()
        return await self._gateway.call(reads.NOW, Nothing())

    # -- for what is built upon a farm -------------------------------------------------------------------------

    @property
    def builds(self) -> GatewayBuilds:
        """Return this driver's jobs."""
        return self._builds

    @property
    def audit_reader(self) -> AuditReader:
        """Return the audit stream."""
        return GatewayAudit(self._gateway)

    @property
    def lease_store(self) -> LeaseStore:
        """Return where leases are kept."""
        return self._leases

    def lease_id(self) -> LeaseId:
        """Return the lease of this driver."""
        self._raise_if_closed()
        return LeaseId(f"driver-{self._session_id}")

    async def _to_its_end(self, stream: Stream[Q, T], call: Q, tell: Callable[[T], R | None]) -> R:
        """Tell of each item of a call; return what *tell* makes of the last one."""
        result: R | None = None
        async for told in self._gateway.stream(stream, call):
            result = tell(told)
        if result is None:
            raise InternalError(f"the gateway told no end of {stream.name}")
        return result

    def _ref(self, view: RefView) -> Ref:
        return Ref(self, view.layers, view.image, view.handlers)


def _answer(credentials: CredentialSource, asked: Asked) -> Answered:
    """Answer for a registry; blocks while a credential helper runs."""
    if asked.was_refused:
        credentials.forget(asked.registry)
    found = credentials.lookup(asked.registry)
    if found is None:
        return Answered()
    return Answered(is_known=True, username=found.username, secret=found.secret, identity_token=found.identity_token)
