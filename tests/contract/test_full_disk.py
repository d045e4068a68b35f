"""A node's disk that is full, or nearly: pulls that don't fit wait or fail clearly, and leave nothing half done."""

import asyncio
import errno
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cluster.descriptor import Compression
from cluster.errors import NodeDiskError
from cluster.fetch.extract import Extracted, Extractor
from cluster.fetch.runner import Unlazier
from cluster.lease import LeaseId
from cluster.ref import BlobRecord, RefRecord
from storage import disk_ledger
from storage.disk_ledger import DiskLedger
from storage.local_blobs import NodeBlobs
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryProgressStore, MemoryRefStore
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.doubles.disks import MIB, fill, free_bytes, small_disk, small_ext4
from tests.doubles.fetch import FakeTransfers, ManualRenewer, OpenDoors, caller_of
from tests.doubles.layers import Bytes, apply_all, file, layer
from tests.doubles.stores import FakeClock, eventually

HEADROOM = 8 * MIB
#: What the file system takes for itself beside the files: directories, extents, a journal.
METADATA = MIB // 2
SNAPSHOTTERS = {"overlay": OverlaySnapshotter, "copying": CopyingSnapshotter}


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(disk_ledger, "_LOOK_EVERY_S", 0.02)


@pytest.fixture(params=SNAPSHOTTERS)
def kind(request):
    return request.param


def noise(seed, mib):
    return random.Random(seed).randbytes(mib * MIB)  # noqa: S311 - keeps no secret


def image(seed, *, mib=3):
    """An image of three layers: compression does nothing for one, as usual for another, all of the third is zeros."""
    data = noise(seed, mib)
    return [
        layer(file("noise", data), *(file(f"small-{n}", b"x" * n) for n in range(300))),
        layer(file("half", data[: mib * MIB // 2] + bytes(mib * MIB // 2)), compression=Compression.ZSTD),
        layer(file("zeros", bytes(4 * mib * MIB)), file("seed", b"%d" % seed)),
    ]


class Node:
    """One node's fetch worker, as far as its disk goes: all blobs are in the content store already."""

    def __init__(self, root, kind, ledger, *, wait_s):
        root.mkdir(exist_ok=True)
        self.memory = Memory(FakeClock())
        self.refs, self.leases = MemoryRefStore(self.memory), MemoryLeaseStore(self.memory)
        self.store = MemoryContentStore()
        self.threads = ThreadPoolExecutor(16)
        self.cache = NodeCache(root / "cache", 10**9, headroom_bytes=HEADROOM)
        self.snapshotter = SNAPSHOTTERS[kind](root / "snapshots")
        self.disk = DiskLedger(
            root, make_room=self.cache.make_room, wait_s=wait_s, headroom_bytes=HEADROOM, directory=ledger
        )
        flights, progress = MemoryFlightStore(self.memory), MemoryProgressStore(self.memory)
        self.unlazier = Unlazier(
            worker="n",
            refs=self.refs,
            flights=flights,
            renewer=ManualRenewer(flights),
            progress=progress,
            transfers=FakeTransfers(),
            access=OpenDoors(),
            new_token=lambda: f"t{time.monotonic_ns()}",
            ttl_s=6.0,
            poll_s=0.5,
            deadline_s=60.0,
            max_transfers=4,
            clock=time.monotonic,
            disk=self.disk,
        )
        self.blobs = NodeBlobs(
            self.cache,
            self.store,
            self.refs,
            loop=asyncio.get_running_loop(),
            threads=self.threads,
            downloads=4,
            disk=self.disk,
        )
        self.extractor = Extractor(
            node="n",
            unlazier=self.unlazier,
            refs=self.refs,
            progress=progress,
            blobs=self.blobs,
            snapshotter=self.snapshotter,
            threads=self.threads,
            max_ahead=256,
            deadline_s=60.0,
            clock=time.monotonic,
            disk=self.disk,
        )

    async def extract(self, layers, lease="l", **options):
        """Extract an image, whose blobs come from the content store."""
        records = []
        for each in layers:
            info = self.store.put(f"k-{each.descriptor.digest}", each.blob)
            self.memory.blobs[each.descriptor.digest] = BlobRecord(
                digest=each.descriptor.digest, key=info.key, size_bytes=len(each.blob), etag=info.etag, fence=1
            )
            records.append(RefRecord.over(each.descriptor, records[-1] if records else None, "r.example/app:1"))
        await self.leases.create(LeaseId(lease), ttl_s=None)
        chain = await self.refs.get_or_create(records, {}, lease_id=LeaseId(lease))
        caller = caller_of(lease, progress=(f"stream-{lease}",))
        return await self.extractor.extract(chain, caller, mount=False, **options)

    def items(self, lease="l"):
        items = self.memory.streams.get(f"stream-{lease}", [])
        return [item for item in items if item.item.startswith("extract:")]

    def staged(self):
        """What is left half done."""
        return [
            *(self.cache.root / "staging").iterdir(),
            *(self.snapshotter._store.root / "staging").iterdir(),
        ]

    def remove_snapshots(self):
        for chain in self.snapshotter.snapshots():
            self.snapshotter.remove(chain)

    async def aclose(self):
        await self.unlazier.aclose()
        self.threads.shutdown()
        self.disk.close()


@pytest.fixture
async def nodes_on(tmp_path):
    """Make nodes on a disk."""
    made = []

    def make(disk, kind, count=1, *, wait_s=30.0):
        made.extend(Node(disk / f"n{n}", kind, tmp_path / "ledger" / "d", wait_s=wait_s) for n in range(count))
        return made[-count:]

    yield make
    for node in made:
        await node.aclose()


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 64 * MIB) as path:
        yield path


@contextmanager
def least_free(disk):
    """Watch how much is free at the least while the body runs; gives a function that tells."""
    least = free_bytes(disk)
    is_over = threading.Event()

    def watch():
        nonlocal least
        while not is_over.wait(0.0005):
            least = min(least, free_bytes(disk))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: least
    finally:
        is_over.set()
        watcher.join()


@pytest.mark.parametrize(("kind", "make_disk"), [("overlay", small_ext4), ("copying", small_disk)])
async def test_pulls_that_together_are_too_much_end_and_leave_the_headroom(nodes_on, tmp_path, kind, make_disk):
    """Nine images at once on three nodes of one disk that holds a few of them, none of which can go.

    Each is there in the end, or failed as the disk has no room for it: at no instant was less than the headroom free.
    """
    with make_disk(tmp_path / "disk", 100 * MIB) as disk:
        nodes = nodes_on(disk, kind, 3, wait_s=0.5)
        with least_free(disk) as least:
            ends = await asyncio.gather(
                *(nodes[n % 3].extract(image(n, mib=2), f"l{n}") for n in range(9)), return_exceptions=True
            )
            assert least() >= HEADROOM - METADATA
        assert {type(end) for end in ends} == {Extracted, NodeDiskError}, ends
        assert [node.staged() for node in nodes] == [[], [], []]
        assert "0 bytes of 0 parts, 0 wait" in "".join(map(repr, (node.disk for node in nodes)))
        for node in nodes:
            node.remove_snapshots()
        assert isinstance(await nodes[0].extract(image(100), "again"), Extracted)


async def test_a_pull_waits_for_room_and_says_so(nodes_on, disk, kind):
    """Its layers wait, saying what for; when there is room they are fetched and unpacked."""
    (node,) = nodes_on(disk, kind)
    squatter = fill(disk, leaving_bytes=HEADROOM)
    pull = asyncio.create_task(node.extract(image(1)))
    await eventually(lambda: len(node.items()) == 3)
    assert {item.phase.value for item in node.items()} == {"waiting"}
    assert "no room for extracting r.example/app:1" in node.items()[0].detail
    squatter.unlink()
    assert (await asyncio.wait_for(pull, 30)).disk_waited_s > 0
    assert sorted(item.phase.value for item in node.items() if item.phase.is_end) == ["done", "done", "done"]


async def test_a_pull_that_finds_no_room_fails_clearly(nodes_on, disk, kind):
    """Nothing was fetched for it; each layer's item ends with the reason; the next try works."""
    (node,) = nodes_on(disk, kind, wait_s=0.1)
    squatter = fill(disk, leaving_bytes=HEADROOM + MIB)
    with pytest.raises(NodeDiskError, match=r"no room for extracting r\.example/app:1: .* kept in reserve; waited"):
        await node.extract(image(1))
    assert [item.phase.value for item in node.items() if item.phase.is_end] == ["failed"] * 3
    assert node.cache.statistics().blobs == 0
    squatter.unlink()
    assert (await node.extract(image(1), "again")).disk_waited_s == 0


async def test_a_pull_that_has_waited_elsewhere_takes_what_room_there_is(nodes_on, disk, kind):
    """It waits no more, whatever is configured: here there is none, and then there is."""
    (node,) = nodes_on(disk, kind, wait_s=3600.0)
    squatter = fill(disk, leaving_bytes=HEADROOM + MIB)
    with pytest.raises(NodeDiskError, match="waited 0 s"):
        await node.extract(image(1), disk_wait_s=0.0)
    squatter.unlink()
    assert isinstance(await node.extract(image(1), "again", disk_wait_s=0.0), Extracted)


async def test_a_cancelled_wait_ends_its_items(nodes_on, disk, kind):
    """Who goes away while it waits for room leaves no item that goes on, and no place in line."""
    (node,) = nodes_on(disk, kind)
    fill(disk, leaving_bytes=HEADROOM)
    pull = asyncio.create_task(node.extract(image(1)))
    await eventually(lambda: len(node.items()) == 3)
    pull.cancel()
    await asyncio.wait([pull])
    assert [item.phase.value for item in node.items() if item.phase.is_end] == ["cancelled"] * 3
    assert "0 bytes of 0 parts, 0 wait" in repr(node.disk)


async def test_a_layer_bigger_than_the_disk_fails_at_once(nodes_on, disk, kind):
    """No wait would do. What its blob alone comes to is enough to say so."""
    (node,) = nodes_on(disk, kind, wait_s=3600.0)
    huge = layer(file("noise", noise(1, 60)), compression=Compression.NONE)
    with pytest.raises(NodeDiskError, match="can never fit"):
        await asyncio.wait_for(node.extract([huge]), 20)


async def test_the_blob_cache_makes_room(nodes_on, disk, kind):
    """Cached blobs that nobody reads go before anybody waits."""
    (node,) = nodes_on(disk, kind, wait_s=0.0)
    await node.extract(image(1, mib=2))
    node.remove_snapshots()
    assert node.cache.statistics().blobs == 3
    fill(disk, leaving_bytes=HEADROOM)
    freed = node.cache.make_room(1)
    assert (node.cache.statistics().blobs, freed > 0) == (2, True)
    assert node.cache.make_room(10**9) > 0
    assert node.cache.statistics().blobs == 0


async def test_a_disk_that_somebody_else_fills_meanwhile(nodes_on, disk, kind, monkeypatch):
    """What was reserved is taken by a stranger: a typed error, nothing staged or published, and the next try works."""
    (node,) = nodes_on(disk, kind)
    apply = node.snapshotter.apply
    squatters = []

    def apply_on_a_full_disk(**more):
        if not squatters:
            squatters.append(fill(disk, leaving_bytes=0))
        return apply(**more)

    monkeypatch.setattr(node.snapshotter, "apply", apply_on_a_full_disk)
    with pytest.raises(NodeDiskError, match="No space left on device"):
        await asyncio.wait_for(node.extract([image(1)[0]]), 30)
    assert node.staged() == []
    assert list(node.snapshotter.snapshots()) == []
    squatters[0].unlink()
    await node.extract(image(1), "again")


def test_unpacking_onto_a_full_disk(disk, kind):
    """The staging directory is gone afterwards, nothing is published, and the error is the disk's."""
    snapshotter = SNAPSHOTTERS[kind](disk / "snapshots")
    squatter = fill(disk, leaving_bytes=MIB)
    with pytest.raises(NodeDiskError) as caught:
        apply_all(snapshotter, *image(1))
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(snapshotter._store.staging.iterdir()) == []
    assert list(snapshotter.snapshots()) == []
    squatter.unlink()
    apply_all(snapshotter, *image(1))


def test_a_workspace_on_a_full_disk(disk):
    """An op's tree that can't be copied leaves nothing, and another node is asked."""
    snapshotter = CopyingSnapshotter(disk / "snapshots")
    chain = apply_all(snapshotter, *image(1))
    squatter = fill(disk, leaving_bytes=MIB)
    with pytest.raises(NodeDiskError, match="preparing snapshot op"):
        snapshotter.workspace(chain, "op")
    assert list(snapshotter._store.staging.iterdir()) == []
    squatter.unlink()
    snapshotter.workspace(chain, "op").discard()


@pytest.mark.parametrize("where", ["own", "below"])
def test_what_a_layer_takes_is_announced_before_it_is_taken(disk, kind, where):
    """No more is ever on the disk than was announced, with small files, copies of what is below, and links to it."""
    snapshotter = SNAPSHOTTERS[kind](disk / "snapshots")
    small = [file(f"small-{n}", b"x" * (n + 1)) for n in range(500)]
    parent = apply_all(snapshotter, layer(*small, file("big", bytes(MIB)))) if where == "below" else None
    top = layer(*small, file("more", noise(1, 2)))
    before = free_bytes(disk)
    announced = 0

    def spend(count_bytes):
        nonlocal announced
        assert before - free_bytes(disk) <= announced + 64 * 1024, "bytes are on the disk that nobody announced"
        announced += count_bytes

    snapshotter.apply(
        chain=top.diff_id,
        parent=parent,
        layer=top.descriptor,
        stream=Bytes(top.blob),
        await_parent=lambda: None,
        spend=spend,
    )
    assert before - free_bytes(disk) <= announced
