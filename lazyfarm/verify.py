"""Verifying a farm's content store: every node's fetch worker reads its share; no byte comes to the driver."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from cluster.cache.names import find_ref
from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.collect.verify import Verified, batches
from cluster.digest import Digest
from cluster.drain import taking_work
from cluster.errors import ActorLostError, ClusterError, InvalidArgumentError, NodeNotFoundError, first_error
from cluster.messages import NodeRecord, VerifyRequest
from cluster.ports import ObjectInfo, RefStore
from cluster.ref import BlobRecord
from cluster.settings import FarmSettings

if TYPE_CHECKING:
    from actors.handles import FetchWorkerHandle
    from cluster.collect.ports import CollectStore

#: What one call reads at most, unless one blob is more: what is read again when a worker dies meanwhile.
_BATCH_BYTES = 64 * 1024**2
_BATCH = 100
#: Seconds that a call may take beyond twice what it takes at its rate.
_SLACK_S = 120.0

OnNode = Callable[[str, Callable[["FetchWorkerHandle"], Awaitable[Verified]]], Awaitable[Verified]]


class FarmVerify:
    """Verifies what is present.

    Args:
        refs: What is recorded.
        store: All blobs.
        nodes: Tells which nodes there are.
        on_node: Calls a node's fetch worker.
        deadline_s: Seconds that a call may take that keeps to no rate.
    """

    def __init__(
        self,
        *,
        refs: RefStore,
        store: CollectStore,
        nodes: Callable[[], Awaitable[list[NodeRecord]]],
        on_node: OnNode,
        deadline_s: float,
    ) -> None:
        self._refs = refs
        self._store = store
        self._nodes = nodes
        self._on_node = on_node
        self._deadline_s = deadline_s

    async def verify(
        self, names: Sequence[str], *, repair: bool, bytes_per_s: float, on_verified: Callable[[Verified], object]
    ) -> Verified:
        """Verify blobs; see :meth:`lazyfarm.farm.Farm.verify`."""
        if bytes_per_s < 0:
            raise InvalidArgumentError("bytes_per_s", f"{bytes_per_s:g}", "it is at least 0")
        wanted = await self._wanted(names) if names else None
        blobs = [blob for blob in await self._store.blobs() if wanted is None or blob.digest in wanted]
        work = batches(blobs, most=_BATCH, most_bytes=_BATCH_BYTES)
        # One that drains reads nothing new, and nobody but itself could read its copies: they go, or it comes back.
        nodes = taking_work(await self._nodes())
        total = Verified()

        async def call(node: str, batch: Sequence[BlobRecord], *, copies: bool) -> None:
            nonlocal total
            rate = bytes_per_s / len(nodes)
            request = VerifyRequest(
                digests=tuple(blob.digest for blob in batch), copies=copies, repair=repair, bytes_per_s=rate
            )
            # A damaged one is read twice.
            read_s = 2 * sum(blob.size_bytes for blob in batch) / rate if rate else self._deadline_s
            total += await self._on_node(node, lambda worker: worker.verify(request, timeout_s=2 * read_s + _SLACK_S))
            on_verified(total)

        await _shared(nodes, work, call)
        return total

    async def _wanted(self, names: Sequence[str]) -> set[Digest]:
        """Return the blobs of refs and images, documents among them; raises as :func:`find_ref`."""
        wanted: set[Digest] = set()
        for name in names:
            image, ref_id = await find_ref(self._refs, name)
            if image is not None:
                wanted |= {image.manifest.digest, image.config.digest}
            if ref_id is not None:
                wanted |= {state.record.blob.digest for state in await self._refs.chain(ref_id)}
        return wanted


async def _shared(
    nodes: Sequence[str], work: Sequence[Sequence[BlobRecord]], call: Callable[..., Awaitable[None]]
) -> None:
    """Have each node verify all of its copies, and all together the content store; what a lost one had, others do.

    Raises:
        ClusterError: what the last node was lost by, or what is no node's own trouble.
    """
    left = deque(work)
    copies = dict.fromkeys(nodes, work)  # of nodes that have not looked at theirs yet

    async def at(node: str) -> ClusterError | None:
        try:
            for batch in copies.pop(node, ()):
                await call(node, batch, copies=True)
            while left:
                batch = left.popleft()
                try:
                    await call(node, batch, copies=False)
                except BaseException:
                    left.append(batch)
                    raise
        except (ActorLostError, NodeNotFoundError) as exc:
            return exc
        return None

    while nodes:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {node: group.create_task(at(node)) for node in nodes}
        except BaseExceptionGroup as found:
            raise first_error(found) from None
        errors = [error for task in tasks.values() if (error := task.result()) is not None]
        if not left:
            return
        nodes = [node for node, task in tasks.items() if task.result() is None]
        if not nodes:
            raise errors[-1]


def quarantined(settings: FarmSettings) -> list[ObjectInfo]:
    """Return the damaged objects that verifying put aside; UnavailableError if S3 doesn't answer."""
    from storage.blobs import S3ContentStore  # noqa: PLC0415 - boto3, which few drivers need

    store = S3ContentStore(settings.config.s3)
    try:
        return list(store.objects(QUARANTINE_PREFIX))
    finally:
        store.close()
