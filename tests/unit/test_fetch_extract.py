"""Extract: one snapshot a chain ID a node, whoever asks, leaves or fails; parents first."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.digest import EMPTY_CHAIN, hex_of
from cluster.errors import (
    BlobNotFoundError,
    DeadlineExceededError,
    DigestMismatchError,
    LayerError,
    NeedsRemoteProvidersError,
    SnapshotGoneError,
    UnavailableError,
)
from cluster.fetch import extract as extract_module
from cluster.fetch.extract import Extractor
from cluster.fetch.runner import Unlazier
from cluster.lease import LeaseId
from cluster.progress import LayerPhase
from cluster.ref import BlobRecord, RefRecord
from storage.local_blobs import NodeBlobs
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryProgressStore, MemoryRefStore
from storage.memory_blobs import MemoryContentStore
from storage.memory_solver import MemoryWhereabouts, SolverMemory
from storage.node_cache import NodeCache
from tests.doubles.fetch import (
    FakeLocalBlob,
    FakeLocalBlobs,
    FakeSnapshotter,
    FakeTransfers,
    ManualRenewer,
    OpenDoors,
    caller_of,
    layer_of,
)
from tests.doubles.stores import FakeClock, eventually

DATA = [b"base layer", b"middle layer", b"top layer"]
LAYERS = [layer_of(data) for data in DATA]
WRONG = DigestMismatchError(LAYERS[0].digest, "sha256:" + "0" * 64, "liar.example/app")


class Node:
    """One node: an extractor over fakes, and the chain A, B, C."""

    def __init__(self, *, threads=8, max_ahead=4, deadline_s=30.0):
        self.memory = Memory(FakeClock())
        self.refs = MemoryRefStore(self.memory)
        self.leases = MemoryLeaseStore(self.memory)
        self.transfers = FakeTransfers()
        self.transfers.holds = False
        self.blobs = FakeLocalBlobs()
        self.snapshotter = FakeSnapshotter()
        self.whereabouts = MemoryWhereabouts(SolverMemory(FakeClock()))
        self.threads = ThreadPoolExecutor(threads)
        flights, progress = MemoryFlightStore(self.memory), MemoryProgressStore(self.memory)
        self.unlazier = Unlazier(
            worker="n1",
            refs=self.refs,
            flights=flights,
            renewer=ManualRenewer(flights),
            progress=progress,
            transfers=self.transfers,
            access=OpenDoors(),
            new_token=lambda: f"t{time.monotonic_ns()}",
            ttl_s=6.0,
            poll_s=0.5,
            deadline_s=30.0,
            max_transfers=8,
            clock=time.monotonic,
        )
        self.extractor = Extractor(
            node="n1",
            unlazier=self.unlazier,
            refs=self.refs,
            progress=progress,
            blobs=self.blobs,
            snapshotter=self.snapshotter,
            threads=self.threads,
            max_ahead=max_ahead,
            deadline_s=deadline_s,
            clock=time.monotonic,
            notes=self.whereabouts,
        )
        for layer, data in zip(LAYERS, DATA, strict=True):
            self.blobs.put(layer.digest, FakeLocalBlob(data))

    async def chain(self, layers=LAYERS):
        records, top = [], None
        for layer in layers:
            top = RefRecord.over(layer, top)
            records.append(top)
        await self.leases.create(LeaseId("setup"), ttl_s=None)
        return await self.refs.get_or_create(records, {}, lease_id=LeaseId("setup"))

    async def call(self, lease="l1", layers=LAYERS):
        await self.leases.create(LeaseId(lease), ttl_s=None)
        caller = caller_of(lease, progress=(f"stream-{lease}",))
        return asyncio.create_task(self.extractor.extract(await self.chain(layers), caller))

    async def located(self, chains):
        """Return the chains whose snapshots are noted as here, and as arriving."""
        located = await self.whereabouts.find(chains, ["n1"])
        return [c for c in chains if located.here[c]], [c for c in chains if located.arriving[c]]

    def ends(self, lease):
        """Return the ends of the caller's extract items, one each."""
        items = [i for i in self.memory.streams.get(f"stream-{lease}", []) if i.item.startswith("extract:")]
        ends = {i.item: i.phase for i in items if i.phase.is_end}
        assert len(ends) == len([i for i in items if i.phase.is_end]), "an item ended twice"
        return sorted(phase.value for phase in ends.values())


@pytest.fixture
async def node():
    node = Node()
    yield node
    for gate in node.snapshotter.gates.values():
        gate.set()
    await node.unlazier.aclose()
    node.threads.shutdown()


async def chains(node, layers=LAYERS):
    return [state.record.chain for state in await node.chain(layers)]


async def test_a_chain_is_unpacked_parents_first_and_mounted(node):
    """Every layer is fetched once, published above its parent, and the top is mounted."""
    extracted = await (await node.call())
    names = await chains(node)
    assert node.snapshotter.published == names
    assert node.snapshotter.mounted[0][0] == names[-1]
    assert extracted.path.name == node.snapshotter.mounted[0][1]
    assert [layer.digest for layer in extracted.layers] == [layer.digest for layer in LAYERS]
    assert len(node.transfers.fetches) == 3
    assert node.ends("l1") == ["done"] * 3


async def test_a_snapshot_that_goes_before_it_is_mounted_is_unpacked_again(node, monkeypatch):
    """It was seen here, and removed since; that it always goes again is told in the end."""
    names = await chains(node)
    mounting = node.snapshotter.mount
    goes = [True]

    def late(chain, name):
        if goes and goes.pop():
            node.snapshotter.published.remove(names[-1])
        if chain not in node.snapshotter.published:
            raise SnapshotGoneError(chain, "mounting")
        return mounting(chain, name)

    monkeypatch.setattr(node.snapshotter, "mount", late)
    extracted = await (await node.call())
    assert node.snapshotter.mounted == [(names[-1], extracted.path.name)]
    assert sorted(node.snapshotter.begun) == sorted([*names, names[-1]])
    goes.extend([True] * 100)
    with pytest.raises(SnapshotGoneError):
        await (await node.call("l2"))


async def test_what_arrives_and_is_there_is_noted(node):
    """From its beginning an extraction's missing layers are noted as arriving, in its end all as here."""
    names = await chains(node)
    await (await node.call(layers=LAYERS[:1]))
    assert await node.located(names) == (names[:1], [])
    node.snapshotter.gates[names[-1]] = threading.Event()
    call = await node.call("l2")
    await eventually(lambda: names[-1] in node.snapshotter.begun)
    assert await node.located(names) == (names[:1], names[1:])
    node.snapshotter.gates[names[-1]].set()
    await call
    assert await node.located(names) == (names, [])


async def test_what_fails_is_not_noted_as_there(node):
    """A snapshot that was not published may be noted as arriving for a while, but not as here."""
    node.blobs.put(LAYERS[1].digest, FakeLocalBlob(b"bad layer"))
    with pytest.raises(LayerError):
        await (await node.call())
    assert (await node.located(await chains(node)))[0] == []


async def test_what_cannot_be_noted_fails_nothing(node):
    """Notes are hints: an extraction does without them."""

    async def refuse(_node, _chains):
        raise UnavailableError("redis", "gone")

    node.whereabouts.note_arriving = node.whereabouts.note_here = refuse
    await (await node.call())
    assert node.snapshotter.published == await chains(node)


async def test_a_layer_shows_where_its_own_handlers_say(node):
    """Its bytes and its unpacking, while the others show in the call's stream."""
    await node.leases.create(LeaseId("l1"), ttl_s=None)
    caller = caller_of("l1", progress=("call",), own_progress={LAYERS[0].digest: ("own",)})
    names = await chains(node)
    await node.extractor.extract(await node.chain(), caller)
    own = {item.item for item in node.memory.streams["own"]}
    assert own == {f"fetch:{LAYERS[0].digest}", f"extract:n1:{names[0]}"}
    assert not own & {item.item for item in node.memory.streams["call"]}


async def test_no_layers_are_an_empty_filesystem(node):
    """A chain of nothing mounts the empty snapshot."""
    await (await node.call(layers=[]))
    assert node.snapshotter.mounted[0][0] == EMPTY_CHAIN


async def test_a_snapshot_that_is_there_needs_no_blob(node):
    """A snapshot that is present is a fact of its own: nothing is fetched or unpacked."""
    node.snapshotter.published = await chains(node)
    extracted = await (await node.call())
    assert [layer.source for layer in extracted.layers] == ["snapshot"] * 3
    assert node.transfers.fetches == []
    assert node.snapshotter.begun == []
    assert node.ends("l1") == ["present"] * 3


async def test_a_snapshot_is_had_by_who_may_have_its_blob(node):
    """What another had unpacked here is not mounted for a caller who may not read the layer."""

    class Refuse:
        async def admit(self, authorizer, blob, providers, came_from):
            assert came_from == ""
            raise NeedsRemoteProvidersError((blob.digest,))

    node.snapshotter.published = await chains(node)
    node.unlazier._access = Refuse()
    with pytest.raises(NeedsRemoteProvidersError):
        await (await node.call())
    assert node.snapshotter.mounted == []


async def test_a_snapshot_that_is_missing_is_made_though_its_blob_is_present(node):
    """A blob that is present is another fact: it is unpacked, and not fetched again."""
    await (await node.call())
    node.snapshotter.published.clear()
    extracted = await (await node.call("l2"))
    assert [layer.source for layer in extracted.layers] == ["present"] * 3
    assert len(node.transfers.fetches) == 3
    assert node.snapshotter.published == await chains(node)


async def test_callers_share_each_layers_unpacking(node):
    """Two callers at once: each layer is unpacked once, both get the mount."""
    first, second = await node.call("l1"), await node.call("l2")
    await asyncio.gather(first, second)
    assert sorted(node.snapshotter.begun) == sorted(await chains(node))
    assert node.ends("l1") == ["done"] * 3
    assert node.ends("l2") == ["joined"] * 3


@pytest.mark.parametrize("leaver", [0, 1])
async def test_a_caller_that_leaves_fails_nobody(node, leaver):
    """One of two is cancelled while the base is being unpacked: the other gets its mount."""
    base = (await chains(node))[0]
    gate = node.snapshotter.gates[base] = threading.Event()
    tasks = [await node.call("l1"), await node.call("l2")]
    await eventually(lambda: base in node.snapshotter.begun)
    tasks[leaver].cancel()
    await asyncio.wait({tasks[leaver]}, timeout=5)
    assert tasks[leaver].cancelled()
    gate.set()
    await asyncio.wait_for(tasks[1 - leaver], 5)
    assert node.snapshotter.begun.count(base) == 1
    await eventually(lambda: node.ends(f"l{leaver + 1}") == ["cancelled"] * 3)


async def test_the_last_caller_stops_the_unpacking(node):
    """Nobody wants it: the unpacking is stopped, and the next call starts afresh."""
    base = (await chains(node))[0]
    gate = node.snapshotter.gates[base] = threading.Event()
    task = await node.call()
    await eventually(lambda: base in node.snapshotter.begun)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert node.extractor._flights.statistics().flying == 0
    gate.set()
    await (await node.call("l2"))


async def test_other_compressions_of_a_chain_don_t_wait_for_each_other(node):
    """One chain, two blobs: whoever drives the first leaves, the second comes to its end by its own blob."""
    plain = layer_of(b"plain", diff="same")
    packed = layer_of(b"packed", diff="same")
    node.blobs.put(packed.digest, FakeLocalBlob(b"packed"))
    assert await chains(node, [plain]) == await chains(node, [packed])
    first = await node.call("l1", [plain])  # its bytes never come to this node
    await eventually(lambda: node.transfers.fetches)
    second = await node.call("l2", [packed])
    await asyncio.wait_for(second, 5)
    first.cancel()
    await asyncio.wait({first}, timeout=5)
    assert first.cancelled()


async def test_wrong_bytes_are_unpacked_anew_when_the_right_ones_come(node):
    """The first source lied: what was unpacked of it is dropped, and nobody is told of a bad layer."""
    node.blobs.put(LAYERS[0].digest, FakeLocalBlob(b"bad bytes", WRONG), FakeLocalBlob(DATA[0]))
    await (await node.call())
    assert node.snapshotter.published == await chains(node)
    assert node.blobs.gets.count(LAYERS[0].digest) == 2


async def test_a_layer_that_is_bad_though_its_bytes_are_right_fails_at_once(node):
    """Right digest, malformed tar: trying again would bring the same."""
    node.blobs.put(LAYERS[0].digest, FakeLocalBlob(b"bad tar"))
    with pytest.raises(LayerError):
        await asyncio.wait_for(await node.call(), 5)
    assert node.blobs.gets.count(LAYERS[0].digest) == 1
    assert "failed" in node.ends("l1")
    assert len(node.ends("l1")) == 3


async def test_bytes_that_stay_wrong_are_given_up(node):
    """The error is that of the bytes, not the nonsense that unpacking made of them."""
    node.blobs.put(LAYERS[0].digest, FakeLocalBlob(b"bad bytes", WRONG))
    with pytest.raises(DigestMismatchError):
        await asyncio.wait_for(await node.call(), 5)


async def test_a_file_that_was_damaged_on_this_node_is_fetched_again_from_the_content_store(node, tmp_path):
    """What the node's disk spoilt is no fault of the image: the extract drops the file and goes on."""
    store, cache = MemoryContentStore(), NodeCache(tmp_path, 10**6, headroom_bytes=0)
    loop = asyncio.get_running_loop()
    node.extractor._blobs = NodeBlobs(cache, store, node.refs, loop=loop, threads=node.threads, downloads=2)
    base, data = LAYERS[0], DATA[0]
    store.put("k", data)
    node.memory.blobs[base.digest] = BlobRecord(digest=base.digest, key="k", size_bytes=len(data), etag="e", fence=1)
    (cache.root / "blobs" / hex_of(base.digest)).write_bytes(b"bad" + data[3:])
    await asyncio.wait_for(await node.call(layers=[base]), 5)
    assert node.snapshotter.published == await chains(node, [base])
    await eventually(lambda: cache.verify(base.digest))


async def test_a_layer_that_can_t_be_fetched_ends_the_extract(node):
    """The base fails: the layers above, which are under way, end with it."""
    node.transfers.plan = [BlobNotFoundError(LAYERS[0].digest, "r.example/app") for _ in LAYERS]
    node.transfers.holds = True
    call = await node.call()
    await node.transfers.arrival(3)
    (base,) = (fetch for fetch in node.transfers.fetches if fetch.descriptor.digest == LAYERS[0].digest)
    base.proceed.set()
    with pytest.raises(BlobNotFoundError):
        await asyncio.wait_for(call, 5)
    assert len(node.ends("l1")) == 3
    assert node.extractor._flights.statistics().flying == 0


async def test_a_blob_that_is_lost_meanwhile_is_fetched_again(node, monkeypatch):
    """It turned lazy while its layer waited to be unpacked: the caller drives a second fetch."""
    monkeypatch.setattr(extract_module, "_LOST_LOOK_S", 0.02)
    base = LAYERS[0]
    node.blobs.coming.pop(base.digest)
    task = await node.call(layers=[base])
    await eventually(lambda: base.digest in node.memory.blobs)
    (blob,) = await node.refs.blobs([base.digest])
    await node.refs.mark_absent(blob, "its object is gone")
    await eventually(lambda: len(node.transfers.fetches) == 2)
    node.blobs.put(base.digest, FakeLocalBlob(DATA[0]))
    await asyncio.wait_for(task, 10)


async def test_layers_that_wait_for_their_parents_don_t_use_the_pool_up():
    """Three threads and three layers: the base comes last, and still finds the others waiting, not stuck."""
    node = Node(threads=4)
    names = await chains(node)
    base = node.blobs.coming.pop(LAYERS[0].digest)
    task = await node.call()
    await eventually(lambda: set(names[1:]) <= set(node.snapshotter.begun))
    node.blobs.put(LAYERS[0].digest, *base)
    await asyncio.wait_for(task, 5)
    node.threads.shutdown()


async def test_a_chain_longer_than_the_pool_is_unpacked_from_whichever_end_its_bytes_come():
    """600 layers, 512 threads, the base last: the upper ones that wait for it leave it a thread."""
    layers = [layer_of(b"layer %d" % n) for n in range(600)]
    node = Node(threads=512, max_ahead=256, deadline_s=10.0)
    names = await chains(node, layers)
    for n, layer in enumerate(layers[300:], 300):
        node.blobs.put(layer.digest, FakeLocalBlob(b"layer %d" % n))
    task = await node.call(layers=layers)
    await eventually(lambda: len(node.snapshotter.begun) == 256)
    for n, layer in reversed(list(enumerate(layers[:300]))):
        node.blobs.put(layer.digest, FakeLocalBlob(b"layer %d" % n))
    await task
    assert node.snapshotter.published == names
    node.threads.shutdown()


async def test_every_extract_ends_by_its_deadline():
    """Bytes never come: DeadlineExceededError, and every item has ended."""
    node = Node(deadline_s=0.1)
    node.blobs.coming.clear()
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(await node.call(), 5)
    await eventually(lambda: node.ends("l1") == [LayerPhase.CANCELLED.value] * 3)
    node.threads.shutdown()
