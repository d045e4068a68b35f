"""An owner that is stopped, not dead, for longer than its lease, and then goes on as if nothing had been."""

from __future__ import annotations

import asyncio

import pytest

from cluster.faultpoints import FaultPoint
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted, eventually, paused

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]


@pytest.mark.parametrize(
    "point",
    [
        FaultPoint.FETCH_PART_UPLOADED,
        FaultPoint.UPLOAD_COMPLETE_BEFORE,
        FaultPoint.UPLOAD_COMPLETE_AFTER,
        FaultPoint.COMMIT_BEFORE,
    ],
    ids=str,
)
async def test_i10_a_stale_owner_changes_nothing(lab: BrokenFarm, point: FaultPoint):
    """An owner is paused at the point until another node has taken over and committed; then it goes on.

    Its commit is refused: the blob is the other's object still, whole and right, and its caller is served.
    """
    name, image = lab.image(12 * MIB)
    digest = image.layers[0].digest
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        gate = lab.faults.hang(point)
        stale = asyncio.ensure_future(_extract(mine, "n1"))
        with paused(await gate.arrival()):
            fresh = await theirs.extract("n2")
            committed = await lab.blob(digest)
        assert committed is not None
        assert not stale.done()
        gate.open()
        late = await stale
    assert_extracted(fresh.path, image)
    assert_extracted(late.path, image)
    assert await lab.blob(digest) == committed
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)


async def test_a_paused_waiter_is_served_when_it_goes_on(lab: BrokenFarm):
    """A waiter's whole process is stopped while the flight ends: it missed the news, and looks."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        owner_gate = lab.faults.hang(FaultPoint.COMMIT_BEFORE)
        owner = asyncio.ensure_future(_extract(mine, "n1"))
        await owner_gate.arrival()
        waiter_gate = lab.faults.hang(FaultPoint.FLIGHT_JOINED)
        waiter = asyncio.ensure_future(_extract(theirs, "n2"))
        with paused(await waiter_gate.arrival()):
            waiter_gate.open()
            owner_gate.open()
            assert_extracted((await owner).path, image)
        assert_extracted((await waiter).path, image)
    lab.assert_fetched(image)
    await eventually(lambda: not lab.staged(), "no staging file")
    await lab.assert_whole(image)


async def _extract(ref, node):
    return await ref.extract(node)
