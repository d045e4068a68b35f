"""Collection on a real farm's nodes: what is held stays usable, what is not goes and comes again."""

from __future__ import annotations

import asyncio
import os
import secrets

import pytest

from lazyfarm.graph import cache, image
from tests.doubles.registry import random_image
from tests.doubles.shell_image import shell_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry]


def push(registry, repository):
    made = random_image(secrets.randbits(64), layers=2, layer_bytes=20_000)
    registry.push(repository, "t", made)
    return f"{registry.host}/{repository}:t"


def chains(ref):
    return {f"snapshot {layer.record.chain}" for layer in ref.layers}


def there(usage):
    return {item.id: item for item in usage.items}


async def test_what_is_held_stays_and_what_is_not_comes_again(farm, registry):
    """Mounted and unmounted by the farm; the bucket keeps what a node forgets, and no hint leads there any more."""
    kept, gone = push(registry, "node-collect/kept"), push(registry, "node-collect/gone")
    async with await farm.connect() as holder:
        held = await holder.pull(kept, plain_http=True)
        mounted = await held.extract("n1")
        async with await farm.connect() as passer:
            ref = await passer.pull(gone, plain_http=True)
            was = await ref.extract("n1")
            lost = chains(ref)
        (usage,) = await holder.node_usage("n1")
        items = there(usage)
        assert lost | chains(held) <= items.keys()
        assert {bool(items[each].held_by) for each in lost} == {False}
        assert {items[each].held_by.split(":")[0].split()[0] for each in chains(held)} == {"lease"}
        assert usage.free_bytes > 0

        dry = await asyncio.to_thread(farm.cli_json, "prune", "--node", "n1", "--dry-run")
        assert lost <= {item["id"] for item in dry["nodes"][0]["items"]}
        (pruned,) = await holder.prune_nodes("n1")

        assert lost <= {item.id for item in pruned.items}
        assert pruned.freed_bytes > 0
        (usage,) = await holder.node_usage("n1")
        assert not lost & there(usage).keys()
        assert chains(held) <= there(usage).keys()
        assert list(os.scandir(mounted.path))
        assert not os.access(was.path, os.F_OK)

        registry.forget()
        again = await (await holder.get(gone)).extract("n1")
        assert list(os.scandir(again.path))
        assert registry.count("GET", "blob", 200) == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")
async def test_a_cache_mount_is_listed_and_pruned(farm, registry):
    """By the ID that its op gives it, on the node that ran it."""
    made = shell_image(secrets.token_hex(8))
    registry.push("node-collect/base", "1", made)
    cache_id = secrets.token_hex(4)
    graph = image(f"{registry.host}/node-collect/base:1", plain_http=True).run(
        "echo kept > /cache/log; cat /cache/log > /out", mounts=[cache("/cache", id=cache_id)]
    )
    async with await farm.connect() as driver:
        await driver.solve(graph)
        found = [item for node in await driver.node_usage() for item in node.items if item.description == cache_id]
        assert [item.kind.value for item in found] == ["exec.cachemount"]
        assert found[0].size_bytes > 0
        listed = await asyncio.to_thread(farm.cli, "du", "--nodes")
        assert cache_id in listed.stdout
        pruned = await asyncio.to_thread(
            farm.cli_json, "prune", "--nodes", "--filter", f"type==exec.cachemount,description=={cache_id}"
        )
        assert [item["id"] for node in pruned["nodes"] for item in node["items"]] == [found[0].id]
        left = [item.description for node in await driver.node_usage() for item in node.items]
        assert cache_id not in left
