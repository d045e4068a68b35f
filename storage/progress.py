"""Progress streams in Redis, and those among them that are part of a job's events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from cluster.errors import ClusterError, WireError
from cluster.job import JobId, VertexLayers, parse_layer_stream
from cluster.ports import ProgressStore
from cluster.progress import ProgressItem
from cluster.solver_ports import JobEvents
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink
from storage.protocol import Command

#: Items that a stream keeps, about.
_ITEMS = 10_000
#: Seconds that a stream is kept after its last item.
_KEPT_S = 24 * 3600
#: Items read at once.
_READ = 500
#: Seconds that one blocking read lasts; far below the link's deadline.
_BLOCK_S = 2.0

_ITEM: Codec[ProgressItem] = Codec("progress", ProgressItem)


class RedisProgressStore:
    """Implements :class:`cluster.ports.ProgressStore` with Redis streams."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def publish(self, streams: Sequence[str], item: ProgressItem) -> None:
        """Append *item* to each of *streams*; an error is dropped, as nobody's work hangs on progress."""
        payload = _ITEM.encode(item)
        commands: list[Command] = []
        for stream in streams:
            key = self._keys.progress(stream)
            commands += [("XADD", key, "MAXLEN", "~", _ITEMS, "*", "p", payload), ("EXPIRE", key, _KEPT_S)]
        try:
            await self._link.execute_many(commands)
        except ClusterError:
            return

    async def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield the stream's items from its start, then live, until it ends; raises UnavailableError."""
        key = self._keys.progress(stream)
        last: bytes | str = "0"
        # A blocking read holds up whatever comes after it on its connection.
        link = self._link.clone()
        block_ms = int(min(_BLOCK_S, link.address.timeout_s / 3) * 1000)
        try:
            while True:
                command = ("XREAD", "COUNT", _READ, "BLOCK", block_ms, "STREAMS", key, last)
                for _, entries in await link.execute(*command, may_repeat=True) or []:
                    for entry_id, fields in entries:
                        last = entry_id
                        if (item := _item(fields)) is None:
                            continue
                        if item.item == "":
                            return
                        yield item
        finally:
            await link.close()


class JobProgress:
    """Implements :class:`cluster.ports.ProgressStore` where some streams are jobs' (:func:`cluster.job.layer_stream`).

    What is published there is told to the job, as layers of the vertex; whoever follows the job sees it.

    Args:
        streams: All other streams.
        jobs: Those of jobs.
    """

    def __init__(self, streams: ProgressStore, jobs: JobEvents) -> None:
        self._streams = streams
        self._jobs = jobs

    async def publish(self, streams: Sequence[str], item: ProgressItem) -> None:
        """Append *item* to each of *streams*; best effort."""
        others: list[str] = []
        told: dict[JobId, list[VertexLayers]] = {}
        for stream in streams:
            if (owner := parse_layer_stream(stream)) is None:
                others.append(stream)
            else:
                job, vertex = owner
                told.setdefault(job, []).append(VertexLayers(vertex=vertex, item=item))
        if others:
            await self._streams.publish(others, item)
        for job, events in told.items():
            with contextlib.suppress(ClusterError):  # it is unknown by now, or Redis is away
                await self._jobs.publish(job, events)

    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield the items of a stream that is no job's."""
        return self._streams.follow(stream)


def _item(fields: list[bytes]) -> ProgressItem | None:
    """Return an entry's item; None for what another release wrote and is not understood here."""
    try:
        return _ITEM.decode(fields[1])
    except WireError:
        return None
