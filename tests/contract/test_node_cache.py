"""The node's blob cache: whole blobs by digest, followed while they arrive, evicted by last use."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.digest import Digest, digest_of, hex_of
from cluster.errors import BlobDamagedError, DeadlineExceededError, DigestMismatchError, UnavailableError
from storage.node_cache import NodeCache

KIB = 1024


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache", 100 * KIB, headroom_bytes=0)


def bytes_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


def fill(cache: NodeCache, data: bytes, used_ns: int | None = None) -> Digest:
    """Put *data* into the cache; *used_ns* sets when it was last used."""
    digest = digest_of(data)
    staging = cache.staging(digest, len(data))
    staging.pwrite(0, memoryview(data))
    staging.advance(len(data))
    path = staging.publish()
    if used_ns is not None:
        os.utime(path, ns=(used_ns, path.stat().st_mtime_ns))
    return digest


def read_all(stream, step: int = 1000) -> bytes:
    read, buffer = bytearray(), memoryview(bytearray(step))
    while count := stream.readinto(buffer):
        read += buffer[:count]
    return bytes(read)


def is_here(cache: NodeCache, digest: Digest) -> bool:
    """Look without marking it used."""
    return (cache.root / "blobs" / hex_of(digest)).exists()


@pytest.mark.parametrize("size", [0, 1, 50_000])
def test_a_published_blob_is_found(cache, size):
    """What was published is found by digest and read back, also an empty blob."""
    data = bytes_of(size)

    digest = fill(cache, data)

    assert cache.path_of(digest).read_bytes() == data
    with cache.open(digest) as blob:
        assert read_all(blob) == data
    assert cache.verify(digest)
    assert list((cache.root / "staging").iterdir()) == []


def test_a_blob_that_is_not_here_is_none(cache):
    """A miss is an answer, and is counted."""
    digest = digest_of(b"nowhere")

    assert cache.path_of(digest) is None
    assert cache.open(digest) is None
    assert not cache.verify(digest)
    cache.remove(digest)
    assert cache.statistics().misses == 2


def test_a_blob_is_not_found_until_it_is_published(cache):
    """What is arriving, even all of it, is not in the cache; discarding it leaves nothing."""
    data = bytes_of(100)
    staging = cache.staging(digest_of(data), 100)
    staging.pwrite(0, memoryview(data))
    staging.advance(100)

    assert cache.path_of(staging.digest) is None
    staging.discard()
    assert cache.path_of(staging.digest) is None
    assert cache.statistics().staging_bytes == 0


def test_an_incomplete_blob_is_never_published(cache):
    """Publishing what has not all come is refused, and the staging file is gone."""
    staging = cache.staging(digest_of(b"x"), 100)
    staging.advance(99)

    with pytest.raises(BlobDamagedError, match="99 of 100"):
        staging.publish()
    assert cache.statistics().staging_bytes == 0


def test_bytes_beyond_the_size_are_refused(cache):
    """A source that sends more than it said does not grow the file."""
    staging = cache.staging(digest_of(b"x"), 10)

    with pytest.raises(BlobDamagedError, match="beyond"):
        staging.pwrite(5, memoryview(b"123456"))
    staging.discard()


def test_readers_follow_the_writer(cache):
    """Readers see exactly the bytes below the frontier, in order, while ranges arrive in any order."""
    data = bytes_of(90 * KIB)
    staging = cache.staging(digest_of(data), len(data))
    started = threading.Barrier(4)

    def follow() -> bytes:
        with staging.open_reader(stall_s=20.0) as reader:
            started.wait(20.0)
            return read_all(reader, 777)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(follow) for _ in range(3)]
        started.wait(20.0)
        for start in (60, 30, 0):  # the last third first
            staging.pwrite(start * KIB, memoryview(data)[start * KIB : (start + 30) * KIB])
        for frontier in range(0, len(data) + 1, 5000):
            staging.advance(frontier)
        staging.advance(len(data))
        path = staging.publish()

        assert all(reader.result(20.0) == data for reader in readers)
    assert path.read_bytes() == data


def test_nothing_beyond_the_frontier_is_read(cache):
    """Bytes that are written and not advanced over stay unseen, and waiting for them has an end."""
    staging = cache.staging(digest_of(b"x"), 10)
    staging.pwrite(0, memoryview(b"0123456789"))
    staging.advance(4)
    buffer = memoryview(bytearray(10))

    with staging.open_reader(stall_s=0.05) as reader:
        assert reader.readinto(buffer) == 4
        assert bytes(buffer[:4]) == b"0123"
        with pytest.raises(DeadlineExceededError, match="beyond 4 of 10"):
            reader.readinto(buffer)
    staging.advance(2)  # never goes back
    assert staging.frontier_bytes == 4
    staging.discard()


def test_a_failure_reaches_every_reader_after_what_is_good(cache):
    """Readers get the good bytes, then the very error, each a copy of its own."""
    staging = cache.staging(digest_of(b"x"), 10)
    staging.pwrite(0, memoryview(b"0123"))
    staging.advance(4)
    readers = [staging.open_reader(), staging.open_reader()]
    waiting = ThreadPoolExecutor(2)

    results = [waiting.submit(read_all, reader) for reader in readers]
    staging.fail(DigestMismatchError("sha256:a", "sha256:b", "a mirror"))

    for result in results:
        with pytest.raises(DigestMismatchError) as caught:
            result.result(10.0)
        assert caught.value.source == "a mirror"
    assert results[0].exception() is not results[1].exception()
    with pytest.raises(DigestMismatchError):
        staging.publish()
    waiting.shutdown()
    for reader in readers:
        reader.close()


def test_discarding_ends_the_readers_that_wait(cache):
    """A writer that gives up leaves no reader waiting."""
    staging = cache.staging(digest_of(b"x"), 10)

    with ThreadPoolExecutor(1) as pool, staging.open_reader() as reader:
        result = pool.submit(read_all, reader)
        staging.discard()
        with pytest.raises(UnavailableError, match="discarded"):
            result.result(10.0)


def test_readers_outlive_publication_and_eviction(cache):
    """A reader that is open reads to the end, whatever becomes of the file's name."""
    data = bytes_of(5000)
    staging = cache.staging(digest_of(data), len(data))
    staging.pwrite(0, memoryview(data))
    staging.advance(len(data))

    with staging.open_reader() as reader:
        staging.publish()
        cache.remove(staging.digest)
        assert read_all(reader) == data
    with pytest.raises(UnavailableError):
        staging.open_reader()


def test_two_writers_of_one_digest_are_both_whole(cache):
    """Each has a file of its own; whoever publishes last replaces the same bytes."""
    data = bytes_of(1000)
    first, second = (cache.staging(digest_of(data), len(data)) for _ in range(2))

    for staging in (first, second):
        staging.pwrite(0, memoryview(data))
        staging.advance(len(data))
        staging.publish()

    assert cache.path_of(digest_of(data)).read_bytes() == data
    assert cache.statistics().blobs == 1


def test_the_least_recently_used_go_first(cache):
    """Room is made by last use: looking a blob up keeps it."""
    old, older, fresh = (fill(cache, bytes_of(30 * KIB, n), used_ns=n * 10**9) for n in (2, 1, 3))
    assert cache.path_of(older) is not None  # used now

    fill(cache, bytes_of(30 * KIB, 4))

    assert [is_here(cache, digest) for digest in (old, older, fresh)] == [False, True, True]
    assert cache.statistics().evicted == 1


def test_what_is_being_read_is_not_evicted(cache):
    """An open blob stays, even as the least recently used; once closed it may go."""
    oldest, other = (fill(cache, bytes_of(40 * KIB, n), used_ns=n * 10**9) for n in (1, 2))

    with cache.open(oldest) as blob:
        os.utime(
            cache.root / "blobs" / hex_of(oldest), ns=(1, (cache.root / "blobs" / hex_of(oldest)).stat().st_mtime_ns)
        )
        fill(cache, bytes_of(40 * KIB, 3))
        assert is_here(cache, oldest)
        assert not is_here(cache, other)
        assert len(read_all(blob)) == 40 * KIB
    fill(cache, bytes_of(90 * KIB, 4))
    assert not is_here(cache, oldest)


def test_what_is_arriving_counts(cache):
    """A staging file takes its room from the start, before a byte has come."""
    first = fill(cache, bytes_of(60 * KIB, 1), used_ns=10**9)

    staging = cache.staging(digest_of(b"x"), 80 * KIB)

    assert not is_here(cache, first)
    assert cache.statistics().staging_bytes == 80 * KIB
    staging.discard()


def test_a_blob_bigger_than_the_cap_still_arrives(cache):
    """The cap bounds what is kept, not what can be extracted; the next one makes room again."""
    big = fill(cache, bytes_of(150 * KIB, 1), used_ns=10**9)
    assert is_here(cache, big)

    fill(cache, bytes_of(KIB, 2))

    assert not is_here(cache, big)


def test_a_disk_that_is_too_full_says_so(tmp_path):
    """The error says how much is wanted and free, evicts what it may first, and leaves no file."""
    roomy = NodeCache(tmp_path, 10**18, headroom_bytes=0)
    kept = fill(roomy, b"kept")
    cache = NodeCache(tmp_path, 10**18, headroom_bytes=10**15)

    with pytest.raises(UnavailableError, match="a blob of 1,000 bytes doesn't fit: 0 bytes") as caught:
        cache.staging(digest_of(b"x"), 1000)

    assert caught.value.retryable
    assert not is_here(cache, kept)
    assert cache.statistics().staging_bytes == 0


def test_a_damaged_blob_is_found_out_and_removed(cache):
    """Verification compares the digest; what doesn't match is gone afterwards."""
    digest = fill(cache, b"as it should be")
    cache.path_of(digest).write_bytes(b"as it should BE")

    assert not cache.verify(digest)
    assert cache.path_of(digest) is None


def test_a_blob_from_before_the_last_boot_is_verified_when_it_is_used(cache):
    """A power failure keeps a name and loses bytes: such a blob is trusted only after it was read."""
    damaged, whole = fill(cache, b"damaged by the crash"), fill(cache, b"whole")
    path = cache.root / "blobs" / hex_of(damaged)
    path.write_bytes(bytes(20))
    for digest in (damaged, whole):
        os.utime(cache.root / "blobs" / hex_of(digest), (1.0, 1.0))

    assert cache.path_of(damaged) is None
    assert cache.path_of(whole) is not None
    assert cache.path_of(whole).stat().st_mtime > 1.0  # once is enough


def test_what_a_killed_process_left_is_removed_and_nothing_else(cache):
    """Recovery tells a dead writer's staging file from a live one's, in this process or another."""
    script = (
        "import os, sys; from pathlib import Path; from storage.node_cache import NodeCache\n"
        f"cache = NodeCache(Path({str(cache.root)!r}), 10**6, headroom_bytes=0)\n"
        "staging = cache.staging('sha256:' + 'b' * 64, 100)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    mine = cache.staging(digest_of(b"mine"), 10)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        assert [name for name in cache.recover() if name.startswith("b" * 16)] == []
        other.kill()
    other.wait(10.0)

    assert [name[:16] for name in cache.recover()] == ["b" * 16]
    assert cache.recover() == []
    mine.pwrite(0, memoryview(b"0123456789"))
    mine.advance(10)
    mine.publish()


def test_threads_may_fill_and_read_at_once(cache):
    """Many threads that fill, read and evict see only whole blobs, and the cap holds when all is done."""
    contents = [bytes_of(20 * KIB, n) for n in range(12)]

    def work(n: int) -> bool:
        data = contents[n % 12]
        digest = digest_of(data)
        blob = cache.open(digest)
        if blob is None:
            digest = fill(cache, data)
            blob = cache.open(digest)
        if blob is None:
            return True  # evicted by the others already
        with blob:
            return hashlib.sha256(read_all(blob, 4096)).hexdigest() == hex_of(digest)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(120)))
    fill(cache, b"one more")
    assert cache.statistics().blob_bytes <= 100 * KIB
