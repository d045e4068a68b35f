"""Whoever owns a flight, or waits for one, is killed between any two steps."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from cluster.faultpoints import FaultPoint
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted, eventually
from tests.doubles.registry import Registry, docker_registry
from tests.doubles.registry_faults import blobs

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

#: Points that an extract by two nodes passes, in the order in which it does.
_EXTRACT = [
    FaultPoint.FLIGHT_OWNED,
    FaultPoint.UPLOAD_BEGUN,
    FaultPoint.UPLOAD_RECORDED,
    FaultPoint.FETCH_PART_RECEIVED,
    FaultPoint.FETCH_PART_UPLOADED,
    FaultPoint.FETCH_PART_RECORDED,
    FaultPoint.UPLOAD_COMPLETE_BEFORE,
    FaultPoint.UPLOAD_COMPLETE_AFTER,
    FaultPoint.COMMIT_BEFORE,
    FaultPoint.COMMIT_AFTER,
    FaultPoint.PIN_BEFORE,
    FaultPoint.EXTRACT_BEFORE,
    FaultPoint.EXTRACT_APPLIED,
    FaultPoint.SNAPSHOT_PUBLISH_BEFORE,
    FaultPoint.SNAPSHOT_PUBLISH_AFTER,
    FaultPoint.MOUNT_BEFORE,
    FaultPoint.LEASE_RENEW_BEFORE,
]
#: Points of a push, and whether its target is a registry of its own, which can't mount.
_PUSH = [
    (FaultPoint.PUSH_MOUNT_BEFORE, False),
    (FaultPoint.PUSH_UPLOAD_BEFORE, True),
    (FaultPoint.PUSH_MANIFEST_BEFORE, False),
]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Registry]:
    """A registry that has nothing yet."""
    with docker_registry() as registry:
        yield registry


@pytest.mark.parametrize("point", _EXTRACT, ids=str)
async def test_an_extract_outlives_the_death_of_a_worker_at(lab: BrokenFarm, point: FaultPoint):
    """Two drivers extract on two nodes, one of whose workers is killed at the point: both get their files.

    The other node goes on, or takes over; the killed node's driver asks again when its worker is back. No byte
    is fetched twice but for the ranges that were open, and nothing of the dead is left (I1, I2, I4, I6, I9).
    """
    name, image = lab.image(17 * MIB, 6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        killed = lab.faults.kill(point)
        got = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        assert killed()
    for result in got:
        assert_extracted(result.path, image)
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)


async def test_actors_that_are_killed_are_back_without_being_called(lab: BrokenFarm):
    """Every actor is killed, the supervisor too: each is there again by itself, though nobody asks it for anything."""
    before = {actor.name: actor.pid for actor in await eventually(lab.actors, "actors")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    async def are_back() -> bool:
        now = {actor.name: actor.pid for actor in await lab.actors()}
        return set(now) == set(before) and not set(now.values()) & set(before.values())

    await eventually(are_back, "every actor", within_s=40)
    await lab.assert_whole()


async def test_a_flight_outlives_the_death_of_one_who_waits_for_it(lab: BrokenFarm):
    """A waiter that is killed costs the owner nothing, and its driver joins again: each byte comes once."""
    name, image = lab.image(12 * MIB)
    lab.proxy.bytes_per_s = 4 * MIB
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        killed = lab.faults.kill(FaultPoint.FLIGHT_JOINED)
        got = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        assert killed()
    for result in got:
        assert_extracted(result.path, image)
    lab.assert_fetched(image)
    await lab.assert_whole(image)


async def test_a_flight_outlives_the_death_of_who_took_it_over(lab: BrokenFarm):
    """The owner dies after a part, the next one before it has read back what it resumed: a third one ends it."""
    name, image = lab.image(17 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        killed = lab.faults.kill(FaultPoint.FETCH_PART_RECORDED)
        killed_too = lab.faults.kill(FaultPoint.READBACK_BEFORE)
        got = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"))
        assert killed()
        assert killed_too()
    for result in got:
        assert_extracted(result.path, image)
    lab.assert_fetched(image, lost_owners=2)
    await lab.assert_whole(image)


@pytest.mark.parametrize("point", [FaultPoint.PULL_RESOLVED, FaultPoint.PULL_RECORDED], ids=str)
async def test_a_pull_outlives_the_death_of_a_worker_at(lab: BrokenFarm, point: FaultPoint):
    """Two drivers pull one image, the worker of one is killed: both have the same lazy ref, and no layer moved."""
    name, image = lab.image(6 * MIB, MIB)
    async with lab.driver() as one, lab.driver() as two:
        killed = lab.faults.kill(point)
        mine, theirs = await asyncio.gather(one.pull(name, plain_http=True), two.pull(name, plain_http=True))
        assert killed()
        assert mine.id == theirs.id
        assert mine.is_lazy
        assert mine.digest == image.digest
    assert not any(lab.proxy.blob_bytes[layer.digest] for layer in image.layers)
    await lab.assert_whole(image)


@pytest.mark.parametrize(("point", "is_elsewhere"), _PUSH, ids=str)
async def test_a_push_outlives_the_death_of_a_worker_at(
    lab: BrokenFarm, elsewhere: Registry, point: FaultPoint, is_elsewhere: bool
):
    """Two drivers push one image, the worker of one is killed: both targets have the very manifest and layers.

    One layer is large enough to be forwarded while it arrives, the other is not.
    """
    name, image = lab.image(17 * MIB, MIB)
    host = elsewhere.host if is_elsewhere else lab.proxy.host
    tag = name.rpartition(":")[2]
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        killed = lab.faults.kill(point)
        await asyncio.gather(
            one.push(mine, f"{host}/first:{tag}", plain_http=True),
            two.push(theirs, f"{host}/second:{tag}", plain_http=True),
        )
        assert killed()
    target = elsewhere if is_elsewhere else lab.registry
    for repository in ("first", "second"):
        status, _, body = target.call("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": image.media_type})
        assert (status, body) == (200, image.manifest)
        for layer in image.layers:
            status, _, body = target.call("GET", f"/v2/{repository}/blobs/{layer.digest}")
            assert (status, body) == (200, layer.data)
    if is_elsewhere:
        lab.assert_fetched(image, lost_owners=1)
    else:
        assert not [seen for seen in lab.proxy.seen if blobs(seen) and seen.digest in lab.fetched(image)]
    await lab.assert_whole(image)
