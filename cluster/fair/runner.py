"""Slots of one event loop that are shared fairly between tenants.

Performs what :class:`cluster.fair.state.FairQueue` decides, and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from cluster.fair.state import FairQueue, Ticket


class FairSlots:
    """A number of slots, each kept by one piece of work at a time; see :class:`cluster.fair.state.FairQueue`."""

    def __init__(self, slots: int) -> None:
        self._queue = FairQueue(slots)
        self._numbers = itertools.count(1)
        #: Resolved by the grant, for each ticket that waits.
        self._granted: dict[Ticket, asyncio.Future[None]] = {}
        #: What waits, by what it is for: mostly one ticket each.
        self._keys: dict[str, set[Ticket]] = {}

    def __repr__(self) -> str:
        return f"<FairSlots {self._queue.waiting} waiting>"

    @asynccontextmanager
    async def slot(self, key: str, tenants: Iterable[str]) -> AsyncIterator[None]:
        """Hold a slot; waits its turn.

        Args:
            key: What it is for, as :meth:`also_for` names it.
            tenants: Who wants it; "" stands for nobody in particular, as does nobody.
        """
        ticket = Ticket(next(self._numbers))
        granted = self._granted[ticket] = asyncio.get_running_loop().create_future()
        self._keys.setdefault(key, set()).add(ticket)
        for tenant in [*tenants] or [""]:
            self._queue.ask(ticket, tenant)
        try:
            try:
                self._grant()
                await granted
            finally:
                self._forget_wait(key, ticket)
            yield
        finally:
            # Also where it was granted in the very turn of the loop in which its waiter was cancelled.
            self._queue.leave(ticket)
            self._grant()

    def also_for(self, key: str, tenant: str) -> None:
        """Say that a tenant wants, too, what waits for a slot under that key; nothing where nothing does."""
        for ticket in self._keys.get(key, ()):
            if not self._granted[ticket].done():
                self._queue.ask(ticket, tenant)

    def _grant(self) -> None:
        while (ticket := self._queue.grant()) is not None:
            granted = self._granted[ticket]
            # One that has been cancelled, and has not run since, gives the slot back when it does.
            if not granted.done():
                granted.set_result(None)

    def _forget_wait(self, key: str, ticket: Ticket) -> None:
        del self._granted[ticket]
        self._keys[key].discard(ticket)
        if not self._keys[key]:
            del self._keys[key]
