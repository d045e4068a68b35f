"""A node's cache of compressed blobs: files by digest, capped in size, least recently used out first.

    ROOT/blobs/<hex>       whole blobs; access time: last use; modification time: published, or verified
    ROOT/staging/<nonce>   blobs that are arriving, each locked by the process that writes it
    ROOT/lock              held while room is made and while staging files come and go

The disk is the truth: there is no index to be out of step with it, and several processes may share a cache.
A blob is published by a rename, so a killed process leaves whole blobs and staging files, no more; a staging
file whose lock is free has lost its writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import uuid4

from cluster.collect.node_stock import BlobState
from cluster.digest import Digest, hex_of
from cluster.errors import NodeDiskError
from storage.staging import StagingFile

#: Bytes of free disk that are never used: what else runs on the node must go on.
HEADROOM_BYTES = 256 * 1024**2

_OnClose = Callable[[], None]
#: Inode and modification time: an inode number alone is given to the next file.
FileIdentity = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCacheStatistics:
    """What is on the disk, and what this process has seen."""

    blobs: int
    blob_bytes: int
    staging_bytes: int
    max_bytes: int
    hits: int
    misses: int
    evicted: int


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    size_bytes: int
    used_ns: int


class NodeCache:
    """The blobs on this node's disk. Thread-safe, and safe between processes.

    Args:
        root: Its directory; made if missing.
        max_bytes: Blobs are evicted down to this before another arrives. What is arriving or being read at
            the time is never evicted, so that many big blobs at once may exceed it for as long.
        headroom_bytes: Bytes of free disk that must be left after a blob is given its room.
    """

    def __init__(self, root: Path, max_bytes: int, *, headroom_bytes: int = HEADROOM_BYTES) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._headroom_bytes = headroom_bytes
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(exist_ok=True)
        self._state_lock = threading.Lock()
        self._reading: Counter[str] = Counter()
        self._hits = 0
        self._misses = 0
        self._evicted = 0

    def __repr__(self) -> str:
        return f"NodeCache({str(self.root)!r}, {self.statistics()})"

    def path_of(self, digest: Digest) -> Path | None:
        """Return the path of a blob that is here, and mark it used; None where it is not.

        It may be evicted before the path is opened: :meth:`open` can't meet that. A blob written before the
        machine last started is verified first, because a power failure keeps names and loses bytes.
        """
        path = self._blobs / hex_of(digest)
        is_here = self._touch(digest, path)
        with self._state_lock:
            self._hits += is_here
            self._misses += not is_here
        return path if is_here else None

    def open(self, digest: Digest) -> CachedBlob | None:
        """Open a blob that is here, and keep it from being evicted until it is closed; None where it is not."""
        name = hex_of(digest)
        with self._state_lock:
            self._reading[name] += 1
        try:
            path = self.path_of(digest)
            if path is not None:
                return CachedBlob(os.open(path, os.O_RDONLY | os.O_CLOEXEC), lambda: self._stop_reading(name))
        except FileNotFoundError:
            pass  # evicted by another process just now
        except BaseException:
            self._stop_reading(name)
            raise
        self._stop_reading(name)
        return None

    def staging(self, digest: Digest, size_bytes: int) -> StagingFile:
        """Make room for a blob of *size_bytes* and return the file to write it to.

        Several for one digest at once are possible; each is whole by itself, and the last to be published
        replaces the same bytes.

        Raises:
            UnavailableError: the disk is too full, also after evicting all that may be.
        """
        with self._exclusively():
            self._make_room(size_bytes)
            path = self._staging / f"{hex_of(digest)[:16]}-{uuid4().hex}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if size_bytes:
                    os.posix_fallocate(fd, 0, size_bytes)
            except OSError as exc:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise self._too_full(size_bytes) from exc
        return StagingFile(fd, path, self._blobs / hex_of(digest), digest, size_bytes)

    def has(self, digest: Digest) -> bool:
        """Tell whether a blob is here, without using it."""
        return (self._blobs / hex_of(digest)).exists()

    def make_room(self, wanted_bytes: int) -> int:
        """Evict blobs, least recently used first, until so many bytes are freed; return how many are.

        Those that this process reads stay. What another reads may go: its bytes are free when it has read them.
        """
        freed = 0
        with self._exclusively():
            for entry in self._by_use():
                if freed >= wanted_bytes:
                    break
                freed += self._evict(entry)
        return freed

    def verify(self, digest: Digest, identity: FileIdentity | None = None) -> bool:
        """Read a blob and compare its digest; a damaged one is removed. Tell whether it is here and whole.

        Args:
            digest: Which blob.
            identity: The file that is meant, if it must be that one: False where another has taken its place.
        """
        path = self._blobs / hex_of(digest)
        try:
            with path.open("rb") as blob:
                if identity is not None and _identity(blob.fileno()) != identity:
                    return False
                if hashlib.file_digest(blob, "sha256").hexdigest() == hex_of(digest):
                    return True
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)
        return False

    def size_of(self, digest: Digest) -> int | None:
        """Return the length of a blob that is here, without marking it used; None where it is not."""
        try:
            return (self._blobs / hex_of(digest)).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, digest: Digest) -> None:
        """Remove a blob; who reads it reads on. Does nothing where there is none."""
        (self._blobs / hex_of(digest)).unlink(missing_ok=True)

    def recover(self) -> list[str]:
        """Remove staging files whose writer is gone; return their names. Live ones, of any process, stay."""
        removed = []
        with self._exclusively():
            for path in self._staging.iterdir():
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # published or discarded just now
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
                    removed.append(path.name)
                except BlockingIOError:
                    continue
                finally:
                    os.close(fd)
        return removed

    def states(self) -> list[BlobState]:
        """Return the blobs that are here."""
        return [
            BlobState(
                digest=Digest(f"sha256:{entry.path.name}"),
                size_bytes=entry.size_bytes,
                last_used_ns=entry.used_ns,
                is_read=self._is_read(entry.path.name),
            )
            for entry in _entries(self._blobs)
        ]

    def statistics(self) -> NodeCacheStatistics:
        """Return what is here now."""
        entries = list(_entries(self._blobs))
        with self._state_lock:
            return NodeCacheStatistics(
                blobs=len(entries),
                blob_bytes=sum(entry.size_bytes for entry in entries),
                staging_bytes=sum(entry.size_bytes for entry in _entries(self._staging)),
                max_bytes=self._max_bytes,
                hits=self._hits,
                misses=self._misses,
                evicted=self._evicted,
            )

    def _make_room(self, size_bytes: int) -> None:
        entries = self._by_use()
        held = sum(entry.size_bytes for entry in entries) + sum(entry.size_bytes for entry in _entries(self._staging))
        for entry in entries:
            is_capped = held + size_bytes > self._max_bytes
            if not is_capped and self._free_bytes() >= size_bytes:
                return
            held -= self._evict(entry)
        if self._free_bytes() < size_bytes:
            raise self._too_full(size_bytes)

    def _by_use(self) -> list[_Entry]:
        return sorted(_entries(self._blobs), key=lambda entry: entry.used_ns)

    def _evict(self, entry: _Entry) -> int:
        """Remove a blob unless it is being read; return the bytes that this frees."""
        if self._is_read(entry.path.name):
            return 0
        entry.path.unlink(missing_ok=True)
        with self._state_lock:
            self._evicted += 1
        return entry.size_bytes

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free - self._headroom_bytes

    def _too_full(self, size_bytes: int) -> NodeDiskError:
        free = max(0, self._free_bytes())
        return NodeDiskError(
            f"node cache {self.root}",
            f"a blob of {size_bytes:,} bytes doesn't fit: {free:,} bytes of disk are free beyond the "
            f"{self._headroom_bytes:,} kept in reserve",
        )

    def _is_read(self, name: str) -> bool:
        with self._state_lock:
            return self._reading[name] > 0

    def _stop_reading(self, name: str) -> None:
        with self._state_lock:
            self._reading[name] -= 1
            if self._reading[name] <= 0:
                del self._reading[name]

    def _touch(self, digest: Digest, path: Path) -> bool:
        try:
            if path.stat().st_mtime < _boot_time():
                if not self.verify(digest):
                    return False
                os.utime(path)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Hold the cache's lock; held for a directory listing or an eviction, never for a transfer."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class CachedBlob:
    """An open blob as a :class:`cluster.ports.ByteStream`; a context manager."""

    def __init__(self, fd: int, on_close: _OnClose) -> None:
        self._file = os.fdopen(fd, "rb", buffering=0)
        #: Which file it is, for :meth:`NodeCache.verify`.
        self.identity = _identity(fd)
        self._on_close: _OnClose | None = on_close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        return self._file.readinto(buffer) or 0

    def close(self) -> None:
        """Close it, and let it be evicted."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            self._file.close()
            on_close()


def _entries(directory: Path) -> Iterator[_Entry]:
    with os.scandir(directory) as found:
        for item in found:
            try:
                stat = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield _Entry(Path(item.path), stat.st_size, stat.st_atime_ns)


def _identity(fd: int) -> FileIdentity:
    stat = os.fstat(fd)
    return stat.st_ino, stat.st_mtime_ns


def _boot_time() -> float:
    """Return when the machine started, by its wall clock; a clock that is set only causes a verification more."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
