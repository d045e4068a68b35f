"""Fair slots under every order of asking, leaving and giving back; broken variants of it are caught.

The model knows who waits and who has a slot, from the calls and the grants alone:

- ``bounded``: a tenant that has no slot waits for no more grants than there are tenants that waited before it;
- ``fewest``: no slot goes to a tenant while another that waits has fewer;
- ``order``: of one tenant's tickets, the one that came first is served first;
- ``slots``: never more slots than there are, and none lies idle while somebody waits.
"""

import asyncio
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.fair.runner import FairSlots
from cluster.fair.state import FairQueue, Ticket
from tests.doubles.machines import BrokenInvariantError, assert_caught
from tests.doubles.stores import eventually

SLOTS = 3
TENANTS = ("a", "b", "c", "d")


class FairQueueMachine(RuleBasedStateMachine):
    """Drives a :class:`FairQueue` as its runner does: whatever changes, all that can be granted is."""

    make_queue = FairQueue
    checked = frozenset({"bounded", "fewest", "order", "slots"})

    def __init__(self):
        super().__init__()
        self.queue = self.make_queue(SLOTS)
        #: Tickets that wait, and who wants each.
        self.waiting = {}
        #: Tickets that have a slot, and who of those that wanted it may have been asked to pay.
        self.holding = {}
        self.held = dict.fromkeys(TENANTS, 0)
        #: For each tenant that waits and has no slot: how many grants to others it has yet to bear.
        self.patience = {}
        self.next_ticket = 1

    def expect(self, name, holds, story):
        if name in self.checked and not holds:
            raise BrokenInvariantError(name, story)

    def in_line(self):
        return {tenant for wanted_by in self.waiting.values() for tenant in wanted_by}

    def grant_all(self):
        while (ticket := self.queue.grant()) is not None:
            self.expect("slots", ticket in self.waiting, f"{ticket} does not wait, and is granted a slot")
            in_line = self.in_line()
            wanted_by = self.waiting.pop(ticket)
            payer = self.queue._holders[ticket]
            assert payer in wanted_by
            fewest = min(self.held[tenant] for tenant in in_line)
            self.expect("fewest", self.held[payer] == fewest, f"{payer} has {self.held[payer]}, another {fewest}")
            earlier = [one for one, tenants in self.waiting.items() if payer in tenants and one < ticket]
            self.expect("order", not earlier, f"{payer}: {ticket} before {earlier}")
            self.held[payer] += 1
            self.holding[ticket] = payer
            self.expect("slots", len(self.holding) <= SLOTS, "more slots than there are")
            for tenant in list(self.patience):
                if tenant in wanted_by or tenant not in self.in_line():
                    del self.patience[tenant]
                else:
                    self.patience[tenant] -= 1
                    self.expect("bounded", self.patience[tenant] >= 0, f"{tenant} is passed over")
            self.note_patient()
        self.expect("slots", len(self.holding) == SLOTS or not self.waiting, "a slot lies idle while somebody waits")
        self.note_patient()

    def note_patient(self):
        """Note for who has come to wait without a slot how many come before."""
        without = {tenant for tenant in self.in_line() if not self.held[tenant]}
        for tenant in list(self.patience):
            if tenant not in without:
                del self.patience[tenant]
        for tenant in sorted(without - self.patience.keys()):
            self.patience[tenant] = len(without) - 1

    @rule(data=st.data(), wanted_by=st.sets(st.sampled_from(TENANTS), min_size=1, max_size=2))
    def ask(self, data, wanted_by):
        ticket, self.next_ticket = Ticket(self.next_ticket), self.next_ticket + 1
        self.waiting[ticket] = sorted(wanted_by)
        for tenant in self.waiting[ticket]:
            self.queue.ask(ticket, tenant)
        self.grant_all()

    @rule(tenant=st.sampled_from(TENANTS), count=st.integers(2, 8))
    def flood(self, tenant, count):
        for _ in range(count):
            ticket, self.next_ticket = Ticket(self.next_ticket), self.next_ticket + 1
            self.waiting[ticket] = [tenant]
            self.queue.ask(ticket, tenant)
        self.grant_all()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), tenant=st.sampled_from(TENANTS))
    def give_up(self, data, tenant):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)), label="ticket")
        del self.waiting[ticket]
        self.queue.leave(ticket)
        self.note_patient()
        self.grant_all()

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def give_back(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.holding)), label="ticket")
        self.held[self.holding.pop(ticket)] -= 1
        self.queue.leave(ticket)
        self.note_patient()
        self.grant_all()

    @invariant()
    def the_queue_is_sound(self):
        if type(self.queue) is FairQueue:
            self.queue.validate()

    def teardown(self):
        """When all is given back, nothing is remembered."""
        for _ in range(self.next_ticket):
            for ticket in list(self.holding):
                self.held[self.holding.pop(ticket)] -= 1
                self.queue.leave(ticket)
            self.note_patient()
            self.grant_all()
        assert not self.holding
        if type(self.queue) is FairQueue:
            assert not self.queue._tenants
            assert not self.queue.waiting


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFairQueue.__doc__ = "No order of asking, leaving and giving back starves a tenant or loses a slot."


# -- broken variants --------------------------------------------------------------------------------------


class FirstComeFirstServed:
    """Has one line for all."""

    def __init__(self, slots):
        self._free = slots
        self._line = {}
        self._holders = {}

    def ask(self, ticket, tenant):
        self._line.setdefault(ticket, tenant)

    def grant(self):
        if not self._free or not self._line:
            return None
        ticket = self._choose()
        self._holders[ticket] = self._line.pop(ticket)
        self._free -= 1
        return ticket

    def _choose(self):
        return next(iter(self._line))

    def leave(self, ticket):
        if self._line.pop(ticket, None) is None:
            del self._holders[ticket]
            self._free += 1


class ServesTenantsInTurn(FirstComeFirstServed):
    """Forgets how many slots each has by then."""

    _turn = 0

    def _choose(self):
        tenants = sorted(set(self._line.values()))
        self._turn += 1
        tenant = tenants[self._turn % len(tenants)]
        return next(ticket for ticket, wants in self._line.items() if wants == tenant)


class ServesTheLatestFirst(FairQueue):
    """Takes a tenant's tickets from the end of its line."""

    def grant(self):
        self._turn_round()
        try:
            return super().grant()
        finally:
            self._turn_round()

    def _turn_round(self):
        for tenant in self._tenants.values():
            tenant.line = dict(reversed(tenant.line.items()))


class LosesASlot(FairQueue):
    """Takes a slot that is given back for one that was never granted."""

    def leave(self, ticket):
        had_slot = ticket in self._holders
        super().leave(ticket)
        self._free -= had_slot


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (FirstComeFirstServed, "bounded"),
        (FirstComeFirstServed, "fewest"),
        (ServesTenantsInTurn, "fewest"),
        (ServesTheLatestFirst, "order"),
        (LosesASlot, "slots"),
    ],
)
def test_each_broken_queue_is_caught(mutant, name):
    """Every rule is checked: who breaks it is found out by it."""
    machine = type("Broken", (FairQueueMachine,), {"make_queue": mutant, "__module__": __name__})
    assert_caught(machine, name, examples=1000, steps=40)


# -- slots of an event loop ---------------------------------------------------------------------------------


async def storm(slots, rng, tenants, *, works, leave):
    """Have many pieces of work ask for slots, some of which are cancelled; return how many came to their end."""
    running, most, done = 0, 0, 0

    async def work(number):
        nonlocal running, most, done
        async with slots.slot(f"key {number % 7}", [rng.choice(tenants)]):
            running += 1
            most = max(most, running)
            try:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                running -= 1
            done += 1

    tasks = [asyncio.create_task(work(number)) for number in range(works)]
    doomed = rng.sample(tasks, leave)
    while pending := [task for task in tasks if not task.done()]:
        slots.also_for(f"key {rng.randrange(7)}", rng.choice(tenants))
        if doomed and rng.random() < 0.7:
            doomed.pop().cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        assert len(pending) <= works
    assert not running
    return most, done


@pytest.mark.parametrize("seed", range(20))
async def test_no_wake_up_is_lost(seed):
    """Whoever is cancelled, whenever: everybody else gets a slot, and all of them are free in the end."""
    slots, rng = FairSlots(SLOTS), random.Random(seed)  # noqa: S311 - a test's schedule
    most, done = await asyncio.wait_for(storm(slots, rng, TENANTS, works=60, leave=30), 20)
    assert most == SLOTS
    assert done >= 30
    slots._queue.validate()
    assert (slots._queue._free, slots._queue._tenants, slots._waiting, slots._keys) == (SLOTS, {}, {}, {})


class ForgetsToWake(FairSlots):
    """Wakes nobody when a waiter leaves."""

    def _forget_wait(self, key, ticket):
        super()._forget_wait(key, ticket)
        if self._queue.waiting:
            self._grant = lambda: None


async def test_a_lost_wake_up_is_caught():
    """The storm above ends only where every slot that is given back wakes somebody."""
    slots, rng = ForgetsToWake(SLOTS), random.Random(1)  # noqa: S311 - a test's schedule
    running = asyncio.create_task(storm(slots, rng, TENANTS, works=60, leave=30))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(running, 0.5)


async def test_a_slot_granted_to_one_that_is_cancelled_in_the_same_turn_goes_on():
    """Granted and cancelled at once: the next gets the slot."""
    slots = FairSlots(1)
    entered = []

    async def work(name):
        async with slots.slot(name, [name]):
            entered.append(name)

    async with slots.slot("a", ["a"]):
        second, third = asyncio.create_task(work("b")), asyncio.create_task(work("c"))
        await eventually(lambda: slots._queue.waiting == 2)
    second.cancel()  # granted just now, it has not run since
    await asyncio.wait_for(third, 5)
    assert entered == ["c"]
    assert second.cancelled()


async def test_who_joins_a_wait_of_anothers_brings_its_own_turn_along():
    """Work far back in one tenant's line is served as soon as another's, once that one wants it, too."""
    slots, order, hold = FairSlots(1), [], asyncio.Event()

    async def work(number):
        async with slots.slot(f"layer {number}", ["flood"]):
            order.append(number)
            await hold.wait()

    tasks = [asyncio.create_task(work(number)) for number in range(100)]
    await eventually(lambda: slots._queue.waiting == 99)
    slots.also_for("layer 70", "late")
    slots.also_for("no such layer", "late")
    hold.set()
    await asyncio.gather(*tasks)
    assert order.index(70) == 1
