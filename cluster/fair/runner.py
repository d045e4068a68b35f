"""Slots of one event loop that are shared fairly between tenants.

Performs what :class:`cluster.fair.state.FairQueue` decides, and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cluster.fair.state import FairQueue, Ticket


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One wait for a slot, and then the slot."""

    ticket: Ticket
    key: str
    #: Done once the slot is there.
    granted: asyncio.Future[None]


class FairSlots:
    """A number of slots, each kept by one piece of work at a time; see :class:`cluster.fair.state.FairQueue`."""

    def __init__(self, slots: int) -> None:
        self._queue = FairQueue(slots)
        self._numbers = itertools.count(1)
        self._waiting: dict[Ticket, Ask] = {}
        #: What waits, by what it is for: mostly one ticket each.
        self._keys: dict[str, set[Ticket]] = {}

    def __repr__(self) -> str:
        return f"<FairSlots {self._queue.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return self._queue.waiting

    @asynccontextmanager
    async def slot(self, key: str, tenants: Iterable[str]) -> AsyncIterator[None]:
        """Hold a slot; waits its turn. See :meth:`ask`."""
        ask = self.ask(key, tenants)
        try:
            await ask.granted
            yield
        finally:
            # Also where it was granted in the very turn of the loop in which its waiter was cancelled.
            self.leave(ask)

    def ask(self, key: str, tenants: Iterable[str]) -> Ask:
        """Stand in line for a slot, and keep it, until :meth:`leave`.

        Args:
            key: What it is for, as :meth:`also_for` names it.
            tenants: Who wants it; "" stands for nobody in particular, as does nobody.
        """
        ticket = Ticket(next(self._numbers))
        ask = Ask(ticket, key, asyncio.get_running_loop().create_future())
        self._waiting[ticket] = ask
        self._keys.setdefault(key, set()).add(ticket)
        for tenant in [*tenants] or [""]:
            self._queue.ask(ticket, tenant)
        self._grant()
        return ask

    def leave(self, ask: Ask) -> None:
        """Give the slot to who is next, or one's place in the line up."""
        if ask.ticket in self._waiting:
            self._forget_wait(ask.ticket)
        self._queue.leave(ask.ticket)
        self._grant()

    def also_for(self, key: str, tenant: str) -> None:
        """Say that a tenant wants, too, what waits for a slot under that key; nothing where nothing does."""
        for ticket in self._keys.get(key, ()):
            self._queue.ask(ticket, tenant)

    def _grant(self) -> None:
        while (ticket := self._queue.grant()) is not None:
            granted = self._forget_wait(ticket).granted
            # One that has been cancelled, and has not run since, gives the slot back when it does.
            if not granted.done():
                granted.set_result(None)

    def _forget_wait(self, ticket: Ticket) -> Ask:
        ask = self._waiting.pop(ticket)
        self._keys[ask.key].discard(ticket)
        if not self._keys[ask.key]:
            del self._keys[ask.key]
        return ask
