"""What becomes of drivers' directories that nobody needs any more, and what never goes. Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.collect.pace import Pace
from cluster.collect.policy import KeepPolicy, default_policies
from cluster.collect.sweep import NAMELESS, Suspect
from cluster.digest import digest_of
from cluster.errors import TreeLostError
from cluster.graph import Definition, LocalOp, Vertex, encode_definition
from cluster.job import JobId, JobSpec
from cluster.lease import LeaseId, tree_resource
from cluster.messages import SessionInfo
from lazyfarm.context import scan
from storage.jobs import RedisJobStore
from storage.local_trees import LocalTrees
from storage.memory_blobs import MemoryContentStore
from storage.sweeper import due_sweep, sweep
from tests.doubles.collect import GRACE_S, Bench
from tests.doubles.stores import RedisFarm

pytestmark = pytest.mark.redis

DRIVER = LeaseId("driver-1")
HOUR_S = 3600.0
EVERYTHING = KeepPolicy()


class Drivers:
    """A farm to which drivers send directories."""

    def __init__(self, farm, threads, tmp_path):
        self.bench = Bench(farm.stores())
        self.stores = self.bench.stores
        self.farm = farm
        self.bucket = MemoryContentStore()
        self.root = tmp_path
        link = farm.links[0]

        async def hold(resources):
            await self.stores.leases.create(DRIVER, ttl_s=48 * HOUR_S)
            await self.stores.leases.attach(DRIVER, resources)

        self.trees = LocalTrees(link, farm.keys, self.bucket, threads=threads, hold=hold)

    def scan(self, *names):
        """A directory with a file for each name."""
        root = self.root / secrets.token_hex(4)
        root.mkdir()
        for name in names:
            (root / name).write_text(name * 100)
        return scan(root)

    async def send(self, *names):
        scanned = self.scan(*names)
        await self.trees.send(scanned.tree, scanned.paths)
        return scanned

    async def leave(self):
        await self.stores.leases.delete(DRIVER)

    async def prune(self, policy=EVERYTHING):
        pruned = await self.bench.collector.prune(policy)
        self.stores.pass_time(GRACE_S + 1)
        await self.bench.delete_due()
        for key in self.bench.deleted:
            self.bucket.delete(key)
        return pruned

    async def sweep(self):
        current = await due_sweep(self.stores.collect, every_s=0.0)
        await sweep(self.stores.collect, self.bucket, current, stray_s=HOUR_S, pace=Pace(0.0))
        await self.bench.delete_due()
        for key in self.bench.deleted:
            self.bucket.delete(key)

    async def is_whole(self, scanned):
        into = self.root / secrets.token_hex(4)
        into.mkdir()
        await self.trees.materialise(await self.trees.open_tree(scanned.digest), into)
        return scan(into).digest == scanned.digest

    def objects(self):
        return [info.key for info in self.bucket.objects("local/")]

    async def records(self):
        """Return the keys in Redis that tell of directories."""
        pattern = f"{self.farm.keys.prefix}:local:*"
        _, found = await self.farm.links[0].execute("SCAN", 0, "MATCH", pattern, "COUNT", 100_000)
        return sorted(key.decode().partition(":local:")[2].partition(":")[0] for key in found)


@pytest.fixture
async def drivers(redis_any, tmp_path):
    # As a user with no right too many.
    farm = RedisFarm(redis_any.farm_config, redis_any.config)
    with ThreadPoolExecutor(4) as threads:
        yield Drivers(farm, threads, tmp_path)
    await farm.close()


async def test_what_a_driver_holds_stays_and_all_else_goes_to_the_last_record(drivers):
    """Also an object that another directory stands on stays; in the end, nothing is left in bucket or Redis."""
    base = await drivers.send("a", "b")
    await drivers.leave()
    more = await drivers.send("b", "c")
    pruned = await drivers.prune()
    assert [item.kind.value for item in pruned.items] == ["source.local", "source.local"]
    assert await drivers.is_whole(more), "it stands on an object that came with the other one"
    with pytest.raises(TreeLostError):
        await drivers.trees.open_tree(base.digest)
    await drivers.leave()
    usage = await drivers.bench.collector.usage()
    assert usage.local_bytes == sum(info.size_bytes for info in drivers.bucket.objects("local/")) > 0
    assert (await drivers.prune()).freed_bytes == usage.local_bytes
    assert drivers.objects() == []
    await drivers.sweep()
    assert await drivers.records() == []


async def test_the_default_policies_keep_what_was_used_within_two_days(drivers):
    """And all of it while there is less than half a gigabyte; a use on a node counts."""
    used = await drivers.send("a")
    await drivers.send("b")
    await drivers.leave()
    soon_useless, *_ = default_policies(reserved_bytes=0, max_used_bytes=0)
    drivers.stores.pass_time(47 * HOUR_S)
    assert await drivers.is_whole(used)
    drivers.stores.pass_time(2 * HOUR_S)
    assert (await drivers.prune(soon_useless)).items == ()
    over = KeepPolicy(filters=soon_useless.filters, keep_duration_s=soon_useless.keep_duration_s, max_used_bytes=1)
    assert len((await drivers.prune(over)).items) == 3, "a directory, its manifest and its file"
    assert await drivers.is_whole(used)


async def test_the_directories_of_a_job_that_goes_on_stay(drivers):
    """Its driver is gone; when it has ended, they go."""
    scanned = await drivers.send("a")
    vertex = Vertex(op=LocalOp(tree=scanned.digest))
    definition = Definition(vertices={vertex.digest: vertex}, targets=(vertex.digest,))
    jobs = RedisJobStore(drivers.farm.links[0], drivers.farm.keys)
    job = JobId("j" * 26)
    payload = encode_definition(definition)
    spec = JobSpec(
        id=job,
        definition=digest_of(payload),
        targets=definition.targets,
        session=SessionInfo(session_id="s"),
        is_detached=True,
    )
    await jobs.submit(spec, payload)
    await drivers.leave()
    assert (await drivers.prune()).items == ()
    assert await drivers.is_whole(scanned)
    await drivers.farm.links[0].execute("ZREM", drivers.farm.keys.jobs_held, job)
    assert (await drivers.prune()).items != ()
    assert drivers.objects() == []


@pytest.mark.parametrize("use", ["open", "hold"])
async def test_a_use_between_look_and_removal_keeps_it(drivers, monkeypatch, use):
    """By a node, or by the next driver: the removal looks again, as the planner saw it unused and held by nobody."""
    scanned = await drivers.send("a")
    await drivers.leave()
    collect = drivers.stores.collect
    remove = collect.remove_tree

    async def remove_late(tree, *, grace_s):
        if use == "open":
            await drivers.trees.open_tree(tree.digest)
        else:
            await drivers.trees._hold([tree_resource(tree.digest)])
        return await remove(tree, grace_s=grace_s)

    drivers.stores.pass_time(1.0)
    monkeypatch.setattr(collect, "remove_tree", remove_late)
    assert (await drivers.prune()).items == ()
    assert await drivers.is_whole(scanned)


async def test_what_is_collected_while_it_is_sent_is_sent_again(drivers, monkeypatch):
    """The farm had the file when it was asked; it is gone when the directory is to stand on it."""
    await drivers.send("a", "b")
    scanned = drivers.scan("b", "c")
    await drivers.leave()
    assert [scanned.paths[digest].name for digest in await drivers.trees.missing(scanned.tree.files)] == ["c"]
    put_files = drivers.trees.put_files
    puts = []

    async def put_late(paths):
        if not puts:
            await drivers.farm.links[0].execute("HDEL", drivers.farm.keys.local_objects, *drivers.objects())
        puts.append(sorted(path.name for path in paths.values()))
        await put_files(paths)

    monkeypatch.setattr(drivers.trees, "put_files", put_late)
    sent = await drivers.trees.send(scanned.tree, scanned.paths)
    assert (puts, sent.files) == ([["c"], ["b"]], 2)
    assert await drivers.is_whole(scanned)


async def test_a_record_that_comes_late_keeps_its_object(drivers):
    """Its driver was paused, its lease lapsed, and the sweeper had the object for a stray."""
    await drivers.trees.put_files(drivers.scan("a").paths)
    (key,) = drivers.objects()
    stray = Suspect(NAMELESS, key)
    await drivers.farm.links[0].execute("HDEL", drivers.farm.keys.local_objects, key)
    await drivers.leave()
    assert await drivers.stores.collect.strays([stray], stray_s=0.0) == [stray]
    await drivers.farm.links[0].run("local_put", drivers.farm.keys.prefix, key, 100)
    assert await drivers.bench.delete_due() == 0


async def test_what_a_killed_driver_left_of_a_directory_goes(drivers):
    """Its files are there, and it stands on them; it has no manifest."""
    scanned = drivers.scan("a", "b")
    await drivers.trees.put_files(scanned.paths)
    assert await drivers.trees._stand(scanned.digest, scanned.tree.files) == []
    await drivers.leave()
    await drivers.prune()
    assert drivers.objects() == []
    await drivers.sweep()
    assert await drivers.records() == []


async def test_strays_of_drivers_go_and_what_is_recorded_or_under_way_stays(drivers):
    """An object of a driver that was killed before its record; the same while the driver lives."""
    scanned = await drivers.send("a")
    await drivers.leave()
    stray, under_way = (f"local/packs/{secrets.token_hex(16)}" for _ in range(2))
    for key in (stray, under_way, "local/mine"):
        drivers.bucket.put(key, b"")
    drivers.bucket.begin_upload(under_way)
    await drivers.trees._hold([f"object:{under_way}"])
    for _ in range(3):
        await drivers.sweep()
        drivers.stores.pass_time(HOUR_S + 1)
    assert stray not in drivers.objects()
    assert {under_way, "local/mine"} <= set(drivers.objects())
    assert drivers.bucket.list_uploads("local/") != []
    assert await drivers.is_whole(scanned)
