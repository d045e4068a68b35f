"""Leases that drivers hold: kept while they can be, and never silently lost."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import InvalidArgumentError, LeaseLostError, UnavailableError
from cluster.lease import LeaseId
from lazyfarm.lease import FarmLease

TTL_S = 0.03


class Leases:
    """A store that does what the test says, renewal by renewal."""

    def __init__(self, *renewals):
        self.renewals = list(renewals)
        self.renewed = asyncio.Event()
        self.deleted = []

    async def create(self, lease_id, *, ttl_s, labels=None):
        pass

    async def renew(self, lease_id, *, ttl_s):
        answer = self.renewals.pop(0) if self.renewals else None
        if not self.renewals:
            self.renewed.set()
        if answer is not None:
            raise answer

    async def attach(self, lease_id, resources):
        pass

    async def delete(self, lease_id):
        self.deleted.append(lease_id)
        return True


def lease_of(store):
    return FarmLease(store, LeaseId("user-1"))


async def test_one_silence_of_redis_loses_no_lease():
    """A renewal that Redis doesn't answer is followed by another."""
    store = Leases(UnavailableError("redis", "gone"), None)
    lease = lease_of(store)
    async with lease.held(ttl_s=TTL_S, labels=None), asyncio.timeout(10):
        await store.renewed.wait()
        lease.raise_if_lost()
    assert store.deleted == ["user-1"]


async def test_a_lost_lease_says_so():
    """Once it is lost, using it raises; the body itself goes on and ends as it would."""
    store = Leases(LeaseLostError("user-1"))
    lease = lease_of(store)
    async with lease.held(ttl_s=TTL_S, labels=None), asyncio.timeout(10):
        await store.renewed.wait()
        while True:
            try:
                await lease.attach(["blob:x"])
            except LeaseLostError:
                break
            await asyncio.sleep(0)


async def test_the_bodys_error_is_told_and_not_the_leases():
    """What goes wrong with the lease never replaces what the body raised, and it is deleted all the same."""
    store = Leases(LeaseLostError("user-1"))

    async def fail():
        async with lease_of(store).held(ttl_s=TTL_S, labels=None), asyncio.timeout(10):
            await store.renewed.wait()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await fail()
    assert store.deleted == ["user-1"]


async def test_a_cancelled_body_is_cancelled():
    """Cancellation reaches the body's caller."""
    store = Leases()

    async def hold():
        async with lease_of(store).held(ttl_s=TTL_S, labels=None):
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    async with asyncio.timeout(10):
        await store.renewed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.deleted == ["user-1"]


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan")])
async def test_a_lease_that_would_not_live_is_refused(ttl_s):
    """A lifetime is above 0; nothing is made."""
    with pytest.raises(InvalidArgumentError, match="ttl_s"):
        async with lease_of(Leases()).held(ttl_s=ttl_s, labels=None):
            pytest.fail("it was held")
