"""Collection: blobs that no lease holds go, while others come for them.

Two-phase, as the design wants it: one step in Redis sees that nobody holds a blob and makes it absent; then its object
goes from S3, after a grace, by the key that only that upload had.
"""

from __future__ import annotations

import asyncio

from cluster.errors import ClusterError
from cluster.lease import blob_resource
from storage.memory_collect import MemoryCollectStore
from tests.simulation.services import Bucket, Remote

_ROUND_S = 0.5
_GRACE_S = 1.0
_AT_ONCE = 100


class CollectedRefs(MemoryCollectStore):
    """The steps in Redis, which the watch sees."""

    def __init__(self, watch, redis):
        super().__init__(redis.memory)
        self._watch = watch
        #: How often each blob was collected.
        self.times = {}

    def _condemn(self, digest, grace_s):
        freed = super()._condemn(digest, grace_s)
        if freed is not None:
            self.times[digest] = self.times.get(digest, 0) + 1
            self._watch.collected(blob_resource(digest))
        return freed


class HoldersNotChecked(CollectedRefs):
    """Broken: what is to go goes, whoever holds it."""

    def _is_held(self, resource):
        return False


class Collector:
    """A process that goes through all blobs, again and again."""

    def __init__(self, farm, refs, link):
        self.process = process = farm.loop.process("collector")
        self._farm = farm
        self._refs = Remote(farm.redis, process, refs)
        self._bucket = Bucket(farm.bucket, process, link)

    async def run(self):
        """Collect for ever."""
        while True:
            await asyncio.sleep(_ROUND_S * (0.5 + self._farm.network.rng.random()))
            try:
                await self._refs.condemn(sorted(self._farm.redis.memory.blobs), grace_s=_GRACE_S)
                doomed = await self._refs.due(_AT_ONCE)
                for one in doomed:
                    await self._bucket.call("delete", one.key)
                await self._refs.deleted(doomed)
            except ClusterError:
                continue  # what is left of it comes with the next round
