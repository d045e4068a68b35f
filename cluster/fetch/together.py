"""What several ask at the same moment, asked together."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

G = TypeVar("G", bound=Hashable)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why a request has no answers."""

    error: Exception


class Together(Generic[G, K, V]):
    """Asks about items, those of a group that are asked about at the same moment in one request. On one event loop.

    A group has one request under way at a time; what comes meanwhile goes into the next one. So nobody is told what was
    so before he asked, and the slower the answers come, the fewer are asked for.

    Args:
        request: Returns the answer about each of some items of a group, in order.
    """

    def __init__(self, request: Callable[[G, Sequence[K]], Awaitable[Sequence[V]]]) -> None:
        self._request = request
        #: What goes into a group's next request; there while one is under way, or about to be.
        self._next: dict[G, dict[K, asyncio.Future[V | _Failed]]] = {}
        #: A loop keeps no reference to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, group: G, item: K) -> V:
        """Return the answer about an item; raises what its request raised. Who is cancelled leaves the others alone."""
        asked = self._next.get(group)
        if asked is None:
            asked = self._next[group] = {}
            # Its first step comes after whatever else asks in this turn of the loop.
            task = asyncio.create_task(self._work_off(group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        future = asked.get(item)
        if future is None:
            future = asked[item] = asyncio.get_running_loop().create_future()
        answer = await asyncio.shield(future)
        if isinstance(answer, _Failed):
            raise copy.copy(answer.error) from answer.error  # a copy: each raises one with a traceback of its own
        return answer

    async def _work_off(self, group: G) -> None:
        while asked := self._next[group]:
            self._next[group] = {}
            try:
                answers: Sequence[V | _Failed] = await self._request(group, list(asked))
            except Exception as exc:  # noqa: BLE001 - it is those who asked that it is raised in
                answers = [_Failed(exc)] * len(asked)
            for future, answer in zip(asked.values(), answers, strict=True):
                future.set_result(answer)
        del self._next[group]
