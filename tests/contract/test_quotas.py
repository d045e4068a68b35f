"""What every HostLimiter makes of what registries say is left: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import RateLimitedError
from cluster.ports import Slot
from cluster.quota import Budget, Quota, RequestKind
from tests.contract.test_limits import calls, is_free
from tests.doubles.stores import LIMIT

HOST = "registry.example:5000"
MINE = Budget(kind=RequestKind.MANIFEST, account="me")
#: Others' of the same host, and their own.
OTHERS = [
    Budget(kind=RequestKind.BLOB, account="me"),
    Budget(kind=RequestKind.MANIFEST, account="you"),
    Budget(kind=RequestKind.MANIFEST, account="me:you"),
]
#: One request in five seconds from here on.
LOW = Quota(remaining=10, limit=100, reset_s=50.0)
ENOUGH = Quota(remaining=90, limit=100, reset_s=50.0)
NONE_LEFT = Quota(remaining=0, limit=100, reset_s=1800.0)
SOON_S = 0.2


async def ask(stores, budget=MINE, *, deadline_s=SOON_S):
    async with stores.limiter.slot(HOST, deadline_s=deadline_s, budget=budget) as slot:
        return slot


async def say(stores, *quotas, budget=MINE):
    """Let the registry's answer to a request say what is left."""
    await stores.limiter.quoted(Slot(HOST, budget=budget), quotas)


async def test_where_little_is_left_the_cluster_goes_slowly(stores):
    """One request at a time, as far apart as makes them last; who can't wait is told at once until when."""
    await say(stores, LOW)

    for each in (stores, stores.other()):
        with pytest.raises(RateLimitedError, match=r"in \d s|for \d s") as caught:
            await ask(each)
        assert caught.value.retry_after_s == pytest.approx(5.0, abs=0.6)
        assert HOST in str(caught.value)
    stores.pass_time(5.0)
    assert (await ask(stores)).budget == MINE
    with pytest.raises(RateLimitedError):
        await ask(stores)


async def test_what_others_may_ask_is_theirs(stores):
    """Another account, or another kind of request, goes on as before."""
    await say(stores, NONE_LEFT)
    with pytest.raises(RateLimitedError):
        await ask(stores)

    for budget in OTHERS:
        assert (await ask(stores, budget)).budget == budget


async def test_who_waits_for_what_is_left_holds_up_nobody(stores):
    """Those who wait for their turn have no place in the queue for the host's slots."""
    await say(stores, LOW)
    waiting = [asyncio.create_task(ask(stores, deadline_s=100.0)) for _ in range(LIMIT + 1)]
    await asyncio.sleep(0.05)

    for budget in OTHERS:
        assert await is_free(stores.limiter, HOST)
        assert (await ask(stores, budget)).budget == budget
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_turns_come_in_the_order_of_arrival(stores):
    """Each of those who wait has a turn of its own, and all are served."""
    await say(stores, Quota(remaining=10, limit=100, reset_s=500.0))
    order, tasks = [], []

    async def request(number):
        await ask(stores, deadline_s=100.0)
        order.append(number)

    for number in range(3):
        tasks.append(asyncio.create_task(request(number)))
        await asyncio.sleep(0.02)  # the order of arrival is by the store's clock
    for task in tasks:
        stores.pass_time(10.0)  # the pace at which nobody asks more slowly
        await task

    assert order == [0, 1, 2]


async def test_where_none_is_left_nobody_asks_until_there_is_more(stores):
    """The registry said when; then all may ask at once."""
    await say(stores, NONE_LEFT)
    with pytest.raises(RateLimitedError) as caught:
        await ask(stores)
    assert caught.value.retry_after_s == pytest.approx(1800.0, abs=5.0)

    stores.pass_time(1700.0)
    with pytest.raises(RateLimitedError):
        await ask(stores)
    stores.pass_time(101.0)
    for _ in range(3):
        await ask(stores)


async def test_nobody_stands_still_for_hours_on_a_guess(stores):
    """Docker Hub says nothing of when: one request in some seconds is made, and answered by the registry itself."""
    await say(stores, Quota(remaining=0, limit=100, window_s=21600.0))
    with pytest.raises(RateLimitedError) as caught:
        await ask(stores)

    assert caught.value.retry_after_s <= 10.0
    stores.pass_time(10.0)
    await ask(stores)


async def test_more_is_more(stores):
    """An answer that says that enough is left ends it, for those who wait already, too."""
    await say(stores, LOW)
    waiting = asyncio.create_task(ask(stores, deadline_s=60.0))
    await asyncio.sleep(0.05)
    await say(stores, ENOUGH)

    await asyncio.wait_for(waiting, 10.0)
    for _ in range(3):
        await ask(stores)


async def test_the_tightest_of_several_limits_holds(stores):
    """Ten a second, and none today."""
    await say(stores, Quota(remaining=10, limit=10, reset_s=1.0), NONE_LEFT)

    with pytest.raises(RateLimitedError) as caught:
        await ask(stores)
    assert caught.value.retry_after_s > 1000.0


async def test_a_retry_after_beyond_ones_patience_is_told_at_once(stores):
    """Nobody waits in vain for a host that said when to come again."""
    await stores.limiter.throttled(Slot(HOST), 3600.0)

    with pytest.raises(RateLimitedError) as caught:
        await ask(stores, deadline_s=60.0)
    assert caught.value.retry_after_s == pytest.approx(3600.0, abs=5.0)


async def test_enough_costs_next_to_nothing(redis_farm):
    """Redis is told where little is left, and once that it is more; for people, now and then, how much enough is."""
    stores, link = redis_farm.stores(), redis_farm.links[0]
    told = []
    for quota in (ENOUGH, LOW, ENOUGH, ENOUGH):
        redis_farm.pass_time(6.0)
        async with stores.limiter.slot(HOST, deadline_s=SOON_S, budget=MINE) as slot:
            before = await calls(link)
            await stores.limiter.quoted(slot, [quota])
            told.append(await calls(link) - before)
        await asyncio.sleep(0.02)  # what the last one released is no part of it

    assert told == [1, 1, 1, 0]


# -- for people, in Redis ----------------------------------------------------------------------------------


async def quotas_of(stores):
    """Return what people are told of the host's quotas."""
    await stores.limiter.throttled(Slot(HOST), 0.0)  # a host that was never asked is not listed
    (budget,) = await stores.limiter.budgets()
    return budget.quotas


async def test_what_little_is_left_is_listed_by_account_and_kind(redis_farm):
    """The least first; until there is enough, or all is there again."""
    stores = redis_farm.stores()
    await say(stores, LOW)
    await say(stores, NONE_LEFT, budget=OTHERS[0])
    await say(stores, LOW, budget=OTHERS[2])  # its account has a colon

    await say(stores, Quota(remaining=3, limit=5, reset_s=1.0), LOW)  # of the former there is enough
    least, *others = await quotas_of(stores)
    assert (least.kind, least.remaining) == ("blob", 0)
    assert (least.window_s, least.hold_s) == pytest.approx((1800.0, 1800.0), abs=30.0)
    assert [(one.kind, one.remaining, one.hold_s) for one in others] == [("manifest", 10, 0.0)] * 2

    await say(stores, ENOUGH)
    assert [(one.kind, one.is_low, one.remaining, one.limit) for one in await quotas_of(stores)] == [
        ("blob", True, 0, 0),
        ("manifest", True, 10, 0),
        ("manifest", False, 90, 100),
    ]
    redis_farm.pass_time(LOW.reset_s)
    assert [one.kind for one in await quotas_of(stores)] == ["blob"]


async def test_what_is_told_of_enough_slows_nobody_and_hides_nothing(redis_farm):
    """It never ends what another process heard; of several limits the one of which the least part is left is told."""
    stores, other = redis_farm.stores(), redis_farm.stores()
    await say(stores, Quota(remaining=9, limit=10, reset_s=100.0), Quota(remaining=50, limit=100, reset_s=100.0))
    (told,) = await quotas_of(stores)
    assert (told.is_low, told.remaining, told.limit, told.window_s) == (False, 50, 100, pytest.approx(100.0, abs=5.0))
    await ask(stores)

    await say(other, LOW)
    await say(redis_farm.stores(), ENOUGH)  # a late answer, to a process that never heard of little
    (told,) = await quotas_of(stores)
    assert (told.is_low, told.remaining) == (True, 10)


async def test_a_quota_that_an_earlier_release_noted_last_has_no_number(redis_farm):
    """It didn't say how many are left, only that it is little."""
    stores = redis_farm.stores()
    await say(stores, LOW)
    (link,) = redis_farm.links
    await link.execute("HDEL", f"{redis_farm.keys.prefix}:quota:manifest:2:me:{HOST}", "left")

    (one,) = await quotas_of(stores)
    assert one.remaining is None
