"""The cache shard: a shell around the cache manager. Holds no truth: any shard can answer for any ref."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from actors.boot import Boot, Starter, Stores, build_stores
from actors.collection import collecting
from actors.session_host import SessionServer
from actors.shell import answers
from cluster.errors import NeedsRemoteProvidersError
from cluster.messages import GetByBlobRequest, GetRequest, RefsResult
from cluster.metrics import REFS_ASKED
from cluster.ref import RefState
from cluster.wire import decode
from storage.presence import Presence


class CacheShard(SessionServer):
    """One of S cache-manager shards."""

    def __init__(self, boot: bytes) -> None:
        super().__init__()
        self._starter = Starter(decode("boot", Boot, boot))
        self._stores: Stores | None = None

    async def _started(self) -> Stores:
        await self._starter.start(self._build)
        if self._stores is None:
            raise RuntimeError("started without stores")
        return self._stores

    async def _build(self) -> Presence:
        config = self._starter.boot.config
        self._stores = build_stores(config, name=self._starter.boot.name)
        for work in collecting(self._stores, config):
            self._starter.background.spawn(work)
        return self._stores.presence

    async def ready(self) -> bool:
        """Build what is needed and say so."""
        await self._started()
        return True

    @answers("get-by-blob", GetByBlobRequest)
    async def get_by_blob(self, request: GetByBlobRequest) -> RefsResult:
        """See :meth:`cluster.cache.runner.CacheManager.get_by_blob`."""
        stores = await self._started()
        async with self._sessions.serving(request.session) as authorizer:
            return await _counted(
                stores.cache.get_by_blob(
                    request.descriptors,
                    parent=request.parent,
                    handlers=request.handlers,
                    authorizer=authorizer,
                    lease_id=request.lease_id,
                    image_ref=request.image_ref,
                )
            )

    @answers("get", GetRequest)
    async def get(self, request: GetRequest) -> RefsResult:
        """See :meth:`cluster.cache.runner.CacheManager.get`."""
        stores = await self._started()
        async with self._sessions.serving(request.session) as authorizer:
            return await _counted(
                stores.cache.get(
                    request.ref_id, handlers=request.handlers, authorizer=authorizer, lease_id=request.lease_id
                )
            )


async def _counted(asking: Awaitable[Sequence[RefState]]) -> RefsResult:
    """Return the refs that were asked for, counted."""
    try:
        layers = tuple(await asking)
    except NeedsRemoteProvidersError as exc:
        REFS_ASKED.add(len(exc.digests), state="refused")
        raise
    for layer in layers:
        REFS_ASKED.add(state="lazy" if layer.is_lazy else "present")
    return RefsResult(layers=layers)
