"""Redis is killed and comes back."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from cluster.errors import UnavailableError
from lazyfarm.graph import image as from_image
from tests.doubles.builds import BuildFarm, Gate, log_of, said, wait_for
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


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")
@pytest.mark.parametrize("away_s", [12, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(200)])])
async def test_a_build_and_a_pull_outlive_redis_being_away(lab: BrokenFarm, builds: BuildFarm, base: str, away_s: int):
    """Redis is away for longer than any lease lives: a command that runs goes on, and its build succeeds afterwards.

    Who asks in between waits, and is told so; a pull that was under way ends well, at the latest when asked again. No
    driver's lease is lost by it.
    """
    name, image = lab.image(14 * MIB)
    lab.proxy.bytes_per_s = 2 * MIB
    gate, events = Gate(builds), []
    running = from_image(base, plain_http=True).run(f"{gate.command}; echo x > /x", mounts=[gate.mount])
    async with lab.driver() as builder, lab.driver() as puller:
        job = builder.solve(running.run("cat /x"), on_event=events.append)
        building = asyncio.ensure_future(wait_for(job))
        await log_of(job, "at the gate")
        ref = await puller.pull(name, plain_http=True)
        pulling = asyncio.ensure_future(ref.extract("n1"))
        await eventually(lambda: sum(lab.fetched(image).values()) > 3 * MIB, "three MiB")
        containers = builds.containers()

        await asyncio.to_thread(lab.kill_redis)
        gone_s = time.monotonic()
        with pytest.raises(UnavailableError, match="Redis at"):
            async with asyncio.timeout(40):
                await puller.refs()
        await asyncio.sleep(away_s - (time.monotonic() - gone_s))
        assert builds.containers() == containers
        await asyncio.to_thread(lab.start_redis)

        async with asyncio.timeout(60):
            await gate.open_until(building)
        assert said(events).endswith("x\n")
        try:
            extracted = await pulling
        except UnavailableError:
            extracted = await ref.extract("n1")
        assert_extracted(extracted.path, image)
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)
