"""Locks between processes, on directories: the kernel drops them with their holder."""

from __future__ import annotations

import fcntl
import os
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
