"""What a farm's content store is used for, and making room in it, over its Redis alone.

Nothing here reaches for S3: what ends here is deleted there by the farm, after a grace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self

from cluster.cache.names import find_ref
from cluster.collect.filters import parse_filter
from cluster.collect.policy import KeepPolicy
from cluster.collect.runner import Collector, Pruned
from cluster.collect.stock import Kept, Usage
from cluster.collect.values import Item
from cluster.config import CollectConfig
from cluster.errors import InvalidArgumentError, NoLayersError
from cluster.ports import RefStore
from cluster.settings import FarmSettings
from lazyfarm.redis_only import connection, own_audit
from storage.audit import RedisAudit
from storage.collect import RedisCollectStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.refs import RedisRefStore


class FarmCollection:
    """Collection in one farm. Every method may raise UnavailableError: Redis doesn't answer."""

    def __init__(self, refs: RefStore, collector: Collector) -> None:
        self._refs = refs
        self._collector = collector

    @classmethod
    def over(cls, link: RedisLink, keys: Keys, config: CollectConfig, audit: RedisAudit) -> Self:
        """Return that of a farm whose Redis a client is connected to; *audit* notes what is removed."""
        refs = RedisRefStore(link, keys)
        leases, store = RedisLeaseStore(link, keys), RedisCollectStore(link, keys, audit)
        return cls(refs, Collector(refs=refs, leases=leases, store=store, grace_s=config.grace_s))

    async def usage(self) -> Usage:
        """Return what takes how much, by ref and by image."""
        return await self._collector.usage()

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
        """Remove what nobody holds; see :meth:`lazyfarm.farm.Farm.prune`."""
        policy = keep_policy(
            everything=everything, keep_bytes=keep_bytes, keep_duration_s=keep_duration_s, filters=filters
        )
        return await self._collector.prune(policy, is_dry_run=dry_run, on_removed=on_removed)

    async def kept(self, name: str) -> Kept:
        """Return why a ref is kept, by its ID, the first digits of that, or the image that it is the top of.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
        """
        image, ref_id = await find_ref(self._refs, name)
        if ref_id is None:
            raise NoLayersError(image.name if image is not None else name)
        return await self._collector.kept(ref_id)


def keep_policy(*, everything: bool, keep_bytes: int, keep_duration_s: float, filters: Sequence[str]) -> KeepPolicy:
    """Return the policy that a prune is asked for; see :meth:`lazyfarm.farm.Farm.prune`.

    Raises:
        InvalidArgumentError: a filter can't be read, or a number is below 0.
    """
    for name, value in (("keep_bytes", keep_bytes), ("keep_duration_s", keep_duration_s)):
        if value < 0:
            raise InvalidArgumentError(name, f"{value:g}", "it is at least 0")
    return KeepPolicy(
        filters=tuple(map(parse_filter, filters)),
        includes_shared=everything,
        keep_duration_s=keep_duration_s,
        max_used_bytes=keep_bytes,
    )


@asynccontextmanager
async def open_collection(settings: FarmSettings) -> AsyncIterator[FarmCollection]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    async with connection(settings) as (link, keys):
        yield FarmCollection.over(link, keys, settings.config.collect, own_audit(link, keys, settings.config.audit))
