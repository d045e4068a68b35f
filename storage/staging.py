"""A blob while it arrives on a node: one file, written by who fetches it and read behind them by who unpacks it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self

from cluster.digest import Digest
from cluster.errors import BlobDamagedError, ClusterError, DeadlineExceededError, NodeDiskError, UnavailableError

#: Seconds without a byte until a reader gives up.
STALL_S = 120.0


class StagingFile:
    """A blob while it arrives: written anywhere by one or several threads, read in order behind them.

    The writer says with :meth:`advance` up to where the bytes are whole *and good*; readers never see beyond
    that. It ends by :meth:`publish` or :meth:`discard`, once; readers that are open go on after either. As a
    context manager it discards what was not published.
    """

    def __init__(self, fd: int, path: Path, target: Path, digest: Digest, size_bytes: int) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self._fd = fd
        self._path = path
        self._target = target
        self._changed = threading.Condition()
        self._frontier = 0
        self._error: ClusterError | None = None
        self._is_ended = False

    def __repr__(self) -> str:
        return f"StagingFile({self.digest}, {self._frontier} of {self.size_bytes} bytes)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def frontier_bytes(self) -> int:
        """Return up to where readers may read."""
        with self._changed:
            return self._frontier

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*, all of it. Readers don't see it yet.

        Raises:
            UnavailableError: the disk refused.
        """
        if offset + data.nbytes > self.size_bytes:
            raise BlobDamagedError(self.digest, f"bytes beyond its size of {self.size_bytes}")
        view = data.cast("B")
        try:
            while view.nbytes:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as exc:
            raise NodeDiskError(f"node cache {self._path.parent.parent}", f"{exc.strerror}") from exc

    def pread(self, offset: int, buffer: memoryview) -> int:
        """Read back what was written at *offset*, the frontier notwithstanding; return how many bytes."""
        return os.preadv(self._fd, [buffer], offset)

    def advance(self, frontier_bytes: int) -> None:
        """Let readers read up to *frontier_bytes*, counted from the start; never goes back."""
        with self._changed:
            self._frontier = max(self._frontier, min(frontier_bytes, self.size_bytes))
            self._changed.notify_all()

    def fail(self, error: ClusterError) -> None:
        """Give readers *error* where they run out of bytes; the first one counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def open_reader(self, *, stall_s: float = STALL_S) -> StagingReader:
        """Open a reader from the start; it waits *stall_s* seconds at most for the next byte."""
        with self._changed:
            if self._is_ended:
                raise UnavailableError(f"staging file of {self.digest}", "it was published or discarded")
            return StagingReader(self, os.dup(self._fd), stall_s)

    def publish(self) -> Path:
        """Make it a blob of the cache and return its path; the bytes were all advanced over.

        Raises:
            BlobDamagedError: some bytes never came, or it failed; it is discarded.
            UnavailableError: the disk refused.
        """
        with self._changed:
            error, frontier = self._error, self._frontier
        if error is not None or frontier != self.size_bytes:
            self.discard()
            raise error or BlobDamagedError(self.digest, f"{frontier} of {self.size_bytes} bytes came")
        try:
            os.utime(self._path)
            self._path.rename(self._target)
        except OSError as exc:
            self.discard()
            raise NodeDiskError(f"node cache {self._path.parent.parent}", f"{exc.strerror}") from exc
        self._end()
        return self._target

    def discard(self) -> None:
        """Remove it unless it was published; readers that wait for more get an error."""
        with self._changed:
            if self._is_ended:
                return
        if self._frontier < self.size_bytes:
            self.fail(UnavailableError(f"staging file of {self.digest}", "it was discarded"))
        self._path.unlink(missing_ok=True)
        self._end()

    def wait_beyond(self, offset: int, stall_s: float) -> int:
        """Wait until readers may read beyond *offset*, or there is no more; return up to where they may.

        Raises:
            DeadlineExceededError: nothing came for *stall_s* seconds.
            ClusterError: what :meth:`fail` was given.
        """
        give_up_at = time.monotonic() + stall_s
        with self._changed:
            while self._frontier <= offset < self.size_bytes:
                if self._error is not None:
                    # A copy: each reader raises it in a thread of its own, with a traceback of its own.
                    raise type(self._error)(*self._error.args) from self._error
                left_s = give_up_at - time.monotonic()
                if left_s <= 0.0:
                    raise DeadlineExceededError(
                        f"blob {self.digest}", f"not a byte beyond {offset} of {self.size_bytes} for {stall_s:.0f} s"
                    )
                self._changed.wait(left_s)
            return self._frontier

    def _end(self) -> None:
        with self._changed:
            was_ended, self._is_ended = self._is_ended, True
        if not was_ended:
            os.close(self._fd)


class StagingReader:
    """Follows a :class:`StagingFile` from its start, as a :class:`cluster.ports.ByteStream`; a context manager."""

    def __init__(self, staging: StagingFile, fd: int, stall_s: float) -> None:
        self._staging = staging
        self._fd: int | None = fd
        self._stall_s = stall_s
        self._next = 0
        self._frontier = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes, waiting for at least one; 0 at the end of the blob."""
        if self._fd is None or self._next >= self._staging.size_bytes:
            return 0
        if self._next >= self._frontier:
            self._frontier = self._staging.wait_beyond(self._next, self._stall_s)
        count = os.preadv(self._fd, [buffer[: self._frontier - self._next]], self._next)
        self._next += count
        return count

    def close(self) -> None:
        """Close it."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
