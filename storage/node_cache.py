"""The node's blobs on disk: content-addressed, capped in size, shared by everything on the node.

``sha256/HEX`` holds whole, verified blobs; ``staging/`` holds what is arriving. A blob gets its name by a
rename once its bytes have hashed to its digest, so a killed process leaves only staging files, which
:meth:`NodeCache.recover` removes once their owner is gone (each holds a lock on its file while it lives).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.digest import Digest, hex_of
from cluster.errors import ClusterError, InternalError, UnavailableError

#: Bytes that stay free on the disk, whatever the cache may use: logs and Redis live there too.
_KEEP_FREE_BYTES = 256 * 1024**2
_READ_TIMEOUT_S = 600.0


class StagingFile:
    """A blob that is arriving: written at any offset, readable from its start up to the frontier."""

    def __init__(self, path: Path, digest: Digest, size_bytes: int, publish: Callable[[Path, Digest], None]) -> None:
        self._path = path
        self._digest = digest
        self._size_bytes = size_bytes
        self._publish = publish
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._changed = threading.Condition()
        self._frontier = 0
        self._error: ClusterError | None = None
        self._is_ended = False
        self._on_end: list[Callable[[ClusterError | None], object]] = []

    def __repr__(self) -> str:
        return f"<StagingFile {self._digest} {self._frontier}/{self._size_bytes}>"

    @property
    def size_bytes(self) -> int:
        """Return the blob's size."""
        return self._size_bytes

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*.

        Raises:
            UnavailableError: the disk refuses.
        """
        try:
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as exc:
            raise UnavailableError(f"disk of {self._path.parent}", exc.strerror or str(exc)) from exc

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* from what was written at *offset*."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._fd, [buffer[filled:]], offset + filled)
            if not count:
                raise InternalError(f"staging of {self._digest} is read at {offset + filled}, where nothing is")
            filled += count

    def advance(self, frontier: int) -> None:
        """Say that every byte before *frontier* is written: readers may go on."""
        with self._changed:
            self._frontier = frontier
            self._changed.notify_all()

    def fail(self, error: ClusterError) -> None:
        """Say that the rest won't come; readers get *error*."""
        with self._changed:
            if self._error is None and not self._is_ended:
                self._error = error
            self._changed.notify_all()

    def publish(self) -> None:
        """Keep the file under its digest: its bytes are whole and hash to it."""
        self.advance(self._size_bytes)
        self._publish(self._path, self._digest)
        self._end(None)

    def discard(self) -> None:
        """Drop the file; does nothing once it has ended."""
        if self._is_ended:
            return
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self.fail(UnavailableError(f"blob {self._digest}", "its fetch was given up"))
        self._end(self._error)

    def on_end(self, call: Callable[[ClusterError | None], object]) -> None:
        """Call *call* once, with None after :meth:`publish`, else with the error."""
        with self._changed:
            if not self._is_ended:
                self._on_end.append(call)
                return
        call(self._error)

    def open_reader(self) -> StagingReader:
        """Read from the start; the reader has a descriptor of its own, so an eviction doesn't disturb it."""
        return StagingReader(self, os.dup(self._fd))

    def wait_beyond(self, offset: int) -> int:
        """Block until bytes beyond *offset* may be read; return the frontier, or the size at the end."""
        with self._changed:
            while self._frontier <= offset < self._size_bytes:
                if self._error is not None:
                    raise self._error
                if not self._changed.wait(_READ_TIMEOUT_S):
                    raise UnavailableError(f"blob {self._digest}", f"nothing arrived in {_READ_TIMEOUT_S:.0f} s")
            if self._error is not None:
                raise self._error
            return self._frontier

    def _end(self, error: ClusterError | None) -> None:
        with self._changed:
            if self._is_ended:
                return
            self._is_ended = True
            calls, self._on_end = self._on_end, []
            self._changed.notify_all()
        os.close(self._fd)
        for call in calls:
            call(error)


class StagingReader:
    """A :class:`cluster.ports.ByteStream` over an arriving blob."""

    def __init__(self, staging: StagingFile, fd: int) -> None:
        self._staging = staging
        self._fd = fd
        self._offset = 0
        self._lock = threading.Lock()

    def readinto(self, buffer: memoryview) -> int:
        """Read what is there, waiting until something is; 0 at the end."""
        frontier = self._staging.wait_beyond(self._offset)
        count = min(len(buffer), frontier - self._offset)
        if not count:
            return 0
        with self._lock:
            if self._fd < 0:
                raise UnavailableError("blob", "its reader was closed")
            count = os.preadv(self._fd, [buffer[:count]], self._offset)
        self._offset += count
        return count

    def close(self) -> None:
        """Close; a read under way ends with an error or the end."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class FileReader:
    """A :class:`cluster.ports.ByteStream` over a whole file."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "rb", buffering=0)

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        return self._file.readinto(buffer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NodeCache:
    """The node's cache of compressed blobs. Thread-safe; several processes may share one directory."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._blobs = root / "sha256"
        self._staging = root / "staging"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"<NodeCache {self._blobs.parent}>"

    def open(self, digest: Digest) -> FileReader | None:
        """Open a whole blob for reading, and mark it used; None where it isn't here."""
        path = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return FileReader(fd)

    def has(self, digest: Digest) -> bool:
        """Tell whether a whole blob is here."""
        return self._path(digest).exists()

    def staging(self, digest: Digest, size_bytes: int) -> StagingFile:
        """Make a staging file, with room on the disk for all of it.

        Raises:
            UnavailableError: the disk is too full, also after older blobs were evicted.
        """
        self._make_room(size_bytes)
        return StagingFile(
            self._staging / f"{hex_of(digest)}.{secrets.token_hex(6)}", digest, size_bytes, self._publish
        )

    def evict(self, wanted_bytes: int) -> int:
        """Remove the least recently used blobs until *wanted_bytes* are freed; return how many were.

        Who reads a blob keeps its bytes: its descriptor outlives the name.
        """
        freed = 0
        for _used_s, size, path in sorted(self._entries()):
            if freed >= wanted_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                freed += size
        return freed

    def used_bytes(self) -> int:
        """Return how many bytes the whole blobs have."""
        return sum(size for _used_s, size, _path in self._entries())

    def recover(self) -> list[str]:
        """Remove staging files whose process is gone; return their names."""
        removed = []
        for path in list(self._staging.iterdir()):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its owner lives
                    path.unlink()
                    removed.append(path.name)
                finally:
                    os.close(fd)
        return removed

    def _publish(self, path: Path, digest: Digest) -> None:
        path.replace(self._path(digest))
        with self._lock:
            over = self.used_bytes() - self._max_bytes
            if over > 0:
                self.evict(over)

    def _make_room(self, size_bytes: int) -> None:
        with self._lock:
            lacking = size_bytes + _KEEP_FREE_BYTES - shutil.disk_usage(self._staging).free
            if lacking > 0 and self.evict(lacking) < lacking:
                raise UnavailableError(
                    f"disk of {self._staging}", f"{lacking} bytes are lacking for a blob of {size_bytes} bytes"
                )

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for entry in os.scandir(self._blobs):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                yield status.st_mtime, status.st_size, Path(entry.path)

    def _path(self, digest: Digest) -> Path:
        return self._blobs / hex_of(digest)
