"""Collection: blobs that no lease holds go, while others come for them.

Two-phase, as the design wants it: one step in Redis sees that nobody holds a blob and makes it absent; then its object
goes from S3, after a grace, by the key that only that upload had.
"""

from __future__ import annotations

import asyncio

from cluster.errors import ClusterError
from cluster.lease import blob_resource, ref_resource
from tests.simulation.services import Bucket, Remote

_ROUND_S = 0.5
_GRACE_S = 1.0


class CollectedRefs:
    """The step in Redis."""

    def __init__(self, watch, redis):
        self._watch = watch
        self._redis = redis
        #: How often each blob was collected.
        self.times = {}

    async def condemn(self, digest):
        """Make a blob absent unless somebody holds it; return what it was, or None."""
        memory = self._redis.memory
        blob = memory.blobs.get(digest)
        if blob is None or self._is_held(digest):
            return None
        del memory.blobs[digest]
        self.times[digest] = self.times.get(digest, 0) + 1
        self._watch.collected(blob_resource(digest))
        return blob

    def _is_held(self, digest):
        memory = self._redis.memory
        names = {ref_resource(ref) for ref, record in memory.records.items() if record.blob.digest == digest}
        names.add(blob_resource(digest))
        live = (lease for lease in memory.leases.values() if memory.is_live(lease.id))
        return any(names.intersection(lease.resources) for lease in live)


class HoldersNotChecked(CollectedRefs):
    """Broken: what is to go goes, whoever holds it."""

    def _is_held(self, digest):
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
            for digest in sorted(self._farm.redis.memory.blobs):
                try:
                    blob = await self._refs.condemn(digest)
                    if blob is not None:
                        await asyncio.sleep(_GRACE_S)
                        await self._bucket.call("delete", blob.key)
                except ClusterError:
                    continue  # what is left of it is swept
