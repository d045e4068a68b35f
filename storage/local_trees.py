"""Drivers' directories in the content store: each content once, whatever the number of drivers, builds and trees.

Small files are packed together, so that ten thousand of them are a few requests. Redis tells for each content in
which object it lies, and where; for each tree, which object is its manifest. Objects are never changed and have keys of
their own: two drivers that send one file at the same time both write it, the later record stands, and no reader sees
half of anything. A record is written after its object.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from cluster.digest import Digest, digest_of, hex_of
from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    FileChangedError,
    ScanError,
    TreeLostError,
    first_error,
)
from cluster.lease import object_resource, tree_resource
from cluster.ports import ByteStream, ContentStore, Part
from cluster.tree import Tree, decode_tree, encode_tree
from storage.codec import Codec
from storage.keys import Keys
from storage.stoppable import StoppedError, in_thread
from storage.tree_writer import TreeWriter

if TYPE_CHECKING:
    from storage.link import RedisLink

T = TypeVar("T")

#: What a pack holds at most. A bigger file has an object of its own, in parts of at least this size.
PACK_BYTES = 8 * 1024**2
#: Parts that S3 takes for one object.
_MAX_PARTS = 10_000
#: Packs on their way at once: what sending takes of memory is this many times a pack.
_TRANSFERS = 4
#: Bytes between two files that are read and dropped rather than asked for separately.
_GAP_BYTES = 256 * 1024
_CHUNK_BYTES = 1024**2
#: Times that a tree is sent whose contents are gone when it is to stand on them.
SEND_TRIES = 5
#: Records that one command reads or writes at most.
_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Where a content lies."""

    #: Key of the object.
    key: str
    #: Of its first byte in the object.
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What sending a tree came to."""

    tree: Digest
    #: Contents that the farm lacked, and their length.
    files: int
    size_bytes: int


_PACKED: Codec[Packed] = Codec("packed", Packed)


async def _hold_nothing(_resources: Sequence[str]) -> None:
    """Hold nothing."""


class LocalTrees:
    """The trees of drivers' directories, and the contents of their files.

    A tree stands on the objects that its files lie in; collection ends it when nobody holds or uses it, and with it
    those that no other tree stands on.

    Args:
        link: To Redis.
        keys: The farm's.
        store: Where objects lie.
        threads: For reading and writing them.
        hold: Holds resources by a live lease of who sends: what is sent, before anything names it. Who only reads, on
            a node, needs none.

    Every method may raise UnavailableError: no answer of Redis or S3. What was written before stays, and is found by
    the next try.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        store: ContentStore,
        *,
        threads: Executor,
        hold: Callable[[Sequence[str]], Awaitable[None]] = _hold_nothing,
    ) -> None:
        self._hold = hold
        self._link = link
        self._keys = keys
        self._store = store
        self._threads = threads

    # -- from a driver ------------------------------------------------------------------------------------

    async def send(self, tree: Tree, paths: Mapping[Digest, Path]) -> Sent:
        """Make the farm hold *tree*: send the contents that it lacks, read at *paths*, and then the manifest.

        Raises:
            FileChangedError: a file is not what the tree says any more; nothing is recorded of it.
            ScanError: a file can't be read.
            TreeLostError: what was sent is gone, again and again.
        """
        sizes = tree.files
        payload = encode_tree(tree)
        digest = digest_of(payload)
        await self._hold([tree_resource(digest)])
        sent: set[Digest] = set()
        for _ in range(SEND_TRIES):
            missing = await self._stand(digest, sizes)
            if not missing:
                break
            # Also what another driver had sent, if it was collected just before this tree was to stand on it.
            await self.put_files({one: paths[one] for one in missing})
            sent.update(missing)
        else:
            raise TreeLostError(missing[0], "it was sent, and is gone again")
        await self._put_manifest(digest, payload)
        return Sent(tree=digest, files=len(sent), size_bytes=sum(sizes[one] for one in sent))

    async def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Return which of *digests* the farm lacks, in their order."""
        return await self._stand("", digests)

    async def _stand(self, tree: str, digests: Iterable[Digest]) -> list[Digest]:
        """Let a tree stand on the objects of its contents; return which the farm lacks."""
        missing: list[Digest] = []
        for batch in _batches(list(dict.fromkeys(digests))):
            places = await self._link.run("local_stand", self._keys.prefix, tree, *batch, may_repeat=True)
            missing += [batch[place - 1] for place in places]
        return missing

    async def lacking(self, tree: Tree) -> list[Digest]:
        """Hold a tree that is about to be sent by another way, and return which of its contents the farm lacks."""
        digest = digest_of(encode_tree(tree))
        await self._hold([tree_resource(digest)])
        return await self._stand(digest, tree.files)

    async def new_object(self) -> str:
        """Return the key of an object that contents may be written to; it is held from now on."""
        key = f"local/packs/{uuid4().hex}"
        await self._hold([object_resource(key)])
        return key

    async def record(self, key: str, size_bytes: int, places: Mapping[Digest, Packed]) -> None:
        """Tell where contents lie, once their object of that key is there as a whole."""
        for batch in _batches(list(places.items())):
            told = [part for digest, packed in batch for part in (digest, _PACKED.encode(packed))]
            await self._link.run("local_put", self._keys.prefix, key, size_bytes, *told, may_repeat=True)

    async def put_files(self, paths: Mapping[Digest, Path]) -> None:
        """Store the content of each digest from the file at its path; raises as :meth:`send`."""
        slots = asyncio.Semaphore(_TRANSFERS)

        async def put(files: Sequence[LocalFile]) -> None:
            async with slots:
                key = await self.new_object()
                records = await self._in_thread(lambda stop: self._put_pack(key, files, stop))
            await self.record(key, sum(packed.size_bytes for packed in records.values()), records)

        planned = await self._in_thread(lambda _: list(packs(paths)))
        async with _together() as group:
            for files in planned:
                group.create_task(put(files))

    async def put_tree(self, tree: Tree) -> Digest:
        """Store a tree's manifest and return its digest. Its files should be there already."""
        payload = encode_tree(tree)
        digest = digest_of(payload)
        await self._stand(digest, tree.files)
        await self._put_manifest(digest, payload)
        return digest

    async def _put_manifest(self, digest: Digest, payload: bytes) -> None:
        if await self._link.run("local_tree", self._keys.prefix, digest, may_repeat=True) is None:
            key = f"local/trees/{hex_of(digest)}/{uuid4().hex}"
            await self._hold([object_resource(key)])
            await self._in_thread(lambda _: self._store.put(key, payload))
            await self._link.run("local_tree", self._keys.prefix, digest, key, len(payload), may_repeat=True)

    # -- on a node ----------------------------------------------------------------------------------------

    async def open_tree(self, digest: Digest) -> Tree:
        """Return the tree of a digest.

        Raises:
            TreeLostError: the farm doesn't hold it, or not any more.
        """
        key = await self._link.run("local_tree", self._keys.prefix, digest, may_repeat=True)
        if key is None:
            raise TreeLostError(digest, "the farm doesn't hold its manifest")
        try:
            payload = await self._in_thread(lambda _: self._read(key.decode()))
        except BlobNotFoundError as exc:
            await self._forget_gone(digest, key.decode())
            raise TreeLostError(digest, str(exc)) from exc
        if (actual := digest_of(payload)) != digest:
            raise await self._lost(self._keys.local_trees, digest, f"{key.decode()} holds {actual}")
        return decode_tree(payload)

    async def materialise(self, tree: Tree, directory: str | os.PathLike[str]) -> None:
        """Write a tree into *directory*, which is there and empty; every content is hashed on its way.

        Everything gets the mode that the tree says and one time, and as root also root for an owner; *directory* itself
        gets that time. Where it fails,
        some of it has been written; when it has ended, also by cancellation, nothing is written any more.

        Raises:
            TreeLostError: a content is not there, or not any more, or is damaged.
            NodeDiskError: the directory can't be written.
        """
        sizes = tree.files
        records = await self._records(list(sizes))
        if lost := [digest for digest in sizes if digest not in records]:
            raise TreeLostError(lost[0], f"the farm lacks this and {len(lost) - 1} more of the tree's files")
        writer = TreeWriter(tree, directory)
        await self._in_thread(lambda _: writer.begin())
        slots = asyncio.Semaphore(_TRANSFERS)

        async def fetch(run: Sequence[tuple[Digest, Packed]]) -> None:
            async with slots:
                await self._in_thread(lambda stop: self._fetch(run, writer, stop))

        try:
            async with _together() as group:
                for run in _runs(records):
                    group.create_task(fetch(run))
        except TreeLostError as exc:
            digest = Digest(exc.digest)
            if isinstance(exc.__cause__, BlobNotFoundError):
                await self._forget_gone(digest_of(encode_tree(tree)), records[digest].key)
            raise await self._lost(self._keys.local_files, digest, exc.reason) from exc
        await self._in_thread(lambda _: writer.end())

    # -- records ------------------------------------------------------------------------------------------

    async def _records(self, digests: Sequence[Digest]) -> dict[Digest, Packed]:
        found: dict[Digest, Packed] = {}
        for batch in _batches(digests):
            payloads = await self._link.execute("HMGET", self._keys.local_files, *batch, may_repeat=True)
            for digest, payload in zip(batch, payloads, strict=True):
                if payload is not None:
                    found[digest] = _PACKED.decode(payload)
        return found

    async def _lost(self, index: str, digest: Digest, reason: str) -> TreeLostError:
        """Forget a content whose object is gone or damaged, so that the next driver that has it sends it again."""
        await self._link.execute("HDEL", index, digest, may_repeat=True)
        return TreeLostError(digest, reason)

    async def _forget_gone(self, tree: Digest, key: str) -> None:
        """Forget an object that is gone, and with it all contents in it; so each other that the directory stands on.

        Where a whole bucket was lost, the next build sends the directory again, rather than fail at its next object.
        """
        stands = await self._link.execute("SMEMBERS", self._keys.local_stands(tree), may_repeat=True)
        others = [each.decode() for each in stands if each.decode() != key]
        gone = await self._in_thread(
            lambda stop: [each for each in others if not stop.is_set() and self._is_gone(each)]
        )
        await self._link.execute("HDEL", self._keys.local_objects, key, *gone, may_repeat=True)

    # -- in threads ---------------------------------------------------------------------------------------

    async def _in_thread(self, call: Callable[[threading.Event], T]) -> T:
        return await in_thread(self._threads, call)  # it notices within a chunk, or the store's own deadline

    def _put_pack(self, key: str, files: Sequence[LocalFile], stop: threading.Event) -> dict[Digest, Packed]:
        """Store some files as one object and return where each content lies."""
        if sum(file.size_bytes for file in files) > PACK_BYTES:
            (file,) = files
            self._put_parts(key, file, stop)
            return {file.digest: Packed(key=key, offset=0, size_bytes=file.size_bytes)}
        pack, records = bytearray(), dict[Digest, Packed]()
        for file in files:
            content = b"".join(file.chunks(PACK_BYTES, stop))
            records[file.digest] = Packed(key=key, offset=len(pack), size_bytes=len(content))
            pack += content
        self._store.put(key, memoryview(pack))
        return records

    def _put_parts(self, key: str, file: LocalFile, stop: threading.Event) -> None:
        part_bytes = part_bytes_of(file.size_bytes)
        upload_id = self._store.begin_upload(key)
        try:
            parts: list[Part] = [
                self._store.upload_part(key, upload_id, number, memoryview(chunk))
                for number, chunk in enumerate(file.chunks(part_bytes, stop), 1)
            ]
            self._store.complete_upload(key, upload_id, parts)
        except BaseException:
            with suppress(ClusterError):  # the sweeper aborts what is left
                self._store.abort_upload(key, upload_id)
            raise

    def _is_gone(self, key: str) -> bool:
        try:
            return self._store.head(key) is None
        except ClusterError:
            return False  # not known: who reads it finds out

    def _read(self, key: str) -> bytes:
        content, buffer = bytearray(), memoryview(bytearray(_CHUNK_BYTES))
        with self._store.open(key) as stream:
            while count := stream.readinto(buffer):
                content += buffer[:count]
        return bytes(content)

    def _fetch(self, run: Sequence[tuple[Digest, Packed]], writer: TreeWriter, stop: threading.Event) -> None:
        """Read a stretch of one object and write the contents in it."""
        first, last = run[0][1], run[-1][1]
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        at = first.offset
        try:
            with self._store.open(first.key, at, last.offset + last.size_bytes - at) as stream:
                for digest, packed in run:
                    for _ in _chunks(stream, packed.offset - at, buffer, stop):
                        pass  # a content that is not wanted
                    writer.write(digest, _chunks(stream, packed.size_bytes, buffer, stop))
                    at = packed.offset + packed.size_bytes
        except BlobNotFoundError as exc:
            raise TreeLostError(run[0][0], str(exc)) from exc
        except DigestMismatchError as exc:
            raise TreeLostError(exc.expected, str(exc)) from exc


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of the driver that is to be sent."""

    digest: Digest
    path: Path
    #: When it was looked at for packing.
    size_bytes: int

    def chunks(self, chunk_bytes: int, stop: threading.Event) -> Iterator[bytes]:
        """Yield its content, none for an empty one; after the last chunk, it was the content of its digest.

        Raises:
            FileChangedError: it isn't.
            ScanError: it can't be read.
        """
        hashed, left = hashlib.sha256(), self.size_bytes
        with _reading(self.path), self.path.open("rb") as file:
            while chunk := file.read(min(chunk_bytes, left + 1)):
                if stop.is_set():
                    raise StoppedError
                hashed.update(chunk)
                left -= len(chunk)
                if left < 0:
                    break  # it has grown
                if left == 0 and f"sha256:{hashed.hexdigest()}" != self.digest:
                    break
                yield chunk
        if left or f"sha256:{hashed.hexdigest()}" != self.digest:
            raise FileChangedError(str(self.path), self.digest)


def part_bytes_of(size_bytes: int) -> int:
    """Return how long the parts of a content are, but for the last, that has an object of its own."""
    return max(PACK_BYTES, -(-size_bytes // _MAX_PARTS))


def packs(paths: Mapping[Digest, Path]) -> Iterator[list[LocalFile]]:
    """Yield files by what is packed together, in their order: files of one directory are read together, too."""
    pack: list[LocalFile] = []
    room = PACK_BYTES
    for digest, path in paths.items():
        with _reading(path):
            file = LocalFile(digest, path, path.stat().st_size)
        if file.size_bytes > PACK_BYTES:
            yield [file]
            continue
        if file.size_bytes > room:
            yield pack
            pack, room = [], PACK_BYTES
        pack.append(file)
        room -= file.size_bytes
    if pack:
        yield pack


def _runs(records: Mapping[Digest, Packed]) -> Iterator[list[tuple[Digest, Packed]]]:
    """Yield contents by what is read with one request: neighbours in one object, as far as a pack is long."""
    run: list[tuple[Digest, Packed]] = []
    for digest, packed in sorted(records.items(), key=lambda item: (item[1].key, item[1].offset)):
        if run:
            first, last = run[0][1], run[-1][1]
            if packed.key != first.key or packed.offset - last.offset - last.size_bytes > _GAP_BYTES:
                yield run
                run = []
        run.append((digest, packed))
    if run:
        yield run


def _chunks(stream: ByteStream, size_bytes: int, buffer: memoryview, stop: threading.Event) -> Iterator[memoryview]:
    """Yield the next bytes of a stream, in views of *buffer* that hold until the next one."""
    left = size_bytes
    while left:
        if stop.is_set():
            raise StoppedError
        count = stream.readinto(buffer[: min(left, len(buffer))])
        if count == 0:
            return  # the object is too short: the digest won't be right
        left -= count
        yield buffer[:count]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ScanError(str(path), exc.strerror or str(exc)) from exc


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks that stand or fall together; raises the first error alone."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
