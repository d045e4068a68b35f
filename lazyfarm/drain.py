"""Draining a farm's nodes, over its Redis alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Self

from cluster.drain import Settling, UnderWay, under_way
from cluster.errors import InvalidArgumentError, NodeNotFoundError
from cluster.ports import FlightStore
from cluster.settings import FarmSettings
from cluster.solver_ports import Whereabouts
from lazyfarm.redis_only import connection
from storage.flights import RedisFlightStore
from storage.keys import Keys
from storage.link import RedisLink
from storage.presence import PRESENCE_TTL_S, Presence
from storage.whereabouts import RedisWhereabouts

#: Seconds that a drain waits if nobody says otherwise.
DRAIN_S = 600.0
#: Seconds for which nothing is to be seen of a node: workers tell every third of it how many calls they have.
_SETTLE_S = PRESENCE_TTL_S
_LOOK_S = 0.5


class FarmDrain:
    """Drains nodes of one farm. Every method may raise UnavailableError: Redis doesn't answer.

    Args:
        presence: Who is there, and drains.
        flights: Who fetches.
        whereabouts: Who runs ops.
        clock: Monotonic seconds.
        pause: Waits for some seconds.
    """

    def __init__(
        self,
        presence: Presence,
        flights: FlightStore,
        whereabouts: Whereabouts,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._presence = presence
        self._flights = flights
        self._whereabouts = whereabouts
        self._clock = clock
        self._pause = pause

    @classmethod
    def over(cls, link: RedisLink, keys: Keys) -> Self:
        """Return that of a farm whose Redis a client is connected to."""
        return cls(Presence(link, keys), RedisFlightStore(link, keys), RedisWhereabouts(link, keys))

    async def drain(
        self, node: str, *, timeout_s: float = DRAIN_S, on_left: Callable[[UnderWay], object] = lambda _: None
    ) -> UnderWay:
        """Have a node get nothing new; wait until it has ended what it has, and return what is left of it.

        Raises:
            NodeNotFoundError: there is no such node. InvalidArgumentError: *timeout_s* is below 0.
        """
        if not timeout_s >= 0:
            raise InvalidArgumentError("timeout_s", f"{timeout_s:g}", "it is at least 0")
        await self._raise_if_unknown(node)
        await self._presence.drain(node)
        give_up_s = self._clock() + timeout_s
        settling = Settling(_SETTLE_S)
        while True:
            left = await self._left(node)
            on_left(left)
            if settling.saw(left, now_s := self._clock()) or now_s >= give_up_s:
                return left
            await self._pause(min(_LOOK_S, give_up_s - now_s))

    async def undrain(self, node: str) -> None:
        """Have a node take work again, whether it drained or not; NodeNotFoundError where there is no such node.

        One that has just been started, and is not told of yet, is known by that it drained.
        """
        if not await self._presence.undrain(node):
            await self._raise_if_unknown(node)

    async def _raise_if_unknown(self, node: str) -> None:
        if node not in {record.id for record in await self._presence.nodes()}:
            raise NodeNotFoundError(node)

    async def _left(self, node: str) -> UnderWay:
        located, flights, actors = await asyncio.gather(
            self._whereabouts.find([], [node]), self._flights.under_way(), self._presence.actors()
        )
        owners = [str(flight["owner"]) for flight in flights.values()]
        return under_way(node, ops=located.running[node], owners=owners, actors=actors)


@asynccontextmanager
async def open_drain(settings: FarmSettings) -> AsyncIterator[FarmDrain]:
    """Connect to a farm's Redis for as long as the body runs; FarmNotRunningError if the settings name none."""
    async with connection(settings) as (link, keys):
        yield FarmDrain.over(link, keys)
