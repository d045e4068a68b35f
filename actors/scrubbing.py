"""Scrubbing in the background: everything that is present is read now and then, slowly, before somebody needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import structlog

from actors.boot import Stores
from actors.rounds import again_and_again
from cluster.audit import fault_entry
from cluster.collect.verify import Verified
from cluster.config import Config
from cluster.digest import Digest
from storage.collect import RedisCollectStore
from storage.keys import Keys
from storage.node_cache import NodeCache
from storage.rounds import go_round
from storage.verifier import Verifier, verify_copies

log = structlog.get_logger()

#: Seconds between looks whether a round is due, or whoever was at it is gone.
_LOOK_S = 60.0
#: Blobs between two notes of how far a round has come.
_BATCH = 10


async def scrub_forever(stores: Stores, config: Config, verifier: Verifier) -> None:
    """Verify and repair every present blob at ``collect.scrub_bytes_per_s``; one worker of the farm at a time does."""
    store = RedisCollectStore(stores.link, Keys(config.farm.name))
    rate = config.collect.scrub_bytes_per_s

    async def names() -> Sequence[str]:
        return [blob.digest for blob in await store.blobs()]

    async def look(digests: Sequence[str]) -> None:
        _tell(stores, await verifier.verify([Digest(digest) for digest in digests], repair=True, bytes_per_s=rate))

    async def turn_round() -> None:
        async with store.turn("scrub") as is_mine:
            if is_mine:
                await go_round(
                    store, "scrub", every_s=config.collect.scrub_every_s, names=names, look=look, most=_BATCH
                )

    if rate:
        await again_and_again("scrub", turn_round, every_s=_LOOK_S)


async def scrub_copies_forever(
    stores: Stores, config: Config, cache: NodeCache, *, node: str, threads: Executor
) -> None:
    """Verify this node's copies, at the same rate."""
    store = RedisCollectStore(stores.link, Keys(config.farm.name))
    rate = config.collect.scrub_bytes_per_s

    async def names() -> Sequence[str]:
        return [state.digest for state in await asyncio.to_thread(cache.states)]

    async def look(digests: Sequence[str]) -> None:
        found = [Digest(digest) for digest in digests]
        _tell(stores, await verify_copies(cache, found, node=node, threads=threads, bytes_per_s=rate))

    async def turn_round() -> None:
        every_s = config.collect.scrub_every_s
        await go_round(store, f"scrub:{node}", every_s=every_s, names=names, look=look, most=_BATCH)

    if rate:
        await again_and_again("scrub", turn_round, every_s=_LOOK_S)


def _tell(stores: Stores, verified: Verified) -> None:
    stores.audit.note(*map(fault_entry, verified.faults))
    for fault in verified.faults:
        log.warning(
            "scrub.fault",
            digest=fault.digest,
            kind=fault.kind.value,
            reason=fault.reason,
            repaired=fault.is_repaired,
            quarantine=fault.quarantine,
        )
