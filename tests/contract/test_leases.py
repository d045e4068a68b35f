"""What every LeaseStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import pytest

from cluster.errors import LeaseLostError
from cluster.lease import LeaseId, blob_resource, ref_resource
from storage.presence import Presence

L = LeaseId("build:1")
M = LeaseId("build:2")


async def test_a_lease_is_what_was_asked_for(stores):
    """create() returns the lease as get() does: expiry by the store's clock, labels, nothing held."""
    lease = await stores.leases.create(L, ttl_s=60.0, labels={"build": "7"})

    assert lease.id == L
    assert lease.expires_wall_s - lease.created_wall_s == pytest.approx(60.0)
    assert lease.labels == {"build": "7"}
    assert lease.resources == ()
    assert await stores.leases.get(L) == lease


async def test_a_lease_lapses_at_its_expiry(stores):
    """A lease that nobody renews is gone for every reader once its time is over."""
    await stores.leases.create(L, ttl_s=60.0)
    await stores.leases.attach(L, [blob_resource("d")])

    stores.pass_time(60.1)

    assert await stores.leases.get(L) is None
    assert await stores.leases.leases() == []
    assert await stores.leases.holders(blob_resource("d")) == []
    assert not await stores.leases.delete(L)


async def test_renewal_counts_from_now(stores):
    """renew() moves the expiry to so many seconds from now, whatever was left."""
    await stores.leases.create(L, ttl_s=60.0)
    stores.pass_time(50)

    await stores.leases.renew(L, ttl_s=60.0)
    stores.pass_time(50)

    assert await stores.leases.get(L) is not None


async def test_a_lapsed_lease_is_not_renewed(stores):
    """Renewing or filling what has lapsed, or was deleted, is LeaseLostError."""
    await stores.leases.create(L, ttl_s=60.0)
    await stores.leases.create(M, ttl_s=60.0)
    await stores.leases.delete(M)
    stores.pass_time(61)

    for lease_id in (L, M, LeaseId("never:made")):
        with pytest.raises(LeaseLostError, match=lease_id):
            await stores.leases.renew(lease_id, ttl_s=60.0)
        with pytest.raises(LeaseLostError, match=lease_id):
            await stores.leases.attach(lease_id, ["blob:x"])
    assert await stores.leases.holders("blob:x") == []


async def test_a_pinned_lease_stays(stores):
    """A lease without expiry outlives any time, and renewing it, by either way, doesn't unpin it."""
    lease = await stores.leases.create(L, ttl_s=None)
    await stores.leases.renew(L, ttl_s=1.0)
    again = await stores.leases.create(L, ttl_s=1.0)
    stores.pass_time(10 * 365 * 86400)

    assert lease.expires_wall_s is None
    assert again.expires_wall_s is None
    assert await stores.leases.get(L) is not None


async def test_creating_a_live_lease_renews_it(stores):
    """A second create() of a live lease keeps what it holds and its labels, and moves its expiry."""
    await stores.leases.create(L, ttl_s=60.0, labels={"build": "7"})
    await stores.leases.attach(L, ["blob:x"])
    stores.pass_time(50)

    lease = await stores.leases.create(L, ttl_s=60.0, labels={"build": "8"})
    stores.pass_time(50)

    assert lease.labels == {"build": "7"}
    assert lease.resources == ("blob:x",)
    assert await stores.leases.get(L) is not None


async def test_a_name_taken_again_holds_nothing_of_before(stores):
    """A lease that lapsed hands nothing down to a later one of its name, however much it held."""
    await stores.leases.create(L, ttl_s=60.0, labels={"build": "7"})
    await stores.leases.attach(L, ["blob:x", *(f"blob:{number}" for number in range(600))])
    stores.pass_time(61)

    lease = await stores.leases.create(L, ttl_s=60.0)

    assert lease.resources == ()
    assert lease.labels == {}
    assert await stores.leases.holders("blob:x") == []


async def test_holders_are_the_live_leases_that_hold(stores):
    """holders() names each live lease that holds a resource, until it lets go by delete or expiry."""
    for lease_id, ttl_s in ((L, 60.0), (M, 120.0)):
        await stores.leases.create(lease_id, ttl_s=ttl_s)
        await stores.leases.attach(lease_id, [ref_resource("r"), blob_resource("d")])
    await stores.leases.attach(L, [ref_resource("r")])

    assert await stores.leases.holders(ref_resource("r")) == [L, M]
    stores.pass_time(61)
    assert await stores.leases.holders(ref_resource("r")) == [M]
    assert await stores.leases.delete(M)
    assert await stores.leases.holders(ref_resource("r")) == []
    assert await stores.leases.holders(blob_resource("d")) == []


async def test_leases_are_listed_by_expiry(stores):
    """leases() lists the soonest expiry first and the pinned last, each with what it holds."""
    await stores.leases.create(LeaseId("pinned"), ttl_s=None)
    await stores.leases.create(LeaseId("late"), ttl_s=300.0)
    await stores.leases.create(LeaseId("soon"), ttl_s=60.0)
    await stores.leases.attach(LeaseId("soon"), ["blob:b", "blob:a"])

    listed = await stores.leases.leases()

    assert [lease.id for lease in listed] == ["soon", "late", "pinned"]
    assert listed[0].resources == ("blob:a", "blob:b")


async def test_names_with_colons_dont_meet(stores):
    """A lease whose name looks like a part of another is a lease of its own."""
    for name in ("a", "a:held", "held:a", "lease:a"):
        await stores.leases.create(LeaseId(name), ttl_s=60.0)
        await stores.leases.attach(LeaseId(name), [f"blob:{name}"])

    for name in ("a", "a:held", "held:a", "lease:a"):
        assert (await stores.leases.get(LeaseId(name))).resources == (f"blob:{name}",)


async def test_what_lapsed_leases_left_is_swept(redis_farm):
    """Later writes clear the index entries of lapsed leases, a bounded part each, until none is left."""
    stores = redis_farm.stores()
    for number in range(6):
        await stores.leases.create(LeaseId(f"dead:{number}"), ttl_s=60.0)
        await stores.leases.attach(LeaseId(f"dead:{number}"), [f"blob:{number}:{i}" for i in range(300)])
    stores.pass_time(61)

    await stores.leases.create(L, ttl_s=60.0)
    for _ in range(12):
        await stores.leases.renew(L, ttl_s=60.0)

    left = await redis_farm.links[0].execute("KEYS", f"{redis_farm.keys.prefix}:*")
    assert sorted(key.decode().removeprefix(redis_farm.keys.prefix) for key in left) == [f":lease:{L}", ":leases"]


# -- while Redis is away ----------------------------------------------------------------------------------


@pytest.mark.redis
async def test_time_in_which_redis_was_away_counts_for_no_lease(redis_farm):
    """Who held one goes on holding it, before and after the first pulse; then its time runs on, and it may lapse."""
    stores = redis_farm.stores()
    presence = Presence(redis_farm.links[0], redis_farm.keys)
    assert await presence.pulse() == 0
    await stores.leases.create(L, ttl_s=10.0)
    await stores.leases.create(M, ttl_s=60.0)
    await stores.leases.attach(L, ["r"])

    await redis_farm.be_away(600.0)

    assert [lease.id for lease in await stores.leases.leases()] == [L, M]
    assert await stores.leases.holders("r") == [L]
    assert await presence.pulse() == pytest.approx(597.0, abs=1.0)
    assert await presence.pulse() == 0
    assert await stores.leases.holders("r") == [L]
    redis_farm.pass_time(8.0)
    assert [lease.id for lease in await stores.leases.leases()] == [M]
    await stores.leases.renew(M, ttl_s=60.0)
    assert await stores.leases.holders("r") == []


@pytest.mark.redis
async def test_what_had_lapsed_before_redis_went_away_stays_lapsed(redis_farm):
    """Nothing that was gone comes back, and a pinned lease stays pinned."""
    stores = redis_farm.stores()
    presence = Presence(redis_farm.links[0], redis_farm.keys)
    await stores.leases.create(L, ttl_s=10.0)
    await stores.leases.create(M, ttl_s=None)
    redis_farm.pass_time(11.0)
    await presence.pulse()

    await redis_farm.be_away(600.0)
    await presence.pulse()

    (left,) = await stores.leases.leases()
    assert (left.id, left.expires_wall_s) == (M, None)
