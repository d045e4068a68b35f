"""A fetch worker's calls about its node's disk, over a real Redis; Ray and S3 are nowhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors import boot as boot_module
from actors.boot import Boot
from actors.fetch_worker import FetchWorker
from actors.replies import unwrap
from cluster.collect.policy import KeepPolicy
from cluster.config import Config
from cluster.graph import CacheMount
from cluster.messages import NodePruneRequest, NodePruneResult, NodeUsageRequest, NodeUsageResult
from cluster.wire import encode
from lazyfarm.collection import keep_policy
from storage.containers.caches import Caches
from storage.node_roots import DeadNodes
from tests.doubles.stores import FakeClock

pytestmark = pytest.mark.redis


@pytest.fixture
async def worker(redis_farm, tmp_path, monkeypatch):
    monkeypatch.setattr(boot_module, "configure_logs", lambda **_: None)  # a process's own affair
    config = Config()
    config = replace(
        config,
        farm=replace(config.farm, name=redis_farm.keys.farm),
        redis=redis_farm.config,
        s3=replace(config.s3, endpoint="http://127.0.0.1:9"),
        node=replace(config.node, snapshotter="copying", root=str(tmp_path / "nodes")),
    )
    made = FetchWorker(encode("boot", Boot(config=config, state_dir="", name="w", kind="fetch-worker", node="n0")))
    await made.ready()
    yield made
    await made._starter.background.aclose()
    await made._parts.stores.link.close()
    made._parts.threads.shutdown()


async def usage(worker):
    return unwrap("node-du", NodeUsageResult, await worker.node_usage(encode("node-du", NodeUsageRequest())))


async def prune(worker, policy, *, dry=False):
    request = encode("node-prune", NodePruneRequest(policy=policy, is_dry_run=dry))
    return unwrap("node-prune", NodePruneResult, await worker.prune_node(request))


async def test_a_node_tells_what_lies_there_and_removes_it(worker, tmp_path):
    """As asked for: by filter, and not at all in a dry run."""
    caches = Caches.of_node(tmp_path / "nodes" / "n0" / "containers")
    for name in ("apt", "npm"):
        async with caches.use(CacheMount(target="/c", id=name)) as path:
            (path / "x").write_bytes(b"x" * 10_000)
    found = await usage(worker)
    assert (found.node, {item.description for item in found.items}) == ("n0", {"apt", "npm"})
    assert 0 < found.free_bytes <= found.disk_bytes
    apt = keep_policy(everything=True, keep_bytes=0, keep_duration_s=0.0, filters=["description==apt"])

    dry = await prune(worker, apt, dry=True)
    assert [item.description for item in dry.items] == ["apt"]
    assert len((await usage(worker)).items) == 2
    pruned = await prune(worker, apt)

    assert (pruned.items[0].id, pruned.freed_bytes, pruned.kept) == (dry.items[0].id, dry.freed_bytes, 0)
    assert pruned.freed_bytes >= 10_000
    assert [item.description for item in (await usage(worker)).items] == ["npm"]
    assert (await prune(worker, KeepPolicy(max_used_bytes=10**9))).items == ()


async def test_a_worker_holds_its_nodes_directory(worker, tmp_path):
    """From its start: no other worker of the machine takes it for a dead node's."""
    clock = FakeClock()
    (tmp_path / "nodes" / "n1").mkdir()
    others = DeadNodes(tmp_path / "nodes" / "n1", grace_s=1.0, clock=clock)
    others.sweep()
    clock.advance(2.0)
    assert others.sweep() == []
    assert (tmp_path / "nodes" / "n0" / "lock").exists()
