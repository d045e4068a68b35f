"""Whoever carries an op out, or has its job, is killed between any two steps."""

from __future__ import annotations

import os

import pytest

from cluster.faultpoints import FaultPoint
from cluster.job import JobEvent, VertexState
from lazyfarm.graph import image
from tests.doubles.builds import BuildFarm, states
from tests.doubles.faults import BrokenFarm, eventually

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

#: Points that a build of one op passes, in the order in which it does.
_BUILD = [
    FaultPoint.JOB_CLAIMED,
    FaultPoint.OP_BEGUN,
    FaultPoint.OP_RAN,
    FaultPoint.LAYER_UPLOADED,
    FaultPoint.LAYER_COMMITTED,
    FaultPoint.RESULT_RECORDED,
    FaultPoint.RESULT_PUBLISHED,
    FaultPoint.JOB_END_BEFORE,
]


@pytest.mark.parametrize("point", _BUILD, ids=str)
async def test_a_build_outlives_the_death_of_who_does_it_at(
    lab: BrokenFarm, builds: BuildFarm, base: str, point: FaultPoint
):
    """The scheduler or the op worker is killed at the point: the build ends well, and once for whoever asks again.

    What the dead had made is found by its keys or made anew, and nothing else of it is left (I2, I4, I5, I9).
    """
    # Of chance: what is asked for again shows which run's result it is.
    graph = image(base, plain_http=True).run("head -c 20 /dev/urandom > /random").named("op")
    events: list[JobEvent] = []
    before = await builds.actors()
    async with lab.driver() as driver:
        killed = lab.faults.kill(point)
        result = await driver.solve(graph, on_event=events.append)
        assert killed()
        again = await driver.solve(graph)
    assert again.ref.id == result.ref.id
    assert len(result.ref.layers) == 4
    assert states(events, "op")[-1] in {VertexState.COMPLETED, VertexState.CACHED}
    kinds = ("solver-scheduler",) if point.startswith("job.") else ("op-worker",)
    victims = [actor for actor in before if actor.kind in kinds]
    (gone,) = await eventually(lambda: _gone(builds, victims), "the dead one to be missed")
    await builds.are_back(gone)
    await lab.assert_whole()


async def _gone(builds, before):
    """Return those of the actors that are not there as they were."""
    pids = {actor.name: actor.pid for actor in await builds.actors()}
    return [actor for actor in before if pids.get(actor.name) != actor.pid]
