"""Read-only mounts by name, and what of them is left after a crash."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.digest import Digest
from cluster.errors import SnapshotError
from storage.snapshots.locks import locked

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,199}\Z")
_TIMEOUT_S: Final = 30.0
#: Options of a mount(2) come in one page.
_PAGE_BYTES: Final = 4096


def check_name(name: str) -> str:
    """Return *name* if it can name a mount.

    Raises:
        SnapshotError: it can't.
    """
    if _NAME.match(name) is None:
        raise SnapshotError(name, "mounting", "a mount's name has letters, digits and _.:@+- only, at most 200")
    return name


def mount_points() -> set[Path]:
    """Return every mount point that this process sees."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return {Path(_unescape(line.split(" ")[4])) for line in lines}


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


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
            return
        point.mkdir(exist_ok=True, mode=0o755)
        # Before the mount: a mount without it could not be told from another chain's.
        (self._chains / name).write_text(chain)
        if len(layers) > 1:
            options = f"ro,redirect_dir=nofollow,metacopy=off,lowerdir={':'.join(layers)}"
            if len(options) >= _PAGE_BYTES:
                raise SnapshotError(chain, "mounting", f"{len(layers)} layers are more than one overlay mount can have")
            command = ["mount", "-t", "overlay", "-o", options, "overlay", str(point)]
        else:
            source = directory / layers[0] if layers else self._empty
            command = ["mount", "-o", "bind,ro", str(source), str(point)]
        # The working directory is what lets the layers have short names. Newer mount(8) passes options one by
        # one, with 256 bytes each at most, unless told to use mount(2).
        self._run(chain, "mounting", command, directory, {**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`. A busy mount disappears from sight at once and goes when its last user does."""
        point = self._points / check_name(name)
        with locked(self._chains, fcntl.LOCK_EX):
            while point in mount_points():
                self._run(name, "unmounting", ["umount", "--lazy", "--no-canonicalize", str(point)], self._root, None)
            self._forget(name)

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

    def _run(self, subject: str, doing: str, command: list[str], cwd: Path, env: dict[str, str] | None) -> None:
        try:
            done = subprocess.run(  # noqa: S603  # mount(8) and paths of our own
                command, cwd=cwd, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise SnapshotError(subject, doing, str(exc)) from exc
        if done.returncode:
            raise SnapshotError(subject, doing, done.stderr.strip() or f"{command[0]} failed")
