"""The nodes' directories on one machine: held while their workers live, removed some time after nobody holds them.

``NODES/NAME/lock`` is locked, shared, by each of the node's workers for as long as it lives. A directory without that
file was made by a release that knew no such lock, and is left alone.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from cluster.errors import ClusterError
from storage.containers.runc import Runc
from storage.snapshots.kernel import unmount_below
from storage.snapshots.locks import lock_in_place
from storage.snapshots.store import remove_tree

_log = structlog.get_logger(__name__)

_LOCK: Final = "lock"


def hold_node_root(root: Path) -> int:
    """Make a node's directory and hold it until this process ends, or the returned descriptor is closed. Blocks.

    It waits for one that is being removed as a dead node's.
    """
    while True:
        root.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it went again
            (root / _LOCK).touch(mode=0o600)
        lock = lock_in_place(root / _LOCK, fcntl.LOCK_SH)
        if lock is not None:
            return lock


class DeadNodes:
    """Removes the directories of nodes that are gone from this machine: of a smaller ``up --nodes``.

    Args:
        own: The directory of the node that this is a worker of; the others are beside it.
        grace_s: Seconds for which a directory must have been seen free, time and again: its node may be starting.
        clock: Monotonic seconds.
    """

    def __init__(self, own: Path, *, grace_s: float, clock: Callable[[], float]) -> None:
        self._own = own
        self._grace_s = grace_s
        self._clock = clock
        #: Since when a directory has been free, as far as was seen.
        self._free_since_s: dict[str, float] = {}

    def sweep(self) -> list[str]:
        """Remove what is due; return the names. Blocks. What can't be removed is tried again by the next sweep."""
        free: dict[str, float] = {}
        removed: list[str] = []
        for path in sorted(self._own.parent.iterdir()):
            if path == self._own:
                continue
            try:
                lock = lock_in_place(path / _LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, NotADirectoryError):
                continue
            if lock is None:
                continue
            try:
                free[path.name] = self._free_since_s.get(path.name, self._clock())
                if self._clock() - free[path.name] >= self._grace_s:
                    _remove(path)
                    removed.append(path.name)
            except (OSError, ClusterError) as exc:
                _log.warning("node.unremoved", node=path.name, error=str(exc), error_type=type(exc).__name__)
            finally:
                os.close(lock)
        self._free_since_s = {name: since_s for name, since_s in free.items() if name not in removed}
        return removed


def _remove(root: Path) -> None:
    """Remove a node's directory, whose lock this process has; the lock last: until then it is found again."""
    Runc(root / "containers").recover()
    unmount_below(root)
    for path in root.iterdir():
        if path.is_symlink() or not path.is_dir():
            if path.name != _LOCK:
                path.unlink()
        else:
            remove_tree(path)
    (root / _LOCK).unlink()
    root.rmdir()
