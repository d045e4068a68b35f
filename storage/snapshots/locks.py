"""Locks between processes, on files and directories: the kernel drops them with their holder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path, how: int) -> Iterator[None]:
    """Hold the lock of *directory*, shared or alone (``fcntl.LOCK_SH``, ``LOCK_EX``); between threads too."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def lock_in_place(path: Path, how: int) -> int | None:
    """Lock what is at *path* for as long as the returned descriptor is open; None where nothing is there.

    What was moved away, or replaced, while this waited for it is not what is meant: whoever is there then is locked.

    Raises:
        BlockingIOError: *how* has ``LOCK_NB``, and another holds it.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, how)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def mark_used(path: Path) -> None:
    """Set the modification time of *path* to now: by a clock that tells any two uses apart.

    The kernel's own for files moves on some hundred times a second. A link is marked itself.
    """
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns), follow_symlinks=False)


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds the lock of what is at *path*, shared or alone."""
    try:
        fd = lock_in_place(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    if fd is not None:
        os.close(fd)
    return False


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
