"""What a farm does at a moment: for ``lazyfarm top``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cluster.job import JobRecord
from cluster.messages import NodeRecord
from cluster.settings import FarmSettings
from lazyfarm.web.flights import Flight

if TYPE_CHECKING:
    from lazyfarm.web.reading import FarmReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What goes on at a moment."""

    nodes: tuple[NodeRecord, ...]
    #: Ops that run, by node.
    ops: dict[str, int]
    flights: tuple[Flight, ...]
    #: Those that have not ended, each with what it is to build.
    jobs: tuple[tuple[JobRecord, tuple[str, ...]], ...]
    now_wall_s: float

    @property
    def rate(self) -> float:
        """Return the bytes a second of all flights."""
        return sum(flight.rate for flight in self.flights)


#: Looks; a flight's rate is told of two looks.
Look = Callable[[], Awaitable[Now]]


async def look(reader: FarmReader) -> Now:
    """Return what goes on."""
    nodes, flights, jobs, now_wall_s = await asyncio.gather(
        reader.nodes(), reader.flights(), reader.newest_jobs(), reader.now_wall_s()
    )
    going = tuple((record, targets) for record, targets in jobs if not record.state.is_end)
    ops = await reader.ops([node.id for node in nodes])
    return Now(nodes=tuple(nodes), ops=ops, flights=tuple(flights), jobs=going, now_wall_s=now_wall_s)


@asynccontextmanager
async def open_looks(settings: FarmSettings) -> AsyncIterator[Look]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    from lazyfarm.web.reading import FarmReader  # noqa: PLC0415 - not where a gateway looks

    reader = FarmReader(settings)
    try:
        yield partial(look, reader)
    finally:
        await reader.aclose()
