"""Locks between commands, on files of their own, waited for with a deadline: the kernel drops them with their holder.

Locks on directories, which are waited for however long it takes: :mod:`storage.snapshots.locks`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError

_POLL_S = 0.05


@contextmanager
def locked_file(path: Path, *, deadline_s: float, too_late: ClusterError) -> Iterator[None]:
    """Hold the lock of *path*, made where it is missing; raise *too_late* where another holds it for *deadline_s*."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up_at = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() >= give_up_at:
                    raise too_late from exc
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)
