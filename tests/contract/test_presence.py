"""What is promised of who is there and who drains: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import pytest

from cluster.messages import ActorRecord, NodeRecord
from storage.presence import DRAIN_GONE_S

N0, N1 = (NodeRecord(id=f"n{n}", ray_id=f"r{n}", address="127.0.0.1", alive=True) for n in range(2))


@pytest.fixture
def presence(solver_stores):
    return solver_stores.presence


async def draining(presence):
    return [node.id for node in await presence.nodes() if node.draining]


async def test_a_node_drains_until_it_is_undone(presence):
    """Said once or twice; the others don't, and what else is told of it stays."""
    await presence.announce_nodes([N0, N1])
    assert await presence.nodes() == [N0, N1]
    await presence.drain("n1")
    await presence.drain("n1")
    assert await draining(presence) == ["n1"]
    assert [node.state for node in await presence.nodes()] == ["alive", "draining"]
    assert await presence.undrain("n1")
    assert not await presence.undrain("n1")
    assert await presence.nodes() == [N0, N1]


async def test_it_drains_whatever_is_said_of_the_nodes(presence, solver_stores):
    """By a supervisor that was started anew, when it is dead, for however long: what it was is kept by its name."""
    await presence.announce_nodes([N0, N1])
    await presence.drain("n1")
    dead = NodeRecord(id="n1", ray_id="r1", address="127.0.0.1", alive=False)
    for _ in range(3):
        await presence.announce_nodes([N0, dead])
        solver_stores.pass_time(DRAIN_GONE_S - 60)
    assert [node.state for node in await presence.nodes()] == ["alive", "dead"]
    await presence.announce_nodes([N0, N1])
    assert await draining(presence) == ["n1"]


async def test_one_that_is_gone_for_a_while_drains_when_it_is_back(presence, solver_stores):
    """A cluster that is started anew has its nodes back one by one."""
    await presence.announce_nodes([N0, N1])
    await presence.drain("n1")
    await presence.announce_nodes([N0])
    assert await presence.nodes() == [N0]
    solver_stores.pass_time(DRAIN_GONE_S - 60)
    await presence.announce_nodes([N0])
    await presence.announce_nodes([N0, N1])
    assert await draining(presence) == ["n1"]


async def test_one_that_is_gone_for_good_is_forgotten(presence, solver_stores):
    """Another that is given its name takes work."""
    await presence.announce_nodes([N0, N1])
    await presence.drain("n1")
    solver_stores.pass_time(DRAIN_GONE_S + 60)
    await presence.announce_nodes([N0])
    await presence.announce_nodes([N0, N1])
    assert await presence.nodes() == [N0, N1]


async def test_an_actor_tells_how_many_calls_it_has(presence):
    """As it said last; it is lost when it has been silent for too long."""
    actor = ActorRecord(name="fetch-worker-n0", kind="fetch-worker", node="n0", pid=7, state="ready", calls=3)
    await presence.announce(actor)
    assert await presence.actors() == [actor]
