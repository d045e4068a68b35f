"""Collection on a real farm: what is held stays, what is not goes to the last object, and nobody's pull notices."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from cluster.errors import RefNotFoundError
from storage.blobs import S3ContentStore
from tests.doubles.observed import eventually
from tests.doubles.registry import random_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry]


def push(registry, repository, *, layers=3):
    image = random_image(secrets.randbits(64), layers=layers, layer_bytes=20_000)
    registry.push(repository, "t", image)
    return f"{registry.host}/{repository}:t", image


def objects_of(farm, image):
    """Return the objects in the bucket that an image's blobs lie in."""
    store = S3ContentStore(farm.settings.config.s3)
    try:
        digests = [*(layer.digest for layer in image.layers), image.digest]
        found = [info.key for digest in digests for info in store.objects(f"blobs/{digest.replace(':', '/')}/")]
    finally:
        store.close()
    return found


async def test_a_driver_keeps_what_it_has_and_leaves_nothing(farm, registry):
    """No prune takes what a driver holds; once it has left, prune takes all of it, down to the objects in S3."""
    name, image = push(registry, "collect/whole")
    async with await farm.connect() as driver:
        ref = await driver.pull(name, plain_http=True)
        await ref.extract("n1")
        assert len(objects_of(farm, image)) == len(image.layers) + 1
        pruned = await driver.prune(everything=True)
        assert ref.id not in {item.id for item in pruned.items}
        assert {hold.lease.labels.get("owner") for hold in (await driver.kept(ref.id)).holds} == {"driver"}
        usage = {use.name: use for use in (await driver.du()).images}[name]
        assert (usage.is_in_use, usage.avoided_bytes) == (True, 0)
        await ref.extract("n2")
    # Who waits for a fetch has two minutes to hold what came of it; nobody waits any more.
    fetched = [f"flight:{digest}" for digest in (*(layer.digest for layer in image.layers), image.digest)]
    left = [lease["id"] for lease in farm.cli_json("leases", "ls")["leases"]]
    farm.cli("leases", "release", *(lease for lease in fetched if lease in left))
    async with await farm.connect() as driver:
        pruned = await driver.prune(everything=True)
        assert ref.id in {item.id for item in pruned.items}
        with pytest.raises(RefNotFoundError):
            await driver.get(name)
        await eventually(lambda: not objects_of(farm, image), "the objects to be deleted", within_s=40)
        again = await driver.pull(name, plain_http=True)
        assert all(layer.is_lazy for layer in again.layers)
        await again.unlazy()
        assert len(objects_of(farm, image)) == len(image.layers) + 1


async def test_a_prune_never_fails_a_pull(farm, registry):
    """Drivers that come and go pull, extract and let go of the same images, while others prune without a pause."""
    pushed = [push(registry, f"collect/race-{n}", layers=2) for n in range(2)]
    stopping = asyncio.Event()

    async def pull_again_and_again(seed):
        for turn in range(4):
            name, _ = pushed[(seed + turn) % 2]
            async with await farm.connect() as driver:
                ref = await driver.pull(name, plain_http=True)
                result = await ref.extract(("n0", "n1")[seed])
                assert result.path

    async def prune_again_and_again():
        count = 0
        async with await farm.connect() as driver:
            while not stopping.is_set():
                count += len((await driver.prune(everything=True)).items)
        return count

    pruning = asyncio.ensure_future(prune_again_and_again())
    try:
        await asyncio.gather(*map(pull_again_and_again, range(2)))
    finally:
        stopping.set()
    assert await pruning > 0
