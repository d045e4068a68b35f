"""The workers of all nodes, as a scheduler calls them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from actors.handles import FetchWorkerHandle, OpWorkerHandle
from actors.placement import Placement
from cluster.errors import ActorLostError, NodeNotFoundError

T = TypeVar("T")

#: Seconds for which a call is made again while the worker it goes to is being restarted.
RETRY_S = 30.0
RETRY_PAUSE_S = 0.5


class Workers:
    """Handles of one farm's workers by node."""

    def __init__(self, placement: Placement, *, farm: str, version: str) -> None:
        self._placement = placement
        self._farm = farm
        self._version = version
        #: One a node: its calls share what it may have under way there.
        self._fetchers: dict[str, FetchWorkerHandle] = {}

    def fetch_worker(self, node: str) -> FetchWorkerHandle:
        """Return a node's fetch worker."""
        if node not in self._fetchers:
            self._fetchers[node] = FetchWorkerHandle.of_node(node, farm=self._farm, version=self._version)
        return self._fetchers[node]

    def op_worker(self, node: str) -> OpWorkerHandle:
        """Return a node's op worker."""
        return OpWorkerHandle.of_node(node, farm=self._farm, version=self._version)

    async def on_any(self, call: Callable[[FetchWorkerHandle], Awaitable[T]]) -> T:
        """Make an idempotent call at any node's fetch worker, again elsewhere while that is being restarted.

        Raises:
            ActorLostError, NodeNotFoundError: for too long.
        """
        give_up_s = time.monotonic() + RETRY_S
        while True:
            try:
                return await call(self.fetch_worker(await self._placement.any_node()))
            except (ActorLostError, NodeNotFoundError):
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)
