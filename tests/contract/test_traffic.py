"""Sums of what was moved and avoided, in a real Redis."""

import pytest

from cluster.traffic import Traffic
from storage.traffic import KEPT_S, SLOT_S, RedisTraffic
from tests.doubles.observed import eventually

pytestmark = pytest.mark.redis


async def now_wall_s(link):
    seconds, _ = await link.execute("TIME")
    return int(seconds)


async def test_what_is_noted_adds_up_in_all_and_now(redis_farm):
    """Whoever notes it; nothing is written for figures of 0, and a slot goes after a week."""
    for _ in range(2):
        redis_farm.stores()
    one, other = (RedisTraffic(link, redis_farm.keys) for link in redis_farm.links)
    began = await now_wall_s(redis_farm.links[0])
    one.note(Traffic())
    assert await redis_farm.links[0].execute("EXISTS", redis_farm.keys.traffic) == 0
    one.note(Traffic(fetched_bytes=5, joined=1, registries={"r.example:5000": Traffic(fetched_bytes=5, joined=1)}))
    other.note(Traffic(fetched_bytes=7, not_pushed_bytes=9))
    part = Traffic(fetched_bytes=5, joined=1)
    total = Traffic(fetched_bytes=12, joined=1, not_pushed_bytes=9, registries={"r.example:5000": part})

    async def is_noted():
        return await other.total() == total

    await eventually(is_noted, "both to be noted")

    ended = await now_wall_s(redis_farm.links[0])
    slots = await one.since(began - 3 * SLOT_S, ended)
    assert sum((traffic for _, traffic in slots), Traffic()) == total
    assert [start % SLOT_S for start, _ in slots] == [0] * len(slots)
    assert len(slots) in (4, 5)  # the one that it began in, and three before
    (last,) = [start for start, traffic in slots[-1:] if traffic.figures]
    assert KEPT_S - 60 < await redis_farm.links[0].execute("TTL", redis_farm.keys.traffic_slot(last)) <= KEPT_S


async def test_what_an_earlier_release_noted_is_read(redis_farm):
    """Side by side with it: of a registry, and of what it didn't count, it noted nothing."""
    redis_farm.stores()
    (link,) = redis_farm.links
    await link.execute("HSET", redis_farm.keys.traffic, "fetched_bytes", 5)
    assert await RedisTraffic(link, redis_farm.keys).total() == Traffic(fetched_bytes=5)


async def test_no_more_is_asked_for_than_is_kept(redis_farm):
    """However far back one would look."""
    redis_farm.stores()
    slots = await RedisTraffic(redis_farm.links[0], redis_farm.keys).since(0.0, 10.0 * KEPT_S)
    assert len(slots) == KEPT_S // SLOT_S + 1
