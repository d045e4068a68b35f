"""Who repairs a blob, or sweeps the bucket, is killed in the midst: nothing is half done, and the next one goes on."""

from __future__ import annotations

import json

import pytest

from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.collect.verify import FaultKind
from cluster.digest import digest_of
from cluster.faultpoints import FaultPoint
from lazyfarm.verify import quarantined
from storage.fetching import new_key
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

POINTS = [FaultPoint.VERIFY_FOUND, FaultPoint.VERIFY_QUARANTINED]


@pytest.mark.parametrize("point", POINTS, ids=str)
async def test_what_a_killed_verifier_left_is_repaired(lab: BrokenFarm, point: FaultPoint):
    """The call is made again by itself; the damaged object ends in quarantine, and the layer is fetched anew."""
    name, image = lab.image(MIB)
    layer = image.layers[0]
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        await ref.unlazy()
        damaged = await lab.blob(layer.digest)
        assert damaged is not None
        lab.store.put(damaged.key, bytes(byte ^ 0xFF for byte in layer.data))
        told = lab.running.cli("verify", name, "--json", check=False)
        assert (told.returncode, json.loads(told.stdout)["unrepaired"]) == (1, 1)
        killed = lab.faults.kill(point)
        verified = await one.verify(name, repair=True, bytes_per_s=0)
        assert killed()
        (fault,) = verified.faults
        assert (fault.digest, fault.kind, verified.unrepaired) == (layer.digest, FaultKind.DAMAGED, ())
        assert await lab.blob(layer.digest) is None
        assert QUARANTINE_PREFIX + damaged.key in {kept.key for kept in quarantined(lab.running.settings)}
        await eventually(lambda: lab.store.head(damaged.key) is None, "the damaged object to be deleted", within_s=45)
        assert_extracted((await ref.extract("n1")).path, image)
        assert (await one.verify(name)).faults == ()
    await lab.assert_whole(image)


async def test_what_a_killed_sweeper_judged_goes_with_the_next_one(lab: BrokenFarm):
    """A shard is killed when it has judged: the stray goes, what a record names stays."""
    name, image = lab.image(MIB)
    stray = new_key(digest_of(name.encode()))
    lab.store.put(stray, b"a commit that was lost")
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        await ref.unlazy()
        for is_killed in (False, True):
            # An hour later, as the farm's records have it; and a round is due.
            await lab.redis("ZADD", f"{lab.prefix}:strays", "XX", "INCR", -4_000_000, f"{stray} ")
            killed = lab.faults.kill(FaultPoint.SWEEP_JUDGED) if is_killed else lambda: True

            async def happened(killed=killed) -> bool:
                # Again and again: one that is under way notes its end, and then none is due.
                await lab.redis("DEL", f"{lab.prefix}:round:sweep")
                return killed()

            await eventually(happened, "a shard to be killed", within_s=45)
            await eventually(lambda: lab.redis("EXISTS", f"{lab.prefix}:round:sweep"), "a round", within_s=45)
        await eventually(lambda: lab.store.head(stray) is None, "the stray to be deleted", within_s=45)
        assert_extracted((await ref.extract("n1")).path, image)
    await lab.assert_whole(image)
