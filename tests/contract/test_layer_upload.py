"""Uploads of new layers, on memory and Swift, and how they become present, on memory and Redis."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import threading
import tracemalloc
from contextlib import ExitStack, contextmanager

import pytest
import zstandard

from cluster.descriptor import Compression
from cluster.digest import chain_id, digest_of
from cluster.errors import DeadlineExceededError, LayerTooLargeError, SnapshotError, UnavailableError
from cluster.flight.values import Owned, UploadState
from cluster.lease import blob_resource
from cluster.provider import FARM
from cluster.ref import BlobRecord
from storage.blobs import S3ContentStore
from storage.layer_upload import KEY_PREFIX, LayerStore, LayerUpload, UploadedLayer, new_key, upload_layer
from storage.memory_blobs import MemoryContentStore
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from storage.transfer import TransferStoppedError
from tests.doubles.layers import Layer, apply, facts, file, layer
from tests.doubles.s3_faults import Answer
from tests.doubles.stores import hold_nothing

MIB = 1024**2
PART_BYTES = 5 * MIB  # the least S3 takes for any part but the last
TTL_S = 6.0
DEADLINE_S = 30.0


@pytest.fixture(params=["memory", pytest.param("swift", marks=pytest.mark.s3)])
def store(request):
    if request.param == "memory":
        yield MemoryContentStore()
        return
    s3 = S3ContentStore(request.getfixturevalue("s3_config"))
    yield s3
    s3.close()


def writer_of(tar: bytes, *, step: int = 100_000):
    """Return a writer of *tar* in pieces of *step* bytes."""

    def write(out) -> str:
        for at in range(0, len(tar), step):
            out.write(memoryview(tar)[at : at + step])
        return digest_of(tar)

    return write


def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes that no compression makes less of."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


def content(store, key: str) -> bytes:
    data, buffer = bytearray(), memoryview(bytearray(MIB))
    with store.open(key) as stream:
        while count := stream.readinto(buffer):
            data += buffer[:count]
    return bytes(data)


def inflated(blob: bytes, compression: Compression) -> bytes:
    match compression:
        case Compression.NONE:
            return blob
        case Compression.GZIP:
            return gzip.decompress(blob)
        case Compression.ZSTD:
            return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob)).read()


def assert_nothing_is_left(store) -> None:
    assert list(store.objects("")) == []
    assert store.list_uploads("") == []


# -- uploads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("size", [0, 1024, PART_BYTES, 2 * PART_BYTES, 11 * MIB + 512])
def test_what_is_written_is_stored(store, compression, size):
    """Compressed as asked, of the digest and size that the descriptor says, and nothing else is left."""
    tar, key = noise(size), new_key()

    uploaded = upload_layer(store, writer_of(tar), compression=compression, part_bytes=PART_BYTES, key=key)

    blob = content(store, key)
    assert inflated(blob, compression) == tar
    descriptor = uploaded.descriptor
    assert (descriptor.digest, descriptor.size_bytes, descriptor.diff_id) == (
        digest_of(blob),
        len(blob),
        digest_of(tar),
    )
    assert descriptor.compression is compression
    assert (uploaded.key, uploaded.etag, uploaded.size_bytes) == (key, store.head(key).etag, len(blob))
    assert [info.key for info in store.objects("")] == [key]
    assert store.list_uploads("") == []


@pytest.mark.parametrize("compression", list(Compression))
def test_one_tar_gives_one_blob(compression):
    """However it is written: in small pieces, large ones, or at another time."""
    store = MemoryContentStore()
    tar = b"".join(b"%d: %s\n" % (n, noise(20, n)) for n in range(60_000))

    made = {
        upload_layer(
            store, writer_of(tar, step=step), compression=compression, part_bytes=part_bytes, key=new_key()
        ).descriptor.digest
        for step, part_bytes in [(512, MIB), (512, PART_BYTES), (99_991, MIB), (len(tar), MIB)]
    }

    assert len(made) == 1


def test_a_gzip_blob_has_no_time_and_no_name():
    """RFC 1952's MTIME is 0 and no flag is set: else no two builds had one blob."""
    store, key = MemoryContentStore(), new_key()

    upload_layer(store, writer_of(b"x"), compression=Compression.GZIP, part_bytes=MIB, key=key)

    assert content(store, key)[:8] == bytes.fromhex("1f8b080000000000")


def test_memory_is_bounded():
    """Three parts and a block to compress, whatever the layer's size."""

    class Null(MemoryContentStore):
        def upload_part(self, key, upload_id, number, data):
            return super().upload_part(key, upload_id, number, data[:1])

        def complete_upload(self, key, upload_id, parts):
            super().complete_upload(key, upload_id, parts)
            return super().head(key)

    piece = noise(MIB)

    def write(out):
        for _ in range(60):
            out.write(piece)
        return digest_of(b"")

    tracemalloc.start()
    try:
        with pytest.raises(UnavailableError, match="it kept"):
            upload_layer(Null(), write, compression=Compression.NONE, part_bytes=PART_BYTES, key=new_key())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 3 * PART_BYTES + 6 * MIB


@pytest.mark.parametrize("after", [0, 1024, 12 * MIB])
def test_a_writer_that_fails_leaves_nothing(store, after):
    """Its error is the upload's; what was uploaded until then is dropped."""

    def write(out):
        out.write(noise(after))
        raise SnapshotError("w", "committing", "of the test")

    with pytest.raises(SnapshotError, match="of the test"):
        upload_layer(store, write, compression=Compression.NONE, part_bytes=PART_BYTES, key=new_key())

    assert_nothing_is_left(store)


@pytest.mark.parametrize("failing", ["begin_upload", "upload_part", "complete_upload", "put"])
def test_a_store_that_fails_ends_writer_and_upload(failing):
    """The writer isn't left waiting for a buffer, and what S3 may have is dropped."""
    ended = threading.Event()

    class Failing(MemoryContentStore):
        pass

    def fail(self, *_):
        raise UnavailableError("the content store", "of the test")

    setattr(Failing, failing, fail)

    def write(out):
        try:
            for _ in range(1 if failing == "put" else 20):
                out.write(noise(MIB // 2))
        finally:
            ended.set()
        return digest_of(b"")

    store = Failing()
    with pytest.raises(UnavailableError, match="of the test"):
        upload_layer(store, write, compression=Compression.NONE, part_bytes=MIB, key=new_key())

    assert ended.is_set()
    assert_nothing_is_left(store)


@pytest.mark.s3
def test_a_part_that_is_refused_once_is_sent_again(s3_proxy, s3_config):
    """From its buffer, which nothing else fills meanwhile: the object is whole."""
    tar, key = noise(12 * MIB), new_key()
    s3_proxy.plan(Answer(503, "SlowDown"), method="PUT", target="partNumber=1", times=2)
    faulty, store = S3ContentStore(s3_proxy.config), S3ContentStore(s3_config)
    try:
        uploaded = upload_layer(faulty, writer_of(tar), compression=Compression.NONE, part_bytes=PART_BYTES, key=key)
        assert digest_of(content(store, key)) == uploaded.descriptor.digest
    finally:
        faulty.close()
        store.close()


@pytest.mark.s3
def test_a_part_that_is_always_refused_ends_the_upload(s3_proxy, s3_config):
    """With a typed error that may be tried again; S3 keeps none of its parts."""
    s3_proxy.plan(Answer(503, "SlowDown"), method="PUT", target="partNumber=2", times=99)
    faulty, store = S3ContentStore(s3_proxy.config), S3ContentStore(s3_config)
    try:
        with pytest.raises(UnavailableError):
            upload_layer(
                faulty, writer_of(noise(20 * MIB)), compression=Compression.NONE, part_bytes=PART_BYTES, key=new_key()
            )
        assert_nothing_is_left(store)
    finally:
        faulty.close()
        store.close()


def test_a_stopped_upload_leaves_nothing(store):
    """Stopped from another thread, between two writes."""
    half, go_on = threading.Event(), threading.Event()

    def write(out):
        out.write(noise(12 * MIB))
        half.set()
        assert go_on.wait(30)
        out.write(b"more")
        return digest_of(b"")

    upload = LayerUpload(store, write, compression=Compression.NONE, part_bytes=PART_BYTES, key=new_key())

    def stop():
        assert half.wait(30)
        upload.stop()
        go_on.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(TransferStoppedError):
        upload.run()
    stopper.join()

    assert_nothing_is_left(store)


def test_more_parts_than_s3_takes_is_refused(monkeypatch):
    """Before the part that would be one too many."""
    monkeypatch.setattr("storage.layer_upload._MAX_PARTS", 2)
    store = MemoryContentStore()

    upload_layer(store, writer_of(noise(2 * MIB)), compression=Compression.NONE, part_bytes=MIB, key="fits")
    with pytest.raises(LayerTooLargeError):
        upload_layer(store, writer_of(noise(2 * MIB + 1)), compression=Compression.NONE, part_bytes=MIB, key="not")

    assert [info.key for info in store.objects("")] == ["fits"]


# -- a workspace's layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            OverlaySnapshotter,
            marks=[pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")],
        ),
        CopyingSnapshotter,
    ],
)
@pytest.mark.parametrize("compression", list(Compression))
def test_a_workspace_goes_up_and_unpacks_elsewhere(make, compression, store, tmp_path):
    """From changes to S3 without a file between, and from there to the same tree on another node."""
    here, there = make(tmp_path / "here"), make(tmp_path / "there")
    base = layer(file("f", b"1"), file("gone"))
    parent = apply(here, None, base)
    apply(there, None, base)
    with here.workspace(parent, "build") as workspace:
        (workspace.path / "big").write_bytes(noise(7 * MIB))
        (workspace.path / "gone").unlink()

        uploaded = upload_layer(
            store,
            lambda out: workspace.commit(out, source_date_epoch=1_000_000_000),
            compression=compression,
            part_bytes=PART_BYTES,
            key=new_key(),
        )
        chain = chain_id(parent, uploaded.descriptor.diff_id)
        workspace.publish(chain)

    blob = content(store, uploaded.key)
    assert apply(there, parent, Layer(inflated(blob, compression), blob, uploaded.descriptor)) == chain
    trees = []
    for node in (here, there):
        trees.append(facts(node.mount(chain, "look")))
        node.unmount("look")
    assert trees[0] == trees[1]
    assert trees[0]["big"].mtime_ns == 1_000_000_000 * 10**9


# -- presence --------------------------------------------------------------------------------------------


@contextmanager
def layers_of(stores, objects, worker="n0"):
    """Lend a LayerStore over *stores* and *objects*."""
    renewer = stores.new_renewer()
    tokens = iter(range(10**6))
    try:
        yield LayerStore(
            worker=worker,
            store=objects,
            flights=stores.flights,
            renewer=renewer,
            new_token=lambda: f"{worker}-{next(tokens)}",
            flight_ttl_s=TTL_S,
            part_bytes=MIB,
        )
    finally:
        renewer.close()


def put(layers, tar: bytes, compression=Compression.GZIP, deadline_s: float = DEADLINE_S):
    return layers.put_layer(writer_of(tar), compression=compression, deadline_s=deadline_s, hold=hold_nothing)


async def test_a_new_layer_becomes_present(stores):
    """Its record names object and maker; its flight's lease holds it for as long as a caller needs to attach it."""
    objects = MemoryContentStore()
    with layers_of(stores, objects) as layers:
        stored = await put(layers, noise(3 * MIB))

    digest = stored.descriptor.digest
    assert await stores.refs.blobs([digest]) == [stored.blob]
    assert digest_of(content(objects, stored.blob.key)) == digest
    assert stored.blob.key.startswith(KEY_PREFIX)
    assert stored.blob.source == FARM.source
    assert len(await stores.leases.holders(blob_resource(digest))) == 1
    assert await stores.flights.state(blob_resource(digest)) is None


async def test_the_same_layer_twice_is_one_object(stores):
    """Who comes second finds it present, drops its own and uses the first."""
    objects = MemoryContentStore()
    with layers_of(stores, objects) as layers:
        first = await put(layers, b"layer" * 1000)
        second = await put(layers, b"layer" * 1000)

    assert second == first
    assert [info.key for info in objects.objects("")] == [first.blob.key]


async def test_of_many_that_make_one_layer_at_once_one_object_stays(stores):
    """All of them end with the same record."""
    objects = MemoryContentStore()
    others = [stores.other() for _ in range(4)]
    with ExitStack() as stack:
        nodes = [stack.enter_context(layers_of(each, objects, f"n{n}")) for n, each in enumerate(others)]
        made = await asyncio.gather(*(put(layers, b"layer" * 1000) for layers in nodes))

    assert len({stored.blob for stored in made}) == 1
    assert [info.key for info in objects.objects("")] == [made[0].blob.key]


async def own_flight(stores, tar: bytes) -> Owned:
    """Own the flight of the blob that *tar*, uncompressed, is."""
    outcome = await stores.flights.join(blob_resource(digest_of(tar)), worker="fetcher", token="fetcher's", ttl_s=TTL_S)
    assert isinstance(outcome, Owned)
    return outcome


async def test_a_fetch_of_the_same_bytes_is_waited_for(stores):
    """What another is fetching when the layer is uploaded is used once it is there."""
    objects, tar = MemoryContentStore(), b"tar" * 1000
    owned = await own_flight(stores, tar)
    info = objects.put("theirs", tar)
    theirs = BlobRecord(
        digest=digest_of(tar), key="theirs", size_bytes=len(tar), etag=info.etag, fence=owned.fence.number
    )
    with layers_of(stores.other(), objects) as layers:
        putting = asyncio.create_task(put(layers, tar, Compression.NONE))
        async with asyncio.timeout(DEADLINE_S):
            while not (await stores.flights.state(owned.fence.key))["waiters"]:  # noqa: ASYNC110 - nobody is woken
                await asyncio.sleep(0.005)
        await stores.flights.commit(owned.fence, theirs)
        stored = await putting

    assert stored.blob == theirs
    assert [info.key for info in objects.objects("")] == ["theirs"]


async def test_a_fetch_that_takes_too_long_is_a_typed_error(stores):
    """With its deadline; the layer's own object is dropped."""
    objects, tar = MemoryContentStore(), b"tar" * 1000
    owned = await own_flight(stores, tar)
    with layers_of(stores.other(), objects) as layers, pytest.raises(DeadlineExceededError):
        await put(layers, tar, Compression.NONE, deadline_s=0.3)

    assert_nothing_is_left(objects)
    await stores.flights.vacate(owned.fence)


async def test_what_a_dead_owner_left_of_the_same_bytes_is_dropped(stores):
    """Its fetch need not be resumed: the layer is there whole."""
    objects, tar = MemoryContentStore(), b"tar" * 1000
    owned = await own_flight(stores, tar)
    upload_id = objects.begin_upload("blobs/half")
    await stores.flights.begin_upload(owned.fence, UploadState(key="blobs/half", upload_id=upload_id, part_bytes=MIB))
    await stores.flights.vacate(owned.fence)
    with layers_of(stores, objects) as layers:
        stored = await put(layers, tar, Compression.NONE)

    assert objects.list_uploads("") == []
    assert await stores.refs.blobs([digest_of(tar)]) == [stored.blob]


async def test_a_cancelled_put_stops_the_upload_and_leaves_nothing(stores):
    """The writer has ended when the cancellation is through: what it reads may be removed then."""
    objects = MemoryContentStore()
    writing, ended = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def write(out):
        try:
            for n in range(10**6):
                out.write(noise(MIB // 4))
                if n == 10:
                    loop.call_soon_threadsafe(writing.set)
        finally:
            ended.set()
        return digest_of(b"")

    with layers_of(stores, objects) as layers:
        putting = asyncio.create_task(
            layers.put_layer(write, compression=Compression.NONE, deadline_s=DEADLINE_S, hold=hold_nothing)
        )
        async with asyncio.timeout(DEADLINE_S):
            await writing.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting

    assert ended.is_set()
    assert_nothing_is_left(objects)


async def test_a_commit_that_may_have_happened_deletes_nothing(stores):
    """Where Redis doesn't say, the object stays: a record may name it."""
    objects = MemoryContentStore()

    class Unsure:
        """Flights whose commits are carried out and not answered."""

        def __init__(self, flights) -> None:
            self._flights = flights

        def __getattr__(self, name):
            return getattr(self._flights, name)

        async def commit(self, fence, blob) -> None:
            await self._flights.commit(fence, blob)
            raise UnavailableError("Redis", "of the test")

    with layers_of(stores, objects) as layers:
        layers._flights = Unsure(stores.flights)
        uploaded: UploadedLayer = await asyncio.to_thread(
            upload_layer,
            objects,
            writer_of(b"tar"),
            compression=Compression.NONE,
            part_bytes=MIB,
            key=new_key(),
        )
        with pytest.raises(UnavailableError):
            await layers.commit_layer(uploaded, deadline_s=DEADLINE_S)
        again = await layers.commit_layer(uploaded, deadline_s=DEADLINE_S)

    assert again.key == uploaded.key
    assert content(objects, uploaded.key) == b"tar"
