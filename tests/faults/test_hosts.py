"""Hosts with addresses of their own, one of which is cut off from all others without a word, and comes back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.cache.ring import ShardRing
from cluster.config import S3Config
from cluster.faultpoints import FaultPoint
from storage.blobs import S3ContentStore
from tests.doubles.faults import LEASE_TTL_S, MIB, assert_extracted, eventually
from tests.doubles.hosts import HostFarm, Network, host_farm

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

#: Seconds in which whoever waits for a flight finds it free: between two looks for a lost message.
_LOOK_S = 0.5
#: For a process to get its turn on a busy machine.
_SLACK_S = 1.5


@pytest.fixture(scope="module", params=[3, pytest.param(5, marks=pytest.mark.long)], ids="{}-hosts".format)
def hosts(swift_s3: S3Config, request: pytest.FixtureRequest) -> Iterator[HostFarm]:
    """A farm of so many hosts; Redis, S3 and the registry are reached through their network."""
    s3 = replace(swift_s3, bucket=f"hosts-{request.param}")
    store = S3ContentStore(s3)
    store.ensure_bucket()
    store.close()
    with host_farm(s3, Network(number=40 + request.param, count=request.param)) as farm:
        yield farm


async def _joined(farm: HostFarm, digest: str) -> None:
    await eventually(lambda: farm.keys(f"waiters:blob:{digest}"), "somebody to wait", within_s=40)


async def test_an_owner_that_is_cut_off_is_replaced_within_a_lease_and_refused_when_it_is_back(hosts: HostFarm):
    """Its host is cut off right before it commits: another host's worker owns the flight one lease later, and commits.

    The old owner goes on as if nothing had been, and is heard when the network heals: the blob is what the new one
    committed, and the caller on the old one's host, who never lost his worker, is served (I1, I10).
    """
    name, image = hosts.hosted_image(12 * MIB)
    (layer,) = image.layers
    gate = hosts.faults.hang(FaultPoint.COMMIT_BEFORE)
    async with hosts.driver_on(1, "extract", name, "n1") as mine, hosts.driver_on(2, "extract", name, "n2") as theirs:
        for driver in (mine, theirs):
            assert "pulled" in await driver.said()
        await gate.arrival()
        await _joined(hosts, layer.digest)
        former = await hosts.owner_of(layer.digest)
        assert former in ("fetch-worker-n1", "n1", "fetch-worker-n2", "n2")
        # Whoever was faster owns it, the other waits.
        cut, driver, other = (1, mine, theirs) if former.endswith("n1") else (2, theirs, mine)
        with hosts.network.cut_off(cut):
            started_s = time.monotonic()

            async def is_replaced() -> bool:
                return await hosts.owner_of(layer.digest) not in (None, former)

            await eventually(is_replaced, "another owner")
            assert time.monotonic() - started_s < LEASE_TTL_S + _LOOK_S + _SLACK_S
            gate.open()
            assert_extracted((await other.said())["path"], image)
            committed = await hosts.blob(layer.digest)
            assert committed is not None
        assert_extracted((await driver.said())["path"], image)
        assert await hosts.blob(layer.digest) == committed
    hosts.assert_fetched(image, lost_owners=1)
    await hosts.assert_consistent(image)


async def test_a_shard_that_is_cut_off_costs_its_callers_an_error_and_nobody_else_anything(hosts: HostFarm):
    """Its refs are a typed error within the time of a call, those of another shard are there; healed, all are (I5)."""
    shards = {actor.node: actor.name for actor in await hosts.actors() if actor.kind == "cache-shard"}
    assert set(shards) == {"n0", "n1"}
    before = set(await hosts.keys("ref:*"))
    name, _image = hosts.hosted_image(*[1000] * 4)
    async with hosts.driver_on(0, "extract", name, "n0") as driver:
        assert "pulled" in await driver.said()
        assert "path" in await driver.said()
    wanted = sorted(key.removeprefix("ref:") for key in set(await hosts.keys("ref:*")) - before)
    assert len(wanted) == 4  # one a layer, each with a shard of its own
    lost = {ref for ref in wanted if ShardRing(len(shards)).shard_of(ref) == int(shards["n1"].split("@")[0][-1])}
    with hosts.network.cut_off(1):
        async with hosts.driver_on(2, "get", *wanted) as driver, asyncio.timeout(60):
            answers = [await driver.said() for _ in wanted]
    for ref, answer in zip(wanted, answers, strict=True):
        if ref in lost:
            assert answer.get("error") in {"UnavailableError", "DeadlineExceededError"}
        else:
            assert answer == {"got": ref}
    async with hosts.driver_on(2, "get", *wanted) as again:
        for ref in wanted:
            assert await again.said() == {"got": ref}
    await hosts.assert_consistent()


async def test_what_is_under_way_goes_on_while_the_head_is_cut_off(hosts: HostFarm):
    """Two hosts fetch one layer while the head, with Ray's GCS, is silent: both have it before the network heals.

    Then the farm is whole, and what is new is pulled.
    """
    name, image = hosts.hosted_image(12 * MIB)
    gate = hosts.faults.hang(FaultPoint.FETCH_PART_RECORDED)
    async with hosts.driver_on(1, "extract", name, "n1") as mine, hosts.driver_on(2, "extract", name, "n2") as theirs:
        for driver in (mine, theirs):
            assert "pulled" in await driver.said()
        await gate.arrival()
        await _joined(hosts, image.layers[0].digest)
        with hosts.network.cut_off(0):
            gate.open()
            async with asyncio.timeout(20):
                for driver in (mine, theirs):
                    assert_extracted((await driver.said())["path"], image)
    hosts.assert_fetched(image, lost_owners=0)
    name, image = hosts.hosted_image(MIB)
    async with hosts.driver_on(2, "extract", name, "n0") as driver:
        assert "pulled" in await driver.said()
        assert_extracted((await driver.said())["path"], image)
    await hosts.assert_consistent(image)
