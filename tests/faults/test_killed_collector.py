"""A collector is killed at each of its steps: nothing is half gone, and the next one takes the rest."""

from __future__ import annotations

import pytest

from cluster.faultpoints import FaultPoint
from lazyfarm.collection import open_collection
from tests.doubles.driver_process import driver_process
from tests.doubles.faults import MIB, BrokenFarm, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

POINTS = [FaultPoint.COLLECT_PLANNED, FaultPoint.COLLECT_REMOVED, FaultPoint.COLLECT_OBJECT_DELETED]


@pytest.mark.parametrize("point", POINTS, ids=str)
async def test_what_a_killed_collector_left_goes_with_the_next_one(lab: BrokenFarm, point: FaultPoint):
    """Whoever passes the point is killed there, a driver that prunes or a shard: what is held stays, all else goes."""
    (gone, gone_image), (held, held_image) = lab.image(MIB, MIB), lab.image(MIB)
    async with lab.driver() as one:
        held_ref = await one.pull(held, plain_http=True)
        await held_ref.unlazy()
        async with lab.driver() as two:
            await (await two.pull(gone, plain_http=True)).unlazy()
        await lab.end_flights(gone_image, held_image)
        wanted = f"description~={gone}|{held}"
        killed = lab.faults.kill(point)
        async with driver_process(lab.running.state_dir, "prune", wanted, environ=lab.running.environ) as pruner:
            await pruner.process.wait()
        await eventually(killed, "somebody to be killed")
        async with open_collection(lab.running.settings) as collection:
            await collection.prune(everything=True, filters=[wanted])
            left = {use.id for use in (await collection.usage()).refs}
        assert held_ref.id in left
        await eventually(lambda: not lab.objects_of(gone_image), "the objects to be deleted", within_s=45)
        assert len(lab.objects_of(held_image)) == len(held_image.layers) + 1
        await held_ref.extract("n1")
    await lab.assert_whole(held_image)
