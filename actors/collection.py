"""Collection in the background: shards keep the farm's policies, delete what has ended, and sweep the bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace

import structlog

from actors.boot import Stores
from actors.rounds import again_and_again
from cluster.collect.pace import Pace
from cluster.collect.policy import default_policies
from cluster.collect.runner import Collector
from cluster.collect.stock import Stock
from cluster.config import Config
from cluster.digest import Digest
from cluster.errors import ClusterError
from cluster.metrics import (
    AVOIDED_BYTES,
    COLLECT_LAST,
    COLLECT_SECONDS,
    COLLECTED_BYTES,
    COLLECTED_ITEMS,
    DELETED_OBJECTS,
    LEASES,
    REFS,
    STORED_BYTES,
    SWEPT_STRAYS,
)
from storage.blobs import S3ContentStore
from storage.bucket_mark import others_in_bucket
from storage.collect import RedisCollectStore
from storage.keys import Keys
from storage.rounds import go_round
from storage.sweeper import WORK as SWEEP
from storage.sweeper import due_sweep, make_missing_lazy, sweep

log = structlog.get_logger()

_MISSING = "missing"
#: Sweeps in the time that a stray is left alone: each lists all that the farm has in the bucket.
_SWEEPS = 4
#: Seconds that stand for that time where nothing is swept.
_MARK_S = 3600.0
#: Blobs that are looked for between two notes of how far that has come.
_BATCH = 100


def collecting(stores: Stores, config: Config) -> list[Coroutine[object, object, None]]:
    """Return what a shard does in the background, for as long as it lives: collect, sweep, look for what is missing.

    Each looks every ``collect.every_s`` seconds whether something is to be done and no other shard is at it; nothing
    does where that is 0.
    """
    if not config.collect.every_s:
        return []
    COLLECT_LAST.set(time.time())
    _show(None)
    return [
        _forever("collect", _Collection.collect, stores, config),
        _forever("sweep", _Collection.sweep, stores, config),
        _forever("missing", _Collection.look_for_missing, stores, config),
    ]


async def _forever(work: str, do: Callable[[_Collection], Awaitable[None]], stores: Stores, config: Config) -> None:
    objects = S3ContentStore(config.s3)
    collection = _Collection(stores, config, objects)
    try:
        await again_and_again(work, lambda: do(collection), every_s=config.collect.every_s)
    finally:
        objects.close()


class _Collection:
    """What a shard does of it: each method is one go, and does nothing where it isn't this shard's turn."""

    def __init__(self, stores: Stores, config: Config, objects: S3ContentStore) -> None:
        self._stores = stores
        self._config = config.collect
        self._keys = Keys(config.farm.name)
        self._objects = objects
        self._store = RedisCollectStore(stores.link, self._keys, stores.audit)
        self._pace = Pace(config.collect.requests_per_s)
        self._collector = Collector(
            refs=stores.refs, leases=stores.leases, store=self._store, grace_s=config.collect.grace_s
        )

    async def collect(self) -> None:
        """Keep the policies, and delete what has ended."""
        began_s = time.monotonic()
        try:
            async with self._store.turn("collect") as is_mine:
                if not is_mine:
                    _show(None)
                    return
                await self._prune()
                deleted = await self._collector.delete_due(self._delete)
        except ClusterError:
            COLLECT_SECONDS.observe(time.monotonic() - began_s, outcome="failed")
            raise
        DELETED_OBJECTS.add(deleted)
        if deleted:
            log.info("collect.deleted", objects=deleted)
        COLLECT_SECONDS.observe(time.monotonic() - began_s, outcome="ok")
        COLLECT_LAST.set(time.time())

    async def _delete(self, key: str) -> None:
        await asyncio.to_thread(self._objects.delete, key)

    async def _prune(self) -> None:
        policies = default_policies(
            reserved_bytes=self._config.reserved_bytes,
            max_used_bytes=self._config.max_used_bytes,
            unused_s=self._config.unused_s,
        )
        for number, policy in enumerate(policies, start=1):
            pruned = await self._collector.prune(policy, on_stock=_show)
            COLLECTED_ITEMS.add(len(pruned.items))
            COLLECTED_BYTES.add(pruned.freed_bytes)
            if pruned.items or pruned.freed_bytes:
                log.info(
                    "collect.pruned", policy=number, items=len(pruned.items), freed=pruned.freed_bytes, kept=pruned.kept
                )

    async def sweep(self) -> None:
        """Sweep the bucket, if that is due and nobody else uses it; leave this farm's mark there in any case."""
        stray_s = self._config.stray_s
        async with self._store.turn(SWEEP) as is_mine:
            current = await due_sweep(self._store, every_s=(stray_s or _MARK_S) / _SWEEPS) if is_mine else None
            if current is None:
                return
            others = await others_in_bucket(self._stores.link, self._keys, self._objects)
            if others or not stray_s:
                if stray_s:
                    log.warning("collect.unswept", reason="other farms use the bucket", marks=others)
                await self._store.keep_round(SWEEP, replace(current, is_done=True))
                return
            swept = await sweep(self._store, self._objects, current, stray_s=stray_s, pace=self._pace)
            SWEPT_STRAYS.add(swept)
            if swept:
                log.info("collect.swept", strays=swept)

    async def look_for_missing(self) -> None:
        """Look whether every present blob's object is there, if that is due."""
        if not self._config.missing_every_s:
            return

        async def names() -> Sequence[str]:
            return [blob.digest for blob in await self._store.blobs()]

        async def look(digests: Sequence[str]) -> None:
            wanted = [Digest(digest) for digest in digests]
            missing = await make_missing_lazy(self._stores.refs, self._objects, wanted, pace=self._pace)
            if missing:
                log.warning("collect.missing", blobs=missing)

        async with self._store.turn(_MISSING) as is_mine:
            if is_mine:
                every_s = self._config.missing_every_s
                await go_round(self._store, _MISSING, every_s=every_s, names=names, look=look, most=_BATCH)


def _show(stock: Stock | None) -> None:
    """Show what there is; nothing where another shard looks, which shows it."""
    states = [] if stock is None else list(stock.states.values())
    lazy = [state.record.blob for state in states if state.is_lazy]
    REFS.set(len(lazy), state="lazy")
    REFS.set(len(states) - len(lazy), state="present")
    AVOIDED_BYTES.set(sum({blob.digest: blob.size_bytes for blob in lazy}.values()))
    STORED_BYTES.set(0 if stock is None else sum(blob.size_bytes for blob in stock.blobs))
    LEASES.set(0 if stock is None else len(stock.leases))
