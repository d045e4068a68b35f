"""Drivers' directories in the content store: sent once, written out as they were, lost ones told and sent again."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.digest import digest_of
from cluster.errors import FileChangedError, NodeDiskError, ScanError, TreeLostError, UnavailableError
from cluster.tree import MTIME_S
from lazyfarm.context import scan
from storage.blobs import S3ContentStore
from storage.local_trees import LocalTrees
from storage.memory_blobs import MemoryContentStore

pytestmark = pytest.mark.redis

MIB = 1024**2


class CountingStore:
    """A content store that says how often it was asked for what."""

    def __init__(self, store) -> None:
        self._store = store
        self.puts: list[str] = []
        self.opens: list[str] = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, key, data):
        self.puts.append(key)
        return self._store.put(key, data)

    def open(self, key, offset=0, length=None):
        self.opens.append(key)
        return self._store.open(key, offset, length)


@pytest.fixture(params=["memory", pytest.param("swift", marks=pytest.mark.s3)])
def store(request):
    if request.param == "memory":
        yield CountingStore(MemoryContentStore())
        return
    s3 = S3ContentStore(request.getfixturevalue("s3_config"))
    yield CountingStore(s3)
    s3.close()


@pytest.fixture
def link(redis_farm):
    return redis_farm.stores().refs._link


@pytest.fixture
def trees(redis_farm, link, store):
    with ThreadPoolExecutor(8) as threads:
        yield LocalTrees(link, redis_farm.keys, store, threads=threads)


@pytest.fixture
def source(tmp_path) -> Path:
    """A directory with some of everything."""
    root = tmp_path / "source"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "a.txt").write_text("a")
    (root / "nothing").touch()
    (root / "sub" / "same.txt").write_text("a")
    (root / "sub" / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (root / "sub" / "deep" / "run.sh").chmod(0o6755)
    (root / "closed").write_text("closed")
    (root / "closed").chmod(0o400)
    (root / "link").symlink_to("sub/../a.txt")
    (root / "dangling").symlink_to("/nowhere")
    (root / "sub").chmod(0o555)
    yield root
    (root / "sub").chmod(0o755)


async def send(trees, root):
    scanned = scan(root)
    sent = await trees.send(scanned.tree, scanned.paths)
    assert sent.tree == scanned.digest
    return sent


async def fetch(trees, digest, into) -> Path:
    into.mkdir()
    await trees.materialise(await trees.open_tree(digest), into)
    return into


# -- there and back -----------------------------------------------------------------------------------


async def test_a_directory_comes_out_as_it_was(trees, source, tmp_path):
    """Content, modes, links and empty directories are as they were; times are one."""
    sent = await send(trees, source)

    out = await fetch(trees, sent.tree, tmp_path / "out")

    assert scan(out).digest == sent.tree
    assert str((out / "link").readlink()) == "sub/../a.txt"
    assert {os.lstat(path).st_mtime for path in [out, *out.rglob("*")]} == {MTIME_S}
    (out / "sub").chmod(0o755)


async def test_content_of_every_size_comes_back(trees, store, tmp_path):
    """Files at the limits of packs and chunks, and one in several parts, are whole."""
    root, rng = tmp_path / "source", random.Random(1)  # noqa: S311 - test data
    root.mkdir()
    sizes = [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 17 * MIB]
    for size in sizes:
        (root / str(size)).write_bytes(rng.randbytes(size))

    sent = await send(trees, root)

    assert (sent.files, sent.size_bytes) == (len(sizes), sum(sizes))
    assert scan(await fetch(trees, sent.tree, tmp_path / "out")).digest == sent.tree


async def test_an_empty_directory_is_a_tree(trees, tmp_path):
    """A tree may have nothing in it."""
    (tmp_path / "source").mkdir()

    sent = await send(trees, tmp_path / "source")

    assert list((await fetch(trees, sent.tree, tmp_path / "out")).iterdir()) == []


# -- what moves ---------------------------------------------------------------------------------------


async def test_only_what_is_lacked_is_sent(trees, store, source):
    """A tree that is there moves nothing; one more file moves that file and the manifest."""
    first = await send(trees, source)
    assert first.files == 4  # a.txt and same.txt are one content
    store.puts.clear()

    again = await send(trees, source)
    assert (again.files, again.size_bytes, store.puts) == (0, 0, [])

    (source / "new").write_text("new")
    more = await send(trees, source)
    assert (more.files, more.size_bytes, len(store.puts)) == (1, 3, 2)


async def test_small_files_share_requests(trees, store, tmp_path):
    """A thousand small files are one object, written and read with one request."""
    root = tmp_path / "source"
    root.mkdir()
    for number in range(1000):
        (root / str(number)).write_text(f"content {number}")

    sent = await send(trees, root)
    assert [key.split("/")[1] for key in store.puts] == ["packs", "trees"]

    store.opens.clear()
    await fetch(trees, sent.tree, tmp_path / "out")
    assert [key.split("/")[1] for key in store.opens] == ["trees", "packs"]


async def test_two_drivers_may_send_at_once(trees, source, tmp_path):
    """Whoever's record stands, the tree is whole."""
    first, second = await asyncio.gather(send(trees, source), send(trees, source))

    assert first.tree == second.tree
    assert scan(await fetch(trees, first.tree, tmp_path / "out")).digest == first.tree
    (tmp_path / "out" / "sub").chmod(0o755)


async def test_missing_says_what_is_lacked_in_order(trees, source):
    """Digests that the farm lacks come back in their order, each once."""
    await send(trees, source)
    lacked = [digest_of(b"1"), digest_of(b"2")]

    assert await trees.missing([lacked[1], digest_of(b"a"), lacked[0], lacked[1]]) == [lacked[1], lacked[0]]


# -- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "a", "abd", "abcd", "a" * 9 * MIB], ids=len)
async def test_a_file_that_changes_is_never_recorded(trees, tmp_path, content):
    """A file that is not what was scanned any more is an error that names it, and its digest stays lacked."""
    root = tmp_path / "source"
    root.mkdir()
    (root / "file").write_text("abc")
    scanned = scan(root)
    (root / "file").write_text(content)

    with pytest.raises(FileChangedError, match="file"):
        await trees.send(scanned.tree, scanned.paths)
    assert await trees.missing(scanned.paths) == list(scanned.paths)
    with pytest.raises(TreeLostError):
        await trees.open_tree(scanned.digest)


async def test_a_big_file_that_changes_leaves_no_upload(trees, store, tmp_path):
    """The upload of a file that changes is aborted."""
    root = tmp_path / "source"
    root.mkdir()
    (root / "file").write_bytes(bytes(9 * MIB))
    scanned = scan(root)
    (root / "file").write_bytes(bytes(8 * MIB) + b"x" * MIB)

    with pytest.raises(FileChangedError):
        await trees.send(scanned.tree, scanned.paths)

    assert store.list_uploads("local/") == []


async def test_a_file_that_is_gone_is_named(trees, source):
    """A file that can't be read any more is an error with its path."""
    scanned = scan(source)
    (source / "a.txt").unlink()

    with pytest.raises(ScanError, match=r"a\.txt"):
        await trees.send(scanned.tree, scanned.paths)


async def test_a_tree_that_was_never_sent_is_told(trees):
    """A digest that the farm doesn't know is an error that names it."""
    with pytest.raises(TreeLostError, match=digest_of(b"x")):
        await trees.open_tree(digest_of(b"x"))


@pytest.mark.parametrize("kind", ["packs", "trees"])
@pytest.mark.parametrize("damage", ["gone", "short", "other"])
async def test_what_is_lost_in_the_store_is_sent_again(trees, store, tmp_path, kind, damage):
    """Objects that are gone or damaged are told by type and forgotten: the next build mends the tree."""
    root = tmp_path / "source"
    root.mkdir()
    (root / "file").write_text("content")
    sent = await send(trees, root)
    (key,) = (info.key for info in store.objects(f"local/{kind}/"))
    match damage:
        case "gone":
            store.delete(key)
        case "short":
            store.put(key, b"conten")
        case "other":
            store.put(key, b"CONTENT")

    with pytest.raises(TreeLostError):
        await fetch(trees, sent.tree, tmp_path / "out")

    await send(trees, root)
    assert (await fetch(trees, sent.tree, tmp_path / "again") / "file").read_text() == "content"


async def test_where_all_is_lost_one_failure_is_enough(trees, store, tmp_path):
    """Manifest and packs, as where a bucket was emptied: the next build sends all of them; what is there stays."""
    root = tmp_path / "source"
    root.mkdir()
    for number in range(3):
        (root / f"{number}").write_bytes(random.Random(number).randbytes(6 * MIB))  # noqa: S311
    sent = await send(trees, root)
    kept, *lost = [info.key for info in store.objects("local/packs/")]
    (manifest,) = [info.key for info in store.objects("local/trees/")]
    for key in (*lost, manifest):
        store.delete(key)

    with pytest.raises(TreeLostError):
        await fetch(trees, sent.tree, tmp_path / "out")

    assert (await send(trees, root)).files == len(lost) == 2
    again = await fetch(trees, sent.tree, tmp_path / "again")
    assert all((again / f"{number}").read_bytes() == (root / f"{number}").read_bytes() for number in range(3))
    assert kept in {info.key for info in store.objects("local/packs/")}


async def test_nothing_in_the_way_is_written_to(trees, source, tmp_path):
    """Where something is in the directory already, also a symlink to elsewhere, that is an error of the disk."""
    sent = await send(trees, source)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.write_text("precious")
    (out / "a.txt").symlink_to(elsewhere)

    with pytest.raises(NodeDiskError, match=r"a\.txt"):
        await trees.materialise(await trees.open_tree(sent.tree), out)
    assert elsewhere.read_text() == "precious"


class BlockingStore:
    """A content store whose reads wait for *proceed*."""

    def __init__(self, store) -> None:
        self._store = store
        self.arrived = threading.Event()
        self.proceed = threading.Event()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def open(self, key, offset=0, length=None):
        if "packs" in key:
            self.arrived.set()
            assert self.proceed.wait(60)
        return self._store.open(key, offset, length)


async def test_after_a_cancellation_nothing_is_written(redis_farm, link, source, tmp_path):
    """Who cancels may remove the directory: the call ends when its threads have."""
    blocking = BlockingStore(MemoryContentStore())
    with ThreadPoolExecutor(4) as threads:
        trees = LocalTrees(link, redis_farm.keys, blocking, threads=threads)
        sent = await send(trees, source)
        task = asyncio.create_task(fetch(trees, sent.tree, tmp_path / "out"))
        await asyncio.to_thread(blocking.arrived.wait, 60)

        task.cancel()
        for _ in range(20):  # turns of the loop: the cancellation goes down through the tasks
            await asyncio.sleep(0)
        assert not task.done()
        blocking.proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await task

        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and not path.is_symlink()]
        assert [path for path in written if path.stat().st_size] == []


async def test_a_store_that_is_away_is_told_as_such(redis_farm, link, source):
    """No answer is UnavailableError, and nothing is recorded."""

    class Away(MemoryContentStore):
        def put(self, key, data):
            raise UnavailableError("s3", "away")

    with ThreadPoolExecutor(4) as threads:
        trees = LocalTrees(link, redis_farm.keys, Away(), threads=threads)
        scanned = scan(source)
        with pytest.raises(UnavailableError):
            await trees.send(scanned.tree, scanned.paths)

        assert set(await trees.missing(scanned.paths)) == set(scanned.paths)
