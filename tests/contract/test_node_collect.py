"""Collection on a node: what a lease, a process or a snapshot above it needs stays; over memory and Redis."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.collect.filters import parse_filter
from cluster.collect.policy import KeepPolicy
from cluster.digest import chain_id, digest_of
from cluster.errors import SnapshotError, UnavailableError
from cluster.fetch.extract import mount_name
from cluster.graph import CacheMount, Sharing
from cluster.lease import LeaseId
from cluster.ref import RefRecord
from storage.containers.caches import Caches
from storage.disk_usage import disk_bytes
from storage.memory_solver import MemoryWhereabouts, SolverMemory
from storage.node_cache import NodeCache
from storage.node_collect import NodeCollector
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.doubles.layers import Bytes, file, layer
from tests.doubles.stores import FakeClock

KINDS = {"overlay": OverlaySnapshotter, "copying": CopyingSnapshotter}
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
L = LeaseId("driver-1")
ALL = KeepPolicy(includes_shared=True)
BIG = 200_000
BASE, APP, TOOL = (layer(file(name, os.urandom(BIG))) for name in ("base", "app", "tool"))


class Bench:
    """One node, over the farm's stores."""

    def __init__(self, stores, root: Path, kind: str) -> None:
        self.stores = stores
        self.root = root
        self.snapshotter = KINDS[kind](root / "snapshots")
        self.cache = NodeCache(root / "cache", 10**9)
        self.caches = Caches.of_node(root / "containers")
        self.whereabouts = MemoryWhereabouts(SolverMemory(FakeClock()))
        self.free = 10**12
        self.collector = NodeCollector(
            node="n1",
            root=root,
            snapshotter=self.snapshotter,
            cache=self.cache,
            caches=self.caches,
            refs=stores.refs,
            whereabouts=self.whereabouts,
            now_wall_s=time.time,
            free_bytes=lambda: self.free,
        )

    async def extract(self, *layers, lease=L):
        """Record, hold and unpack a chain, as an extract does; return its chain IDs, lowest first."""
        records: list[RefRecord] = []
        for each in layers:
            records.append(RefRecord.over(each.descriptor, records[-1] if records else None))
        await self.stores.leases.create(lease, ttl_s=600.0)
        await self.stores.refs.get_or_create(records, {}, lease_id=lease)
        for record, each in zip(records, layers, strict=True):
            if not self.snapshotter.use(record.chain):
                self.snapshotter.apply(
                    chain=record.chain,
                    parent=record.parent_chain,
                    layer=each.descriptor,
                    stream=Bytes(each.blob),
                    await_parent=lambda: None,
                )
        chains = [record.chain for record in records]
        await self.whereabouts.note_here("n1", chains)
        return chains

    async def leave(self, lease=L):
        await self.stores.leases.delete(lease)

    def put_blob(self, data: bytes):
        digest = digest_of(data)
        with self.cache.staging(digest, len(data)) as staged:
            staged.pwrite(0, memoryview(data))
            staged.advance(len(data))
            staged.publish()
        return digest

    async def here(self, chains):
        located = await self.whereabouts.find(chains, ["n1"])
        return [chain for chain in chains if located.here[chain]]


@pytest.fixture(params=[pytest.param("overlay", marks=[pytest.mark.root, is_root]), "copying"])
async def bench(request, stores, tmp_path):
    made = Bench(stores, tmp_path / "node", request.param)
    yield made
    for name in list(made.snapshotter.mounts()):
        made.snapshotter.unmount(name)


@pytest.fixture
async def copying(stores, tmp_path):
    return Bench(stores, tmp_path / "node", "copying")


def ids(pruned):
    return [item.id for item in pruned.items]


async def by_id(bench):
    return {item.id: item for item in (await bench.collector.usage()).items}


async def test_what_a_lease_holds_stays_and_goes_with_it(bench):
    """Children before parents, and the farm's hints with them."""
    one, two = await bench.extract(BASE, APP)

    assert (await bench.collector.prune(ALL)).items == ()
    assert (await by_id(bench))[f"snapshot {two}"].held_by == f"lease {L}"
    await bench.leave()
    dry = await bench.collector.prune(ALL, is_dry_run=True)
    assert set(bench.snapshotter.snapshots()) == {one, two}
    pruned = await bench.collector.prune(ALL)

    assert set(ids(pruned)) == set(ids(dry)) == {f"snapshot {one}", f"snapshot {two}"}
    if bench.snapshotter.has_parts:
        assert ids(pruned) == [f"snapshot {two}", f"snapshot {one}"]
    assert (pruned.freed_bytes, pruned.kept) == (dry.freed_bytes, 0)
    assert list(bench.snapshotter.snapshots()) == []
    assert await bench.here([one, two]) == []


async def test_what_a_held_one_stands_on_stays(bench):
    """One lease ends, the other's chain stays whole."""
    await bench.extract(BASE, APP)
    one, tool = await bench.extract(BASE, TOOL, lease=LeaseId("driver-2"))
    await bench.leave()

    assert len((await bench.collector.prune(ALL)).items) == 1

    path = bench.snapshotter.mount(tool, "look")
    assert {each.name for each in path.iterdir()} == {"base", "tool"}
    assert await bench.here([one, tool]) == [one, tool]


async def test_a_mount_lasts_as_long_as_a_lease_and_goes_with_its_snapshot(bench):
    """What an extract has mounted is unmounted when its room is wanted, and nobody holds it."""
    one, two = await bench.extract(BASE, APP)
    path = bench.snapshotter.mount(two, mount_name(two))
    await bench.collector.prune(ALL)
    assert (path / "app").stat().st_size == BIG
    await bench.leave()

    assert len((await bench.collector.prune(ALL)).items) == 2

    assert bench.snapshotter.mounts() == {}
    assert not bench.snapshotter.has(one)


async def test_a_mount_of_an_op_is_its_ops(bench):
    """Whatever the leases say: a command works on it."""
    (one,) = await bench.extract(BASE)
    bench.snapshotter.mount(one, "op-1-2-abc")
    await bench.leave()

    assert (await by_id(bench))[f"snapshot {one}"].held_by == "mount op-1-2-abc"
    assert (await bench.collector.prune(ALL)).items == ()


async def test_what_is_taken_up_between_the_look_and_the_removal_stays(bench, monkeypatch):
    """By a caller that attached it to a lease, found it here and counts on it; mounted already, or not."""
    one, two = await bench.extract(BASE, APP)
    path = bench.snapshotter.mount(two, mount_name(two))
    await bench.leave()
    asking = bench.stores.refs.uses_of_chains

    async def taken_up_after(chains):
        answer = await asking(chains)
        await bench.extract(BASE, APP, lease=LeaseId("late"))
        assert bench.snapshotter.mount(two, mount_name(two)) == path
        return answer

    monkeypatch.setattr(bench.stores.refs, "uses_of_chains", taken_up_after)

    pruned = await bench.collector.prune(ALL)

    assert (pruned.items, pruned.kept) == ((), 2)
    assert (path / "app").stat().st_size == BIG
    assert await bench.here([one, two]) == [one, two]


async def test_sizes_are_those_on_the_disk(bench):
    """Measured once; of a whole tree, the tree."""
    one, two = await bench.extract(BASE, APP)
    snapshots = bench.snapshotter._store

    sizes = {name: item.size_bytes for name, item in (await by_id(bench)).items()}

    own = disk_bytes(snapshots.files(two))
    assert own <= sizes[f"snapshot {two}"] <= own + 64 * 1024
    assert BIG <= sizes[f"snapshot {one}"] < 2 * BIG
    assert (sizes[f"snapshot {two}"] >= 2 * BIG) == (not bench.snapshotter.has_parts)
    again = {name: item.size_bytes for name, item in (await by_id(bench)).items()}
    assert again == sizes


async def test_what_is_described_can_be_chosen(copying):
    """By what its record says of it, as in the bucket; what is unknown to the farm has no description."""
    app = RefRecord.over(APP.descriptor, None)
    await copying.extract(APP, TOOL)
    stray = chain_id(None, BASE.diff_id)
    copying.snapshotter.apply(
        chain=stray, parent=None, layer=BASE.descriptor, stream=Bytes(BASE.blob), await_parent=lambda: None
    )
    await copying.leave()
    policy = KeepPolicy(includes_shared=True, filters=(parse_filter(f"id==snapshot {app.chain}"),))

    assert ids(await copying.collector.prune(policy)) == [f"snapshot {app.chain}"]
    assert (await by_id(copying))[f"snapshot {stray}"].description == ""


async def test_blobs_go_by_last_use(copying):
    """Those that are read stay; the limit of free bytes counts what is free on the disk."""
    old, new, read = (copying.put_blob(os.urandom(BIG)) for _ in range(3))
    now_ns = time.time_ns()
    for age_s, digest in ((300, old), (200, read), (100, new)):
        path = copying.cache.root / "blobs" / digest[7:]
        os.utime(path, ns=(now_ns - age_s * 10**9, path.stat().st_mtime_ns))
    with copying.cache.open(read):
        copying.free = 1_000_000
        pruned = await copying.collector.prune(KeepPolicy(min_free_bytes=1_000_000 + BIG))
        assert ids(pruned) == [f"blob {old}"]
        assert set(ids(await copying.collector.prune(ALL))) == {f"blob {new}"}
    assert ids(await copying.collector.prune(ALL)) == [f"blob {read}"]


async def test_cache_mounts_are_listed_and_pruned(copying):
    """With their IDs; one that a command has stays."""
    mine = CacheMount(target="/c", id="mine", uid=os.getuid(), gid=os.getgid())
    other = CacheMount(target="/c", id="other", uid=os.getuid(), gid=os.getgid(), sharing=Sharing.PRIVATE)
    async with copying.caches.use(mine) as path:
        (path / "x").write_bytes(os.urandom(BIG))
        async with copying.caches.use(other) as private:
            (private / "y").write_bytes(os.urandom(BIG))
        items = {item.description: item for item in (await copying.collector.usage()).items}
        assert (items["mine"].held_by, items["other"].held_by) == ("a command", "")
        assert all(item.kind.value == "exec.cachemount" for item in items.values())
        only = KeepPolicy(filters=(parse_filter("type==exec.cachemount"),))
        pruned = await copying.collector.prune(only)
        assert [item.description for item in pruned.items] == ["other"]
        assert pruned.freed_bytes >= BIG
        assert (path / "x").exists()
    assert [item.description for item in (await copying.collector.prune(ALL)).items] == ["mine"]
    async with copying.caches.use(mine) as path:
        assert list(path.iterdir()) == []


async def test_a_cache_is_measured_when_it_was_used(copying):
    """Not again and again: some have a million files."""
    mine = CacheMount(target="/c", id="mine", uid=os.getuid(), gid=os.getgid())
    async with copying.caches.use(mine) as path:
        (path / "x").write_bytes(os.urandom(BIG))
    (before,) = copying.caches.states()
    (path / "behind-our-back").write_bytes(os.urandom(BIG))
    assert copying.caches.states() == [before]
    async with copying.caches.use(mine):
        pass
    (after,) = copying.caches.states()
    assert after.size_bytes >= before.size_bytes + BIG
    assert after.last_used_ns > before.last_used_ns


async def test_what_a_killed_process_left_of_caches_goes(copying):
    """Half made or half removed; not while somebody has the cache."""
    mine = CacheMount(target="/c", id="mine", uid=os.getuid(), gid=os.getgid())
    async with copying.caches.use(mine) as path:
        half = path.with_name("0.99.1.new")
        half.mkdir()
        path.with_name("0.abc.gone").mkdir()
        assert copying.caches.recover() == []
    assert len(copying.caches.recover()) == 2
    assert not half.exists()
    assert path.is_dir()


async def test_room_is_made_for_who_waits_for_it(copying):
    """As much as is asked for, of what was used longest ago; called from a thread, as whoever writes does."""
    blobs = [copying.put_blob(os.urandom(BIG)) for _ in range(4)]
    await copying.extract(APP)

    freed = await asyncio.to_thread(copying.collector.make_room, BIG + 1)

    assert freed == 2 * BIG
    assert len(copying.cache.states()) == 2
    assert await asyncio.to_thread(copying.collector.make_room, 10**12) == 2 * BIG
    assert copying.cache.states() == []
    assert len(list(copying.snapshotter.snapshots())) == 1
    assert blobs


async def test_without_redis_no_snapshot_goes(copying, monkeypatch):
    """Any of them may be held; room is made of what is a copy only."""

    async def away(_chains):
        raise UnavailableError("redis", "of the test")

    await copying.extract(APP)
    await copying.leave()
    copying.put_blob(os.urandom(BIG))
    monkeypatch.setattr(copying.stores.refs, "uses_of_chains", away)

    with pytest.raises(UnavailableError):
        await copying.collector.prune(ALL)
    assert await asyncio.to_thread(copying.collector.make_room, 10**12) == BIG
    assert len(list(copying.snapshotter.snapshots())) == 1


async def test_what_resists_does_not_keep_the_others(copying, monkeypatch):
    """It is told of only where nothing else went."""
    await copying.extract(APP)
    blob = copying.put_blob(os.urandom(BIG))
    await copying.leave()

    def refuse(chain, **_):
        raise SnapshotError(chain, "removing", "No space left on device")

    monkeypatch.setattr(copying.snapshotter, "remove", refuse)

    pruned = await copying.collector.prune(ALL)

    assert (ids(pruned), pruned.kept) == ([f"blob {blob}"], 1)
    with pytest.raises(SnapshotError):
        await copying.collector.prune(ALL)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "lazyfarm-test", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.root
@is_root
@pytest.mark.parametrize("kind", ["overlay", "copying"])
async def test_a_full_disk_is_cleared(stores, small_disk, kind):
    """To the last byte full, before anything was measured: not one byte is needed to make room."""
    bench = Bench(stores, small_disk / "node", kind)
    one, _ = await bench.extract(BASE, APP)
    bench.snapshotter.mount(one, mount_name(one))
    mine = CacheMount(target="/c", id="mine")
    async with bench.caches.use(mine) as path:
        (path / "x").write_bytes(os.urandom(BIG))
    await bench.leave()
    with suppress(OSError), (small_disk / "squatter").open("wb", buffering=0) as squatter:
        while squatter.write(bytes(4096)):
            pass
    assert os.statvfs(small_disk).f_bfree == 0

    freed = await asyncio.to_thread(bench.collector.make_room, 10**9)

    assert freed >= 3 * BIG
    assert os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize >= 3 * BIG
    assert list(bench.snapshotter.snapshots()) == []


async def test_policies_apply_one_after_the_other(copying):
    """What the first one took isn't counted by the second."""
    first, second = copying.put_blob(os.urandom(BIG)), copying.put_blob(os.urandom(BIG))
    path = copying.cache.root / "blobs" / first[7:]
    os.utime(path, ns=(time.time_ns() - 3600 * 10**9, path.stat().st_mtime_ns))

    took = await copying.collector.collect(
        [KeepPolicy(keep_duration_s=1800.0), KeepPolicy(max_used_bytes=BIG), KeepPolicy(max_used_bytes=BIG - 1)]
    )

    assert [ids(each) for each in took] == [[f"blob {first}"], [], [f"blob {second}"]]
