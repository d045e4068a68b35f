"""What a farm has moved and what it has not had to, over time, in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.traffic import Traffic
from storage.keys import Keys
from storage.link import RedisLink

#: Seconds that the figures of one slot of time cover, and that they are kept.
SLOT_S = 300
KEPT_S = 7 * 86400


class RedisTraffic:
    """Sums, in all and by slots of time, by Redis's clock."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    def note(self, traffic: Traffic) -> None:
        """Add to the sums. Nobody waits for it, and figures that are lost with a connection stay lost."""
        if figures := traffic.figures:
            told = [part for figure in figures.items() for part in figure]
            self._link.run_soon("traffic_note", self._keys.prefix, SLOT_S, KEPT_S, *told)

    async def total(self) -> Traffic:
        """Return the sum of all that was ever noted."""
        return _traffic(await self._link.execute("HGETALL", self._keys.traffic, may_repeat=True))

    async def since(self, wall_s: float, now_wall_s: float) -> list[tuple[int, Traffic]]:
        """Return each slot from the one that *wall_s* is in to the one that it is now, with when it began."""
        first = max(wall_s, now_wall_s - KEPT_S)
        starts = range(int(first) // SLOT_S * SLOT_S, int(now_wall_s) + 1, SLOT_S)
        found = await self._link.execute_many(
            [("HGETALL", self._keys.traffic_slot(start)) for start in starts], may_repeat=True
        )
        return [(start, _traffic(figures)) for start, figures in zip(starts, found, strict=True)]


def _traffic(figures: Sequence[bytes]) -> Traffic:
    names = [name.decode() for name in figures[::2]]
    return Traffic.of_figures(dict(zip(names, map(int, figures[1::2]), strict=True)))
