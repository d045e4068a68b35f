"""Whose turn it is for a slot: a pure decision.

A *tenant* is whoever gets a share of its own: a driver's session, or a job. How much a tenant asks for moves
nobody but itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NewType

from cluster.errors import InternalError

#: One wait for a slot, of a number never used before.
Ticket = NewType("Ticket", int)


@dataclass(slots=True, eq=False)
class _Tenant:
    """One tenant, for as long as it waits for slots or has some."""

    #: Slots it has.
    held: int = 0
    #: Its tickets, in the order they came (a dict as an ordered set).
    line: dict[Ticket, None] = field(default_factory=dict)


class FairQueue:
    """A number of slots, and who waits for one.

    A slot that comes free goes to the tenant that has the fewest, of several to the one that has been in that
    place for longest, and there to the ticket that came first: max-min fairness over slots, which needs no
    guess at how long a slot will be kept. So a tenant that has none waits for as many grants as there are tenants
    before it, however many tickets those have. A ticket may be wanted by several tenants, and stands in the line
    of each; the one whose turn it was pays for it.
    """

    __slots__ = ("_free", "_holders", "_places", "_tenants", "_waiting")

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._tenants: dict[str, _Tenant] = {}
        #: Tenants with somebody in line, by how many slots they have, in the order they came to that place.
        self._places: list[dict[str, None]] = [{} for _ in range(slots + 1)]
        #: Who wants each ticket that waits (a dict as an ordered set).
        self._waiting: dict[Ticket, dict[str, None]] = {}
        #: Who pays for each ticket that has a slot.
        self._holders: dict[Ticket, str] = {}

    @property
    def waiting(self) -> int:
        """Return how many tickets wait."""
        return len(self._waiting)

    def ask(self, ticket: Ticket, tenant: str) -> None:
        """Put a new ticket into *tenant*'s line; one that waits already into that line, too."""
        wanted_by = self._waiting.setdefault(ticket, {})
        if tenant not in wanted_by:
            wanted_by[tenant] = None
            known = self._tenants.setdefault(tenant, _Tenant())
            known.line[ticket] = None
            self._places[known.held].setdefault(tenant)

    def grant(self) -> Ticket | None:
        """Give a free slot to the ticket whose turn it is; None where there is no slot, or nobody waits."""
        if not self._free or not self._waiting:
            return None
        name = next(next(iter(place)) for place in self._places if place)
        tenant = self._tenants[name]
        ticket = next(iter(tenant.line))
        self._free -= 1
        self._holders[ticket] = name
        self._move(name, tenant, 1)
        self._take_out(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket back that waits, or give its slot back."""
        if ticket in self._waiting:
            self._take_out(ticket)
            return
        name = self._holders.pop(ticket)
        self._free += 1
        self._move(name, self._tenants[name], -1)

    def validate(self) -> None:
        """Check every invariant; for tests and for those who debug.

        Raises:
            InternalError: one is broken; says which.
        """
        held = Counter(self._holders.values())
        slots = len(self._places) - 1
        _require(self._free + len(self._holders) == slots, "a slot was lost or made")
        _require(self._holders.keys().isdisjoint(self._waiting), "a ticket waits and has a slot")
        _require(all(self._waiting.values()), "a ticket waits in nobody's line")
        for name, tenant in self._tenants.items():
            _require(tenant.held == held[name], f"{name} has {held[name]} slots, not {tenant.held}")
            _require(bool(tenant.held or tenant.line), f"{name} is remembered for nothing")
            _require(
                list(tenant.line) == [ticket for ticket in tenant.line if name in self._waiting.get(ticket, ())],
                f"{name} has a ticket in line that does not wait for it",
            )
            places = [number for number, place in enumerate(self._places) if name in place]
            _require(places == ([tenant.held] if tenant.line else []), f"{name} is at {places}")
        lines = sum(len(tenant.line) for tenant in self._tenants.values())
        _require(lines == sum(map(len, self._waiting.values())), "a ticket is missing in a line")

    def _take_out(self, ticket: Ticket) -> None:
        """Take a ticket out of every line."""
        for name in self._waiting.pop(ticket):
            tenant = self._tenants[name]
            del tenant.line[ticket]
            if not tenant.line:
                del self._places[tenant.held][name]
                self._forget_if_idle(name, tenant)

    def _move(self, name: str, tenant: _Tenant, slots: int) -> None:
        """Note that a tenant has that many slots more; who waits there already comes before it."""
        self._places[tenant.held].pop(name, None)
        tenant.held += slots
        if tenant.line:
            self._places[tenant.held][name] = None
        self._forget_if_idle(name, tenant)

    def _forget_if_idle(self, name: str, tenant: _Tenant) -> None:
        if not tenant.held and not tenant.line:
            del self._tenants[name]


def _require(holds: bool, story: str) -> None:  # noqa: FBT001 - an assertion reads best this way
    if not holds:
        raise InternalError(story)
