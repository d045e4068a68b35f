"""Collection on a node in the background: its fetch worker keeps its disk as the configuration says."""

from __future__ import annotations

import asyncio
import subprocess

import structlog

from actors.rounds import again_and_again
from cluster.collect.policy import default_policies
from cluster.config import NodeConfig
from cluster.errors import ClusterError
from storage.node_collect import NodeCollector
from storage.node_roots import DeadNodes

log = structlog.get_logger()

#: Redis is away, or the disk refuses.
_PASSING = (ClusterError, OSError, subprocess.SubprocessError)


async def collect_node_forever(collector: NodeCollector, dead: DeadNodes, config: NodeConfig) -> None:
    """Collect every ``node.collect_every_s`` seconds; never where that is 0."""
    if not config.collect_every_s:
        return
    policies = default_policies(
        reserved_bytes=config.reserved_bytes,
        max_used_bytes=config.max_used_bytes,
        min_free_bytes=config.min_free_bytes,
        unused_s=config.unused_s,
    )

    async def collect() -> None:
        for number, pruned in enumerate(await collector.collect(policies), start=1):
            if pruned.items or pruned.kept:
                log.info(
                    "node.pruned", policy=number, items=len(pruned.items), freed=pruned.freed_bytes, kept=pruned.kept
                )
        if removed := await asyncio.to_thread(dead.sweep):
            log.info("node.dead.removed", nodes=removed)

    await again_and_again("node.collect", collect, every_s=config.collect_every_s, passing=_PASSING)
