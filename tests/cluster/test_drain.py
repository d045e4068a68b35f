"""Draining a node of a real farm: what it has it ends, what is new goes elsewhere, and it can be undone."""

from __future__ import annotations

import asyncio
import os
import secrets

import pytest

from cluster.errors import NodeDrainingError
from cluster.job import VertexEvent, VertexState
from lazyfarm.graph import image
from tests.doubles.builds import BuildFarm, Gate, log_of, wait_for
from tests.doubles.registry import random_image
from tests.doubles.registry_faults import Hang
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]


async def ran_on(driver, graph):
    """Build *graph*; return the nodes that ran something for it."""
    events = []
    await driver.solve(graph, on_event=events.append)
    return {e.node for e in events if isinstance(e, VertexEvent) and e.state is VertexState.RUNNING and e.node}


async def states(driver):
    return {node.id: node.state for node in await driver.nodes()}


async def extracted(ref, node):
    return await ref.extract(node)


async def test_a_node_drains_while_it_builds_and_fetches(farm, registry, registry_proxy):
    """It runs an op and owns a flight: both end as they would have, and no op and no extract comes meanwhile.

    Not even where it has all that they need, nor when schedulers and shards are killed. Undone, it is as before.
    """
    tag = secrets.token_hex(8)
    registry.push("drain/shell", tag, shell_image(tag))
    registry.push("drain/slow", tag, random_image(secrets.randbits(64), layers=1, layer_bytes=200_000))
    base = image(f"{registry.host}/drain/shell:{tag}", plain_http=True)
    builds, stuck = BuildFarm(running=farm), Hang(after_bytes=1000)
    gate = Gate(builds)
    async with await farm.connect() as driver:
        job = driver.solve(base.run(gate.command, mounts=[gate.mount]))
        building = asyncio.ensure_future(wait_for(job))
        await log_of(job, "at the gate")
        ((node, _),) = builds.containers().items()
        slow = await driver.pull(f"{registry_proxy.host}/drain/slow:{tag}", plain_http=True)
        registry_proxy.script(stuck)
        fetching = asyncio.ensure_future(extracted(slow, node))
        assert await asyncio.to_thread(stuck.arrived.wait, 30)
        others = (await states(driver)).keys() - {node}
        try:
            left = await driver.drain(node, timeout_s=0)
            assert (left.ops, left.fetches) == (1, 1)
            draining = asyncio.ensure_future(driver.drain(node))

            await builds.kill(*(killed := [*await builds.of_kind("cache-shard")]))
            await builds.are_back(*killed)
            told = await asyncio.to_thread(farm.cli_json, "status")
            assert {each["id"]: each["draining"] for each in told["nodes"]} == {
                node: True,
                **dict.fromkeys(others, False),
            }
            assert await ran_on(driver, base.run("echo new > /new")) <= others
            shell = await driver.pull(f"{registry.host}/drain/shell:{tag}", plain_http=True)
            with pytest.raises(NodeDrainingError):
                await shell.extract(node)
            assert {each.node for each in await shell.extract_everywhere()} == others
            assert {(await shell.extract()).node for _ in range(8)} <= others
            assert not draining.done()
            assert not fetching.done()

            stuck.proceed.set()
            assert (await fetching).node == node
            await gate.open_until(building)
            assert (await draining).is_nothing
            done = await asyncio.to_thread(farm.cli, "drain", node)
            assert done.stdout == f"{node} has drained: nothing is under way there, and nothing new comes\n"
            assert (await states(driver))[node] == "draining"

            await asyncio.to_thread(farm.cli, "drain", node, "--undo")
            for other in others:
                await driver.drain(other, timeout_s=0)
            assert await ran_on(driver, base.run("echo again > /again")) == {node}
        finally:
            stuck.proceed.set()
            for each in (node, *others):
                await driver.undrain(each)
        assert set((await states(driver)).values()) == {"alive"}
