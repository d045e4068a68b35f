"""A node's collection in the background: what it keeps to, and that nothing ends it."""

import asyncio
import subprocess
from types import SimpleNamespace

import pytest

from actors.node_collection import collect_node_forever
from cluster.collect.policy import default_policies
from cluster.config import NodeConfig
from cluster.errors import UnavailableError


class Collector:
    """Fails once with *error*, then says what it was asked for."""

    def __init__(self, error):
        self.errors = [error]
        self.asked = asyncio.get_running_loop().create_future()

    async def collect(self, policies):
        if self.errors:
            raise self.errors.pop()
        if not self.asked.done():
            self.asked.set_result(policies)
        return []


@pytest.mark.parametrize(
    "error", [UnavailableError("redis", "of the test"), OSError(5, "of the test"), subprocess.TimeoutExpired("rm", 600)]
)
async def test_it_goes_on_after_what_passes(error):
    """With the policies that the configuration says."""
    collector = Collector(error)
    swept = []
    dead = SimpleNamespace(sweep=lambda: swept.append(True) or ["n3"])
    config = NodeConfig(collect_every_s=0.001, reserved_bytes=1, max_used_bytes=3, min_free_bytes=2, unused_s=5.0)
    running = asyncio.ensure_future(collect_node_forever(collector, dead, config))
    try:
        asked = await asyncio.wait_for(collector.asked, 30)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert tuple(asked) == default_policies(reserved_bytes=1, max_used_bytes=3, min_free_bytes=2, unused_s=5.0)


async def test_0_is_never():
    """Room is made when it is asked for, then."""
    collector = Collector(UnavailableError("redis", "of the test"))
    await collect_node_forever(collector, SimpleNamespace(), NodeConfig(collect_every_s=0))
    assert collector.errors
