"""Directories of cache mounts: on this node, by ID, outliving the commands that use them."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from cluster.errors import ContainerError
from cluster.graph import CacheMount, Sharing

_POLL_S: Final = 0.05


class Caches:
    """The cache directories below *root*. Locks hold between processes, and go with the process that has them.

    Shared and locked mounts of an ID use one directory: shared ones together, locked ones alone. Private
    ones use others, each alone, and make a new one where all are in use.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @asynccontextmanager
    async def use(self, mount: CacheMount) -> AsyncIterator[Path]:
        """Lend the directory for *mount*, waiting for whoever has it alone; the caller has the deadline.

        Raises:
            ContainerError: it can't be made.
        """
        home = self._root / hashlib.sha256(mount.id.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        with _naming(mount):
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            path, lock = await self._lock(home, mount.sharing)
        try:
            with _naming(mount):
                _make(path, mount)
            yield path
        finally:
            os.close(lock)

    async def _lock(self, home: Path, sharing: Sharing) -> tuple[Path, int]:
        kind = fcntl.LOCK_SH if sharing is Sharing.SHARED else fcntl.LOCK_EX
        is_private = sharing is Sharing.PRIVATE
        slot = 1 if is_private else 0
        while True:
            lock = _try_lock(home / f"{slot}.lock", kind)
            if lock is not None:
                return home / str(slot), lock
            if is_private:
                slot += 1
            else:
                # Not flock's own wait: a thread in that can't be called off.
                await asyncio.sleep(_POLL_S)


@contextmanager
def _naming(mount: CacheMount) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ContainerError(f"using cache {mount.id!r}", str(exc)) from exc


def _try_lock(path: Path, kind: int) -> int | None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _make(path: Path, mount: CacheMount) -> None:
    """Make the directory with the owner and mode asked for; one that is there keeps its own."""
    if path.is_dir():
        return
    # Under another name first: one that is there is complete.
    new = path.with_name(f"{path.name}.{os.getpid()}.{id(mount)}.new")
    new.mkdir(mode=0o700)
    new.chmod(mount.mode & 0o7777)
    os.chown(new, mount.uid, mount.gid)
    try:
        new.rename(path)
    except OSError:
        new.rmdir()
        if not path.is_dir():
            raise
