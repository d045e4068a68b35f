"""What is held for uses of vertices: a lease each, for as long as it is used and no longer."""

import asyncio
import contextlib

import pytest

from actors.holds import Holds
from cluster.errors import LeaseLostError, UnavailableError
from cluster.lease import LeaseId
from storage.memory import Memory, MemoryLeaseStore
from tests.doubles.stores import FakeClock, eventually

#: Renewals come every third of it; that it lapses is the store's clock's, which tests move.
TTL_S = 0.003


class Leases(MemoryLeaseStore):
    """Leases of a process whose calls can be held up, fail, and are counted."""

    def __init__(self, memory):
        super().__init__(memory)
        self.created = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors = []
        #: Set, and replaced, after each renewal.
        self.renewed = asyncio.Event()

    async def create(self, lease_id, *, ttl_s, labels=None):
        self.created.append(lease_id)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return await super().create(lease_id, ttl_s=ttl_s, labels=labels)

    async def renew(self, lease_id, *, ttl_s):
        try:
            await super().renew(lease_id, ttl_s=ttl_s)
        finally:
            renewed, self.renewed = self.renewed, asyncio.Event()
            renewed.set()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def leases(clock):
    return Leases(Memory(clock))


@pytest.fixture
def holds(leases):
    return Holds(leases, prefix="p", ttl_s=TTL_S)


@contextlib.asynccontextmanager
async def renewing(holds):
    task = asyncio.create_task(holds.renew_forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def live(leases):
    return [lease.id for lease in await leases.leases()]


async def test_a_name_has_one_lease_however_many_ask_at_once(holds, leases):
    """All that is done for one use is held together; what another use holds is apart."""
    leases.gate.clear()
    asking = [asyncio.create_task(holds.lease(name)) for name in ("1", "1", "1", "2")]
    await asyncio.sleep(0)
    leases.gate.set()
    assert await asyncio.gather(*asking) == ["p-1", "p-1", "p-1", "p-2"]
    assert leases.created == ["p-1", "p-2"]
    assert repr(holds) == "<Holds p: 2>"


async def test_a_lease_says_what_it_is_for(holds, leases):
    """Labels of who asked first go with it."""
    await holds.lease("1", {"owner": "vertex"})
    await holds.lease("1", {"owner": "other"})
    assert (await leases.get(LeaseId("p-1"))).labels == {"owner": "vertex"}


async def test_what_is_let_go_of_is_deleted(holds, leases):
    """And nothing else; letting go again, or of what nobody holds, does nothing."""
    for name in ("1", "2"):
        await holds.lease(name)
    for name in ("1", "1", "unheard-of"):
        await holds.release(name)
    assert await live(leases) == ["p-2"]


async def test_what_is_let_go_of_while_it_is_made_is_deleted(holds, leases):
    """The use ended before its lease was there: no lease stays for nobody."""
    leases.gate.clear()
    asking = asyncio.create_task(holds.lease("1"))
    await asyncio.sleep(0)
    releasing = asyncio.create_task(holds.release("1"))
    await asyncio.sleep(0)
    leases.gate.set()
    await asyncio.gather(asking, releasing)
    assert await live(leases) == []


async def test_who_stops_waiting_takes_it_from_nobody(holds, leases):
    """One that asked is cancelled: the other gets the lease all the same."""
    leases.gate.clear()
    leaves, stays = (asyncio.create_task(holds.lease("1")) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    leases.gate.set()
    assert await stays == "p-1"


async def test_a_failure_is_not_remembered(holds, leases):
    """Who asks next tries anew; nothing is to be let go of for who failed."""
    leases.errors = [UnavailableError("redis", "gone")]
    with pytest.raises(UnavailableError):
        await holds.lease("1")
    assert await holds.lease("1") == "p-1"
    leases.errors = [UnavailableError("redis", "gone")]
    with pytest.raises(UnavailableError):
        await holds.lease("2")
    await holds.release("2")
    assert await live(leases) == ["p-1"]


async def test_what_is_held_is_renewed(holds, leases, clock):
    """It lives on past its time; also when a lease beside it is being made, or could not be."""
    await holds.lease("1")
    leases.errors = [UnavailableError("redis", "gone")]
    with pytest.raises(UnavailableError):
        await holds.lease("2")
    leases.gate.clear()
    making = asyncio.create_task(holds.lease("3"))
    async with renewing(holds):
        for _ in range(3):
            clock.advance(TTL_S * 0.9)
            await leases.renewed.wait()
            assert await live(leases) == ["p-1"]
    leases.gate.set()
    await making


async def test_a_renewal_without_an_answer_is_followed_by_others(holds, leases, monkeypatch):
    """Redis was away for a moment: what is held is held on."""
    answers = [UnavailableError("redis", "gone"), None]
    answered = asyncio.Event()

    async def renew(lease_id, *, ttl_s):
        answer = answers.pop(0) if answers else None
        if not answers:
            answered.set()
        if answer is not None:
            raise answer

    monkeypatch.setattr(leases, "renew", renew)
    await holds.lease("1")
    async with renewing(holds), asyncio.timeout(10):
        await answered.wait()
    assert repr(holds) == "<Holds p: 1>"


async def test_a_lost_lease_is_made_anew_when_it_is_asked_for(holds, leases, clock):
    """Redis forgot it, or this process was stopped for too long."""
    await holds.lease("1")
    clock.advance(TTL_S + 1)
    async with renewing(holds):
        await eventually(lambda: repr(holds) == "<Holds p: 0>")
    assert await live(leases) == []
    assert await holds.lease("1") == "p-1"
    assert await live(leases) == ["p-1"]


async def test_a_lost_lease_takes_none_with_it_that_was_made_since(holds, leases, monkeypatch):
    """What was let go of during its renewal is gone, and that is nothing to who holds the name now: that is renewed."""
    began, answer, again = (asyncio.Event() for _ in range(3))

    async def renew(lease_id, *, ttl_s):
        if began.is_set():
            again.set()
            return
        began.set()
        await answer.wait()
        raise LeaseLostError(lease_id)

    monkeypatch.setattr(leases, "renew", renew)
    await holds.lease("1")
    async with renewing(holds), asyncio.timeout(10):
        await began.wait()
        await holds.release("1")
        await holds.lease("1")
        answer.set()
        await again.wait()
