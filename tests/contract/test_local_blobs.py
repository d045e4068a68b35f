"""A node's blobs: from its disk, as they arrive, or from the content store; no error outlives those who waited."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from cluster.digest import Digest, digest_of, hex_of
from cluster.errors import BlobDamagedError, DigestMismatchError, InternalError, UnavailableError
from cluster.ref import BlobRecord
from storage.local_blobs import NodeBlobs
from storage.memory import Memory, MemoryRefStore
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from tests.doubles.stores import FakeClock, eventually

DATA = b"the bytes of a layer"
DIGEST = digest_of(DATA)


class FaultyStore(MemoryContentStore):
    """A content store whose reads fail as planned, once each; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[Exception] = []
        self.opened = 0

    def open(self, key, offset=0, length=None):
        self.opened += 1
        if self.plan:
            raise self.plan.pop(0)
        return super().open(key, offset, length)


class Node:
    """One node's blobs over a real disk."""

    def __init__(self, root) -> None:
        self.memory = Memory(FakeClock())
        self.refs = MemoryRefStore(self.memory)
        self.store = FaultyStore()
        self.cache = NodeCache(root, 10**6, headroom_bytes=0)
        self.threads = ThreadPoolExecutor(4)
        loop = asyncio.get_running_loop()
        self.blobs = NodeBlobs(self.cache, self.store, self.refs, loop=loop, threads=self.threads, downloads=2)

    def store_blob(self, data: bytes = DATA, digest: Digest = DIGEST) -> BlobRecord:
        """Make the blob present."""
        info = self.store.put(f"blobs/{digest}", data)
        blob = BlobRecord(digest=digest, key=info.key, size_bytes=len(data), etag=info.etag, fence=1)
        self.memory.blobs[digest] = blob
        return blob

    async def read(self, digest: Digest = DIGEST) -> bytes:
        """Get the blob, read it and have it verified."""
        blob = await asyncio.wait_for(self.blobs.get(digest), 10)

        def read_all() -> bytes:
            buffer, found, stream = memoryview(bytearray(64)), b"", blob.open()
            while count := stream.readinto(buffer):
                found += buffer[:count]
            stream.close()
            return found

        data = await asyncio.get_running_loop().run_in_executor(self.threads, read_all)
        await blob.verified()
        return data

    @asynccontextmanager
    async def no_slot_free(self):
        """Keep every download waiting while the body runs."""
        async with AsyncExitStack() as held:
            for number in range(2):
                await held.enter_async_context(self.blobs._slots.slot(f"another {number}", []))
            yield

    async def assert_forgotten(self) -> None:
        """Nothing is kept of what is over, once what did it has ended."""

        def nothing() -> bool:
            return (self.blobs._wanted, self.blobs._downloads, self.blobs._arriving) == ({}, {}, {})

        await eventually(nothing)


def raising(error: Exception):
    """Return a function that raises *error*, whatever it is given."""

    def function(*_args):
        raise error

    return function


@pytest.fixture
async def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.threads.shutdown()
    gc.collect()


async def test_a_blob_comes_from_the_content_store_once(node):
    """A present blob that nobody spoke of is downloaded, kept on the disk, and read from there afterwards."""
    node.store_blob()
    assert await asyncio.gather(node.read(), node.read()) == [DATA, DATA]
    assert await node.read() == DATA
    assert node.store.opened == 1
    await eventually(lambda: not node.blobs._arriving)
    await node.assert_forgotten()


async def test_a_blob_comes_once_however_the_callers_are_interleaved(node):
    """Who finds no file yet, and looks again when the download has just ended, finds that it has: no second one."""
    for number in range(300):
        data = f"layer {number}".encode()
        digest = digest_of(data)
        node.store_blob(data, digest)
        assert await asyncio.gather(*(node.read(digest) for _ in range(3))) == [data] * 3
        assert node.store.opened == number + 1


async def test_what_becomes_present_while_somebody_waits_is_brought(node):
    """Told of a blob that is waited for: it is downloaded at once."""
    reading = asyncio.create_task(node.read())
    await eventually(lambda: node.blobs._wanted)
    node.blobs.note_present(node.store_blob())
    assert await reading == DATA


async def test_nothing_is_remembered_of_blobs_that_nobody_waits_for(node):
    """However many blobs a worker hears of, it keeps no list of them."""
    for n in range(100):
        node.blobs.note_present(node.store_blob(b"%d" % n, digest_of(b"%d" % n)))
    await node.assert_forgotten()


async def test_a_failed_download_fails_those_who_wait_and_nobody_later(node):
    """Late arrivals never inherit: who comes after the failure gets the blob."""
    node.store_blob()
    make_room = node.cache.staging
    async with node.no_slot_free():
        waiting = [asyncio.create_task(node.blobs.get(DIGEST)) for _ in range(2)]
        await eventually(lambda: node.blobs._downloads)
        node.cache.staging = raising(UnavailableError("node cache", "the disk is full"))
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 2
    assert outcomes[0] is not outcomes[1]
    await node.assert_forgotten()
    node.cache.staging = make_room
    assert await node.read() == DATA


async def test_a_caller_that_left_leaves_no_error_behind(node):
    """Its download fails when nobody waits any more: the next caller begins a download of its own."""
    node.store_blob()
    async with node.no_slot_free():
        leaver = asyncio.create_task(node.blobs.get(DIGEST))
        await eventually(lambda: node.blobs._downloads)
        leaver.cancel()
        await asyncio.wait({leaver})
        node.store.plan = [UnavailableError("the content store", "no answer")]
    await eventually(lambda: not node.blobs._downloads)
    assert await node.read() == DATA


async def test_a_flood_of_downloads_lets_a_late_caller_in(node):
    """Two hundred downloads wait for one tenant; another's only one is among the first that are done."""
    datas = [f"layer {n}".encode() for n in range(200)]
    ended = []

    async def read(data, tenant):
        await node.blobs.get(digest_of(data), [tenant])
        ended.append(tenant)

    for data in [*datas, DATA]:
        node.store_blob(data, digest_of(data))
    async with node.no_slot_free():
        flood = [asyncio.create_task(read(data, "flood")) for data in datas]
        await eventually(lambda: node.blobs._slots.waiting == len(datas))
        late = asyncio.create_task(read(DATA, "late"))
        await eventually(lambda: node.blobs._slots.waiting == len(datas) + 1)
    await asyncio.wait_for(asyncio.gather(late, *flood), 30)
    assert ended.index("late") < 20


async def test_a_bug_in_a_download_wakes_those_who_wait(node):
    """Whatever a download ends with, nobody waits for ever: it is told as the bug that it is."""
    node.store_blob()
    node.cache.staging = raising(ZeroDivisionError("oops"))
    with pytest.raises(InternalError, match="ZeroDivisionError: oops"):
        await asyncio.wait_for(node.blobs.get(DIGEST), 10)
    await node.assert_forgotten()


async def test_a_damaged_object_turns_its_ref_lazy_and_is_waited_for_anew(node):
    """The content store has other bytes: the record goes, and who waits gets what is fetched next."""
    node.store_blob(b"other bytes of it...")

    async def read_right() -> bytes:
        while True:
            with suppress(DigestMismatchError):
                return await node.read()

    reading = asyncio.create_task(read_right())
    await eventually(lambda: DIGEST not in node.memory.blobs and node.blobs._wanted)
    node.blobs.note_present(node.store_blob())
    assert await reading == DATA


async def test_a_damaged_file_on_the_disk_is_dropped_and_brought_again(node):
    """Bytes changed on this node's disk: told as damage, and the good copy comes from the content store."""
    node.store_blob()
    assert await node.read() == DATA
    path = node.cache.root / "blobs" / hex_of(DIGEST)
    path.chmod(0o600)
    path.write_bytes(b"XXXX" + DATA[4:])
    with pytest.raises(BlobDamagedError):
        await node.read()
    assert await node.read() == DATA
    assert node.store.opened == 2


async def test_a_file_that_was_replaced_meanwhile_does_not_vouch_for_the_one_that_was_read(node):
    """Two read a damaged file; the first has it replaced: the second is still told to read again."""
    node.store_blob()
    await node.read()
    path = node.cache.root / "blobs" / hex_of(DIGEST)
    path.write_bytes(b"XXXX" + DATA[4:])
    one, two = await node.blobs.get(DIGEST), await node.blobs.get(DIGEST)
    with pytest.raises(BlobDamagedError):
        await one.verified()
    assert await node.read() == DATA
    with pytest.raises(BlobDamagedError):
        await two.verified()
    one.open().close()
    two.open().close()


# -- following -------------------------------------------------------------------------------------------------


async def test_what_arrives_is_followed_from_its_start_with_where_it_is_from(node):
    """Also by who asks when half of it is here; it is verified once it is published."""
    early = asyncio.create_task(node.blobs.follow(DIGEST))
    await eventually(lambda: node.blobs._wanted)
    arriving = await asyncio.to_thread(node.blobs.begin, DIGEST, len(DATA), frozenset({"r.example/app"}))
    arriving.pwrite(0, memoryview(DATA))
    arriving.advance(5)
    followers = [await early, await node.blobs.follow(DIGEST)]
    assert [followed.origins for followed in followers] == [frozenset({"r.example/app"})] * 2
    buffer = memoryview(bytearray(64))
    for followed in followers:
        assert buffer[: followed.open().readinto(buffer)] == DATA[:5]
    arriving.advance(len(DATA))
    arriving.publish()
    for followed in followers:
        await followed.verified()
        assert buffer[: followed.open().readinto(buffer)] == DATA[5:]


async def test_what_is_given_up_fails_its_followers_and_the_next_try_is_followed(node):
    """Wrong bytes: the error reaches who reads and who waits for the verdict; then others come."""
    wrong = node.blobs.begin(DIGEST, len(DATA))
    followed = await node.blobs.follow(DIGEST)
    assert followed.origins == {""}
    wrong.fail(DigestMismatchError(DIGEST, digest_of(b"other"), "r.example/app"))
    wrong.discard()
    with pytest.raises(DigestMismatchError):
        await followed.verified()
    with pytest.raises(DigestMismatchError):
        followed.open().readinto(memoryview(bytearray(1)))
    again = asyncio.create_task(node.blobs.follow(DIGEST))
    await eventually(lambda: node.blobs._wanted)
    right = node.blobs.begin(DIGEST, len(DATA))
    assert (await again).origins == {""}
    right.discard()
    await eventually(lambda: not node.blobs._arriving)
    await node.assert_forgotten()


async def test_to_follow_brings_nothing(node):
    """A blob that is present is read from the content store by who wants it; nothing is kept of who left."""
    node.store_blob()
    following = asyncio.create_task(node.blobs.follow(DIGEST))
    await eventually(lambda: node.blobs._wanted)
    node.blobs.note_present(node.memory.blobs[DIGEST])
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert node.store.opened == 0
    await node.assert_forgotten()
