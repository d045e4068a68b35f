"""What every ProgressStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio

from cluster.progress import LayerPhase, ProgressItem

END = ProgressItem(item="", phase=LayerPhase.DONE)


def fetching(current: int, item: str = "fetch:d") -> ProgressItem:
    return ProgressItem(item=item, phase=LayerPhase.FETCHING, current_bytes=current, total_bytes=9, detail="ü")


async def read(progress, stream):
    async with asyncio.timeout(10):
        return [item async for item in progress.follow(stream)]


async def test_who_comes_late_gets_it_all(stores):
    """A stream is replayed from its start, in order, up to its end."""
    for current in range(3):
        await stores.progress.publish(["s"], fetching(current))
    await stores.progress.publish(["s"], END)

    assert await read(stores.progress, "s") == [fetching(0), fetching(1), fetching(2)]
    assert await read(stores.other().progress, "s") == [fetching(0), fetching(1), fetching(2)]


async def test_who_follows_gets_it_live(stores):
    """Who follows before there is anything gets each item when it comes."""
    got = asyncio.Queue()

    async def follow():
        async for item in stores.progress.follow("s"):
            got.put_nowait(item)

    following = asyncio.create_task(follow())
    for current in range(3):
        await stores.progress.publish(["s"], fetching(current))
        async with asyncio.timeout(10):
            assert await got.get() == fetching(current)
    await stores.progress.publish(["s"], END)
    async with asyncio.timeout(10):
        await following


async def test_following_doesnt_hold_up_the_rest(stores):
    """While somebody waits for a stream everything else goes on at once."""
    following = asyncio.create_task(read(stores.progress, "s"))
    await asyncio.sleep(0.05)  # it blocks by now
    async with asyncio.timeout(1):
        for current in range(20):
            await stores.progress.publish(["other"], fetching(current))
    await stores.progress.publish(["s"], END)

    assert await following == []


async def test_one_item_goes_to_several_streams(stores):
    """publish() appends to every stream named, and to none but them."""
    await stores.progress.publish(["a", "b"], fetching(1))
    await stores.progress.publish([], fetching(2))
    await stores.progress.publish(["a", "b", "c"], END)

    assert await read(stores.progress, "a") == [fetching(1)]
    assert await read(stores.progress, "b") == [fetching(1)]
    assert await read(stores.progress, "c") == []


async def test_leaving_early_is_fine(stores):
    """Who stops following leaves nothing behind."""
    await stores.progress.publish(["s"], fetching(1))
    following = stores.progress.follow("s")

    assert await anext(following) == fetching(1)
    await following.aclose()


async def test_publishing_never_raises(redis_farm):
    """Progress that can't be told is dropped: nobody's work hangs on it."""
    stores = redis_farm.stores()
    await redis_farm.links[0].close()

    await stores.progress.publish(["s"], fetching(1))


async def test_a_stream_is_capped_and_kept_for_a_day(redis_farm):
    """A stream keeps some 10,000 items, and goes a day after the last."""
    stores = redis_farm.stores()
    await stores.progress.publish(["s"], fetching(1))

    link = redis_farm.links[0]
    key = redis_farm.keys.progress("s")
    assert 86_000 < await link.execute("TTL", key) <= 86_400
    await link.execute_many([("XADD", key, "*", "p", "x")] * 11_000)
    await stores.progress.publish(["s"], fetching(2))
    assert 10_000 <= await link.execute("XLEN", key) < 10_300
