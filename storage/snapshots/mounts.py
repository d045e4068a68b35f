"""Read-only mounts by name, and what of them is left after a crash."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.collect.node_stock import MountState
from cluster.digest import Digest
from cluster.errors import SnapshotError
from storage.snapshots.kernel import mount_overlay, mount_points, run_mount, unmount, unmount_idle
from storage.snapshots.locks import locked, mark_used

__all__ = ["Mounts", "check_name", "mount_points"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,199}\Z")


def check_name(name: str) -> str:
    """Return *name* if it can name a mount.

    Raises:
        SnapshotError: it can't.
    """
    if _NAME.match(name) is None:
        raise SnapshotError(name, "mounting", "a mount's name has letters, digits and _.:@+- only, at most 200")
    return name


class Mounts:
    """The mounts of one snapshotter: ``mnt/NAME``, and which chain it shows in ``mounted/NAME``."""

    def __init__(self, root: Path) -> None:
        # The mount table has real paths.
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root = root.resolve()
        self._points = self._root / "mnt"
        self._chains = self._root / "mounted"
        self._empty = self._root / "empty"
        for directory in (self._points, self._chains, self._empty):
            directory.mkdir(exist_ok=True, mode=0o755)

    def mount(self, name: str, chain: Digest, directory: Path, layers: Sequence[str]) -> Path:
        """Mount *layers* (uppermost first, relative to *directory*) as *chain* under *name*; idempotent.

        Raises:
            SnapshotError: the kernel refused, or the name is taken by another chain.
        """
        point = self._points / check_name(name)
        with locked(self._chains, fcntl.LOCK_EX):
            self._mount(name, point, chain, directory, layers)
        return point

    def _mount(self, name: str, point: Path, chain: Digest, directory: Path, layers: Sequence[str]) -> None:
        if point in mount_points():
            if self._chain_of(name) != chain:
                raise SnapshotError(chain, "mounting", f"{name} is mounted already, of another snapshot")
            mark_used(self._chains / name)
            return
        point.mkdir(exist_ok=True, mode=0o755)
        # Before the mount: a mount without it could not be told from another chain's.
        (self._chains / name).write_text(chain)
        if len(layers) > 1:
            options = ["ro", "redirect_dir=nofollow", "metacopy=off", f"lowerdir={':'.join(layers)}"]
            mount_overlay(chain, "overlay", point, directory, options)
        else:
            source = directory / layers[0] if layers else self._empty
            run_mount(chain, "mounting", ["mount", "-o", "bind,ro", str(source), str(point)], directory)

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`. A busy mount disappears from sight at once and goes when its last user does."""
        point = self._points / check_name(name)
        with locked(self._chains, fcntl.LOCK_EX):
            while point in mount_points():
                unmount(name, point)
            self._forget(name)

    def unmount_idle(self, name: str, *, last_used_ns: int) -> str:
        """Undo a mount unless it was asked for since, or a process is in it; return "", or why it stays."""
        point = self._points / check_name(name)
        with locked(self._chains, fcntl.LOCK_EX):
            found = self._look(name)
            if found is None:
                return ""
            if found.last_used_ns != last_used_ns:
                return "it was mounted again meanwhile"
            while point in mount_points():
                try:
                    unmount_idle(name, point)
                except SnapshotError as exc:
                    return exc.reason
            self._forget(name)
        return ""

    def mounted(self) -> list[MountState]:
        """Return the live mounts whose chain is known."""
        points = mount_points()
        found = (self._look(path.name) for path in sorted(self._points.iterdir()) if path in points)
        return [each for each in found if each is not None]

    def _look(self, name: str) -> MountState | None:
        chain = self._chain_of(name)
        if chain is None:
            return None
        try:
            used_ns = (self._chains / name).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        return MountState(name=name, chain=chain, last_used_ns=used_ns)

    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name."""
        points = mount_points()
        return {
            path.name: path for path in sorted(self._points.iterdir()) if path in points and self._chain_of(path.name)
        }

    def chains(self) -> dict[str, Digest | None]:
        """Return of which chain each live mount is; None where that isn't known."""
        points = mount_points()
        return {path.name: self._chain_of(path.name) for path in sorted(self._points.iterdir()) if path in points}

    def recover(self) -> list[str]:
        """Forget names without a mount; return them."""
        with locked(self._chains, fcntl.LOCK_EX):
            points = mount_points()
            names = {path.name for path in (*self._points.iterdir(), *self._chains.iterdir())}
            removed = [name for name in sorted(names) if self._points / name not in points]
            for name in removed:
                self._forget(name)
        return [f"mnt/{name}" for name in removed]

    def _chain_of(self, name: str) -> Digest | None:
        try:
            return Digest((self._chains / name).read_text()) or None
        except FileNotFoundError:
            return None

    def _forget(self, name: str) -> None:
        point = self._points / name
        if point.is_dir():
            point.rmdir()
        (self._chains / name).unlink(missing_ok=True)
