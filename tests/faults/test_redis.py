"""Redis is killed and comes back."""

from __future__ import annotations

import asyncio

import pytest

from tests.doubles.faults import MIB, BrokenFarm, assert_extracted, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]


async def test_an_extract_outlives_a_restart_of_redis(lab: BrokenFarm):
    """Redis is killed in the middle of a fetch and started again: it goes on, and so do those who wait.

    What Redis had acknowledged it still has; the owner may have lost its flight, then it is taken over.
    """
    name, image = lab.image(14 * MIB)
    lab.proxy.bytes_per_s = 4 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        both = asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        await eventually(lambda: sum(lab.fetched(image).values()) > 6 * MIB, "six MiB")
        await asyncio.to_thread(lab.restart_redis)
        for result in await both:
            assert_extracted(result.path, image)
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)
