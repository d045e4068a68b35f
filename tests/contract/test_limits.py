"""What every HostLimiter promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from cluster.errors import DeadlineExceededError, RateLimitedError
from cluster.ports import Slot
from storage.limits import SLOT_TTL_S
from tests.doubles.stores import LIMIT, RATE, RATED_HOST, SLOW_HOST, RedisFarm

HOST = "registry.example:5000"
SOON_S = 0.1
LONG_S = 20.0


async def is_free(limiter, host=HOST, *, deadline_s=SOON_S) -> bool:
    """Tell whether one more slot can be had."""
    try:
        async with limiter.slot(host, deadline_s=deadline_s):
            return True
    except (DeadlineExceededError, RateLimitedError):
        return False


async def hold(stack: AsyncExitStack, limiter, count: int) -> None:
    for _ in range(count):
        await stack.enter_async_context(limiter.slot(HOST, deadline_s=LONG_S))


async def hold_slowly(stack: AsyncExitStack, stores, count: int) -> None:
    """Take slots one a second, which every rate allows."""
    for _ in range(count):
        stores.pass_time(1.0)
        await hold(stack, stores.limiter, 1)
    stores.pass_time(1.0)


async def ask(limiter, host=HOST, most=100) -> tuple[int, float]:
    """Ask one after the other until it takes a wait; return how often it did not, and the seconds that took."""
    started, count = time.monotonic(), 0
    while count < most and await is_free(limiter, host):
        count += 1
    return count, time.monotonic() - started


async def test_no_more_than_the_limit_are_under_way(stores):
    """With every slot held the next waits, up to its deadline, and gets one as soon as one is given back."""
    async with AsyncExitStack() as held:
        await hold(held, stores.limiter, LIMIT)

        with pytest.raises(DeadlineExceededError, match=HOST):
            async with stores.limiter.slot(HOST, deadline_s=SOON_S):
                pass

    assert await is_free(stores.limiter)


async def test_the_limit_is_the_clusters(redis_any):
    """Slots held by one process count for every other."""
    async with two_processes(redis_any) as (one, two), AsyncExitStack() as held:
        await hold(held, one.limiter, LIMIT - 1)
        await hold(held, two.limiter, 1)

        assert not await is_free(one.limiter)
        assert not await is_free(two.limiter)


async def test_hosts_have_limits_of_their_own(stores):
    """A host whose slots are all held takes nothing from another."""
    async with AsyncExitStack() as held:
        await hold(held, stores.limiter, LIMIT)

        assert await is_free(stores.limiter, "other.example")


async def test_the_limit_holds_under_load(stores):
    """Many requests at once, some cancelled: never more under way than the limit, and all of them end."""
    under_way = most = done = 0

    async def request():
        nonlocal under_way, most, done
        async with stores.limiter.slot(HOST, deadline_s=LONG_S):
            under_way += 1
            most = max(most, under_way)
            try:
                await asyncio.sleep(0)
            finally:
                under_way -= 1
            done += 1

    tasks = [asyncio.create_task(request()) for _ in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::8]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert most <= LIMIT
    assert done == 35
    assert await is_free(stores.limiter)


async def test_who_waits_longest_is_next(stores):
    """Slots are given in the order of arrival."""
    order = []

    async def request(number):
        async with stores.limiter.slot(HOST, deadline_s=LONG_S):
            order.append(number)

    async with AsyncExitStack() as held:
        await hold(held, stores.limiter, LIMIT - 1)
        last = stores.limiter.slot(HOST, deadline_s=LONG_S)
        await last.__aenter__()
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(request(number)))
            await asyncio.sleep(0.01)  # the order of arrival is by the store's clock
        await last.__aexit__(None, None, None)
        await asyncio.gather(*tasks)

    assert order == [0, 1, 2, 3]


async def test_a_cancelled_waiter_loses_its_place(stores):
    """Who is cancelled while it waits holds up nobody."""
    async with AsyncExitStack() as held:
        await hold(held, stores.limiter, LIMIT)
        waiting = asyncio.create_task(is_free(stores.limiter))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    assert await is_free(stores.limiter)


async def test_a_429_halves_the_limit_once_a_burst(stores):
    """Each burst of 429s halves the limit, never below 1."""
    for allowed in (LIMIT // 2, LIMIT // 4, 1, 1):
        await stores.limiter.throttled(Slot(HOST), 0.0)
        await stores.limiter.throttled(Slot(HOST), 0.0)
        async with AsyncExitStack() as held:
            await hold_slowly(held, stores, allowed)
            assert not await is_free(stores.limiter)
        stores.pass_time(1.5)


async def test_successes_bring_the_limit_back(stores):
    """Additive increase: about as many successes as the limit is high raise it by one, up to the configured."""
    await stores.limiter.throttled(Slot(HOST), 0.0)
    for _ in range(4):
        await stores.limiter.succeeded(Slot(HOST))
    async with AsyncExitStack() as held:
        await hold_slowly(held, stores, LIMIT // 2 + 1)
        assert not await is_free(stores.limiter)

    for _ in range(30):
        await stores.limiter.succeeded(Slot(HOST))
    async with AsyncExitStack() as held:
        await hold_slowly(held, stores, LIMIT)
        assert not await is_free(stores.limiter)


async def test_nobody_asks_before_retry_after(stores):
    """After a 429 with Retry-After no slot is given, free or not, until that is over."""
    await stores.limiter.throttled(Slot(HOST), 30.0)
    await stores.limiter.throttled(Slot(HOST), 1.0)

    stores.pass_time(20)
    assert not await is_free(stores.limiter)
    stores.pass_time(11)
    assert await is_free(stores.limiter)


async def test_no_more_a_second_than_the_rate(stores):
    """A second's worth may be asked at once, then as many as the rate gives; what nobody asks is not saved up."""
    for _ in range(3):
        count, took_s = await ask(stores.limiter, RATED_HOST)
        assert RATE <= count <= RATE + RATE * took_s
        stores.pass_time(60)


async def test_the_rate_is_the_clusters(redis_any):
    """What one process asks counts for every other."""
    async with two_processes(redis_any) as (one, two):
        assert await is_free(one.limiter, SLOW_HOST)
        assert not await is_free(two.limiter, SLOW_HOST)


async def test_a_rate_may_be_less_than_one_a_second(stores):
    """At one request in two seconds a second is not enough, two are; a 429 makes it neither slower nor faster."""
    assert await is_free(stores.limiter, SLOW_HOST)
    for is_throttled in (False, True):
        if is_throttled:
            await stores.limiter.throttled(Slot(SLOW_HOST), 0.0)
        stores.pass_time(1.0)
        assert not await is_free(stores.limiter, SLOW_HOST)
        stores.pass_time(1.0)
        assert await is_free(stores.limiter, SLOW_HOST)


async def test_the_rate_keeps_the_order_of_arrival(stores):
    """A token that comes goes to who waits longest, although slots are free for all."""
    order = []

    async def request(number):
        async with stores.limiter.slot(HOST, deadline_s=LONG_S):
            order.append(number)

    await stores.limiter.throttled(Slot(HOST), 0.0)  # one a second from here on: never two tokens at a time
    assert await is_free(stores.limiter)
    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(request(number)))
        await asyncio.sleep(0.01)  # the order of arrival is by the store's clock
    for task in tasks:
        stores.pass_time(1.0)  # thrice is less than a place in the queue is kept
        await task

    assert order == [0, 1, 2]


async def test_a_429_sets_half_the_rate_of_late(stores):
    """Without a configured rate there is none until a 429; then it is half of what was asked in the last seconds."""
    asked, _ = await ask(stores.limiter, most=40)
    assert asked == 40  # 20 a second over two seconds, or a little less if it took long

    await stores.limiter.throttled(Slot(HOST), 0.0)
    count, took_s = await ask(stores.limiter)
    assert 1 <= count <= 1 + 10 * took_s  # whoever got the 429 may try again at once
    stores.pass_time(10)
    count, took_s = await ask(stores.limiter)
    assert 3 <= count <= 10 + 10 * took_s


async def test_the_rate_never_falls_below_one_a_second(stores):
    """However many bursts of 429s, a second is enough for one request."""
    for _ in range(4):
        await stores.limiter.throttled(Slot(HOST), 0.0)
        stores.pass_time(2)
        assert await is_free(stores.limiter)


async def test_successes_lift_the_rate(stores):
    """Successes raise a rate that only 429s have set, until there is none."""
    await ask(stores.limiter, most=40)
    await stores.limiter.throttled(Slot(HOST), 0.0)
    for _ in range(20):
        await stores.limiter.succeeded(Slot(HOST))
    stores.pass_time(10)
    count, took_s = await ask(stores.limiter)
    assert count <= 13 + 13 * took_s

    for _ in range(1000):
        await stores.limiter.succeeded(Slot(HOST))
    assert (await ask(stores.limiter, most=200))[0] == 200


async def test_successes_bring_the_configured_rate_back(stores):
    """A 429 lowers a configured rate, too; successes raise it up to what is configured, and no further."""
    await ask(stores.limiter, RATED_HOST)
    await stores.limiter.throttled(Slot(RATED_HOST), 0.0)
    stores.pass_time(10)
    count, took_s = await ask(stores.limiter, RATED_HOST)
    assert 1 <= count <= 1 + RATE / 2 * took_s

    for _ in range(20):
        await stores.limiter.succeeded(Slot(RATED_HOST))
    stores.pass_time(10)
    count, took_s = await ask(stores.limiter, RATED_HOST)
    assert RATE <= count <= RATE + RATE * took_s


async def test_entering_costs_one_round_trip_and_leaving_none(redis_farm):
    """With a slot free, one command is sent on entering, and leaving doesn't wait for its own."""
    limiter = redis_farm.stores().limiter
    assert await is_free(limiter)  # the scripts are known from here on
    assert await is_free(limiter)
    link = redis_farm.links[0]
    before = await calls(link)

    context = limiter.slot(HOST, deadline_s=LONG_S)
    await context.__aenter__()
    entered = await calls(link)
    leaving = context.__aexit__(None, None, None)
    with pytest.raises(StopIteration):
        leaving.send(None)  # ran through without waiting for anything

    assert entered - before == 1


async def test_a_repeated_entry_counts_once(redis_farm):
    """A client whose connection drops asks for its slot again: it has it, and nothing of the rate is taken twice."""
    limiter = redis_farm.stores().limiter
    link, keys = redis_farm.links[0], redis_farm.keys
    for _ in range(5):
        answer = await link.run(
            "slot_take", keys.prefix, RATED_HOST, "one", LIMIT, RATE, 15_000, 5_000, 5_000, "blob", "me", 0
        )
        assert answer == [1, 0, 0, 0, 0]

    assert (await ask(limiter, RATED_HOST))[0] >= RATE - 1


async def test_successes_cost_nothing_once_all_is_as_configured(redis_farm):
    """Redis is told of successes while a 429 has its effect: until limit and rate are back."""
    limiter, link = redis_farm.stores().limiter, redis_farm.links[0]
    await ask(limiter, most=40)
    await limiter.throttled(Slot(HOST), 0.0)
    told = []
    for _ in range(2):
        redis_farm.pass_time(1.0)
        assert await is_free(limiter)  # the answer says whether anything is reduced
        before = await calls(link)
        await limiter.succeeded(Slot(HOST))
        told.append(await calls(link) - before)
        for _ in range(1000):
            await limiter.succeeded(Slot(HOST))

    assert told == [1, 0]


async def test_a_dead_holders_slot_comes_back(redis_farm):
    """A slot that nobody renews is free again after its time; one that is renewed is not."""
    dead, alive = redis_farm.stores(), redis_farm.stores()
    held = [dead.limiter.slot(HOST, deadline_s=LONG_S) for _ in range(LIMIT)]
    for slot in held:
        await slot.__aenter__()
    dead.limiter._renewing.cancel()  # as kill -9 does

    assert not await is_free(alive.limiter)
    dead.pass_time(SLOT_TTL_S + 1)
    assert await is_free(alive.limiter)


async def test_a_waiter_that_is_cancelled_as_a_slot_comes_free_is_cancelled(stores):
    """Whoever waits for a slot is woken and cancelled at the same moment: it goes, and takes no slot along."""
    async with AsyncExitStack() as held:
        await hold(held, stores.limiter, LIMIT - 1)
        async with stores.limiter.slot(HOST, deadline_s=LONG_S):
            waiting = asyncio.create_task(is_free(stores.limiter, deadline_s=LONG_S))
            # Long enough to have asked, and to wait for its turn; one that hasn't is cancelled all the same.
            assert not await is_free(stores.limiter)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert await is_free(stores.limiter)


async def test_waiting_is_no_busy_loop(redis_farm):
    """Waiters ask a few times a second, rarer the more come before."""
    limiter = redis_farm.stores().limiter
    async with AsyncExitStack() as held:
        await hold(held, limiter, LIMIT)
        before, started = await calls(redis_farm.links[0]), time.monotonic()

        await asyncio.gather(*(is_free(limiter, deadline_s=1.0) for _ in range(20)))

        asked = await calls(redis_farm.links[0]) - before
        assert asked / (time.monotonic() - started) / 20 < 30


async def calls(link) -> int:
    """Return how many scripts the server has run for this farm's client."""
    stats = (await link.execute("INFO", "commandstats")).decode()
    return sum(
        int(line.partition("calls=")[2].partition(",")[0]) for line in stats.splitlines() if "cmdstat_eval" in line
    )


def two_processes(redis_any):
    """Two clients of one farm, as two processes are."""
    return _TwoProcesses(redis_any)


class _TwoProcesses:
    def __init__(self, server):
        self._farm = RedisFarm(server.config)

    async def __aenter__(self):
        return self._farm.stores(), self._farm.stores()

    async def __aexit__(self, *exc):
        await self._farm.close()


@pytest.mark.redis
async def test_what_a_host_may_be_asked_is_told(redis_farm):
    """Of each that was asked: how many may and do, who waits, what 429s have brought it down to."""
    stores = redis_farm.stores()
    assert await stores.limiter.budgets() == []
    async with stores.limiter.slot(RATED_HOST, deadline_s=LONG_S):
        (rated,) = await stores.limiter.budgets()
    assert (rated.host, rated.busy, rated.limit, rated.rate, rated.refused) == (RATED_HOST, 1, LIMIT, RATE, 0)
    assert not rated.is_reduced
    assert rated.recent_rate > 0

    await stores.limiter.throttled(Slot(HOST), LONG_S)
    await stores.limiter.throttled(Slot(HOST), LONG_S)  # of one burst
    reduced = {budget.host: budget for budget in await stores.limiter.budgets()}[HOST]
    assert (reduced.limit, reduced.max_limit, reduced.refused) == (LIMIT // 2, LIMIT, 2)
    assert LONG_S - 5 < reduced.closed_s <= LONG_S
    assert reduced.is_reduced

    stores.pass_time(3601.0)
    assert await stores.limiter.budgets() == []
