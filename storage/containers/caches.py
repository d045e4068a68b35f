"""Directories of cache mounts: on this node, by ID, outliving the commands that use them.

::

    ROOT/HOME/id        the cache's ID; HOME is made of it
              N         a directory of it: 0 for shared and locked mounts, others for private ones
              N.lock    locked by who has N; modified when N was last in use. It stays when N is removed
              N.size    what N took, when it was last measured, and of which use that was
              N.….new   N, being made under the lock
              N.….gone  N, being removed
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from cluster.collect.node_stock import CacheState
from cluster.errors import ContainerError
from cluster.graph import CacheMount, Sharing
from storage.disk_usage import kept_disk_bytes
from storage.snapshots.locks import is_locked
from storage.snapshots.store import remove_tree

_POLL_S: Final = 0.05
_SLOT: Final = re.compile(r"\d+\Z", re.ASCII)


class Caches:
    """The cache directories below *root*. Locks hold between processes, and go with the process that has them.

    Shared and locked mounts of an ID use one directory: shared ones together, locked ones alone. Private
    ones use others, each alone, and make a new one where all are in use.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def of_node(cls, containers: Path) -> Caches:
        """Return those of a node, by its directory of containers."""
        return cls(containers / "caches")

    @asynccontextmanager
    async def use(self, mount: CacheMount) -> AsyncIterator[Path]:
        """Lend the directory for *mount*, waiting for whoever has it alone; the caller has the deadline.

        Raises:
            ContainerError: it can't be made.
        """
        home = self._root / hashlib.sha256(mount.id.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        with _naming(mount):
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            (home / "id").write_text(mount.id, encoding="utf-8", errors="surrogateescape")
            path, lock = await self._lock(home, mount.sharing)
        try:
            with _naming(mount):
                _make(path, mount)
            yield path
        finally:
            # What was written to it until now is to be measured anew.
            with suppress(OSError):
                os.utime(lock)
            os.close(lock)

    def states(self) -> list[CacheState]:
        """Return the directories that there are; measures those that were used since they were measured last. Blocks.

        Raises:
            ContainerError: the disk refused.
        """
        try:
            return [state for path in self._slots() if (state := _state(path)) is not None]
        except OSError as exc:
            raise ContainerError(f"looking at caches in {self._root}", str(exc)) from exc

    def remove(self, name: str) -> str:
        """Remove the directory that a state names, unless a command has it. Blocks.

        Returns:
            "" if it is gone, else why it stays.

        Raises:
            ContainerError: the disk refused.
        """
        path = self._root / name
        gone = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.gone")
        try:
            lock = _try_lock(_lock_of(path), fcntl.LOCK_EX)
            if lock is None:
                return "a command uses it"
            try:
                with suppress(FileNotFoundError):
                    path.rename(gone)
            finally:
                os.close(lock)
            remove_tree(gone)
        except FileNotFoundError:
            return ""
        except OSError as exc:
            raise ContainerError(f"removing cache {name}", str(exc)) from exc
        return ""

    def recover(self) -> list[str]:
        """Remove what killed processes left half made or half removed; return what. Blocks.

        Raises:
            ContainerError: the disk refused.
        """
        removed: list[str] = []
        try:
            for path in [*self._root.glob("*/*.gone"), *self._root.glob("*/*.new")]:
                lock = _try_lock(_lock_of(path.with_name(path.name.partition(".")[0])), fcntl.LOCK_EX)
                if lock is not None:  # nobody makes or removes it
                    try:
                        remove_tree(path)
                    finally:
                        os.close(lock)
                    removed.append(f"caches/{path.parent.name}/{path.name}")
        except OSError as exc:
            raise ContainerError(f"recovering caches in {self._root}", str(exc)) from exc
        return removed

    def _slots(self) -> list[Path]:
        return sorted(path for path in self._root.glob("*/*") if _SLOT.match(path.name))

    async def _lock(self, home: Path, sharing: Sharing) -> tuple[Path, int]:
        kind = fcntl.LOCK_SH if sharing is Sharing.SHARED else fcntl.LOCK_EX
        is_private = sharing is Sharing.PRIVATE
        slot = 1 if is_private else 0
        while True:
            lock = _try_lock(_lock_of(home / str(slot)), kind)
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


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _state(path: Path) -> CacheState | None:
    """Return what is known of a directory; None where it is gone meanwhile."""
    lock = _lock_of(path)
    try:
        used_ns = lock.stat().st_mtime_ns
        return CacheState(
            name=f"{path.parent.name}/{path.name}",
            id=_id_of(path.parent),
            size_bytes=kept_disk_bytes(path, path.with_name(f"{path.name}.size"), str(used_ns)),
            last_used_ns=used_ns,
            is_locked=is_locked(lock),
        )
    except FileNotFoundError:
        return None


def _id_of(home: Path) -> str:
    try:
        return (home / "id").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # of a release that didn't note it
        return ""


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
    os.utime(lock)
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
