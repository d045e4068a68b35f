"""Progress streams in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from cluster.errors import ClusterError, WireError
from cluster.progress import ProgressItem
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


def _item(fields: list[bytes]) -> ProgressItem | None:
    """Return an entry's item; None for what another release wrote and is not understood here."""
    try:
        return _ITEM.decode(fields[1])
    except WireError:
        return None
