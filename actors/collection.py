"""Collection in the background: one shard at a time keeps the farm's policies, and deletes what has ended."""

from __future__ import annotations

import asyncio
import time

import structlog

from actors.boot import Stores
from cluster.collect.policy import default_policies
from cluster.collect.runner import Collector
from cluster.collect.stock import Stock
from cluster.config import CollectConfig, Config
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
from storage.link import RedisLink
from storage.sweeper import sweep

log = structlog.get_logger()

#: Which turn it is.
_WORK = "collect"
#: Sweeps in the time that a stray is left alone: each lists every layer in the bucket.
_SWEEPS = 4


async def collect_forever(stores: Stores, config: Config) -> None:
    """Collect every ``collect.every_s`` seconds, unless another shard does; never where that is 0."""
    if not config.collect.every_s:
        return
    keys = Keys(config.farm.name)
    store = RedisCollectStore(stores.link, keys)
    collector = Collector(refs=stores.refs, leases=stores.leases, store=store, grace_s=config.collect.grace_s)
    objects = S3ContentStore(config.s3)

    async def delete(key: str) -> None:
        await asyncio.to_thread(objects.delete, key)

    COLLECT_LAST.set(time.time())
    _show(None)
    sweep_at_s = 0.0
    try:
        while True:
            await asyncio.sleep(config.collect.every_s)
            began_s = time.monotonic()
            try:
                async with store.turn(_WORK) as is_mine:
                    if is_mine:
                        await _collect(collector, config.collect)
                        if time.monotonic() >= sweep_at_s:
                            await _sweep(stores.link, keys, store, objects, config.collect.stray_s)
                            sweep_at_s = time.monotonic() + config.collect.stray_s / _SWEEPS
                        deleted = await collector.delete_due(delete)
                        DELETED_OBJECTS.add(deleted)
                        if deleted:
                            log.info("collect.deleted", objects=deleted)
                        COLLECT_SECONDS.observe(time.monotonic() - began_s, outcome="ok")
                        COLLECT_LAST.set(time.time())
                    else:
                        _show(None)
            except ClusterError as exc:  # Redis or S3 is away: the next round goes on
                COLLECT_SECONDS.observe(time.monotonic() - began_s, outcome="failed")
                log.warning("collect.failed", error=str(exc), error_type=type(exc).__name__)
    finally:
        objects.close()


async def _collect(collector: Collector, config: CollectConfig) -> None:
    policies = default_policies(
        reserved_bytes=config.reserved_bytes, max_used_bytes=config.max_used_bytes, unused_s=config.unused_s
    )
    for number, policy in enumerate(policies, start=1):
        pruned = await collector.prune(policy, on_stock=_show)
        COLLECTED_ITEMS.add(len(pruned.items))
        COLLECTED_BYTES.add(pruned.freed_bytes)
        if pruned.items or pruned.freed_bytes:
            log.info(
                "collect.pruned", policy=number, items=len(pruned.items), freed=pruned.freed_bytes, kept=pruned.kept
            )


async def _sweep(
    link: RedisLink, keys: Keys, store: RedisCollectStore, objects: S3ContentStore, stray_s: float
) -> None:
    others = await others_in_bucket(link, keys, objects)
    if not stray_s:
        return
    if others:
        log.warning("collect.unswept", reason="other farms use the bucket", marks=others)
        return
    swept = await sweep(store, objects, stray_s=stray_s)
    SWEPT_STRAYS.add(swept)
    if swept:
        log.info("collect.swept", strays=swept)


def _show(stock: Stock | None) -> None:
    """Show what there is; nothing where another shard looks, which shows it."""
    states = [] if stock is None else list(stock.states.values())
    lazy = [state.record.blob for state in states if state.is_lazy]
    REFS.set(len(lazy), state="lazy")
    REFS.set(len(states) - len(lazy), state="present")
    AVOIDED_BYTES.set(sum({blob.digest: blob.size_bytes for blob in lazy}.values()))
    STORED_BYTES.set(0 if stock is None else sum(blob.size_bytes for blob in stock.blobs))
    LEASES.set(0 if stock is None else len(stock.leases))
