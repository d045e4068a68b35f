"""What a container needs beside its root, in memory and never on a disk: configuration, secrets, resolver files."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cluster.errors import ContainerError

_TIMEOUT_S: Final = 30.0


class Bundle:
    """A directory in memory, for one container. A context manager; blocks.

    Its lock file says that it is in use: it is held until the end, and let go of by the kernel if this
    process dies.

    Args:
        home: Where bundles are; a directory of ours.
        container: Its ID.
    """

    def __init__(self, home: Path, container: str) -> None:
        self.path = home / container
        self._lock_path = home / f"{container}.lock"
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.mkdir(mode=0o700)
            # Not tmpfs: that may be swapped out to a disk.
            _run(["mount", "-t", "ramfs", "-o", "mode=700,nosuid,nodev,noexec", "ramfs", str(self.path)])
        except BaseException as exc:
            self._leave()
            if isinstance(exc, OSError):
                raise ContainerError("preparing a container", str(exc)) from exc
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        remove(self.path)
        self._lock_path.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)

    def write(self, name: str, text: str, *, mode: int = 0o600) -> Path:
        """Write a file; return its path."""
        path = self.path / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        path.chmod(mode)
        return path


def remove(path: Path) -> None:
    """Unmount and remove a bundle's directory, which may be half made.

    Raises:
        ContainerError: the kernel refused.
    """
    if path.is_mount():
        # Lazily: it is out of sight at once, and its memory is free when its last user is gone.
        _run(["umount", "--lazy", str(path)])
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise ContainerError(f"removing {path}", str(exc)) from exc


def abandoned(home: Path, known: Iterable[str]) -> list[str]:
    """Return the containers, of those that are *known* or have bundles, whose lock nobody holds."""
    found: set[str] = set()
    for container in {entry.name.removesuffix(".lock") for entry in home.iterdir()} | set(known):
        lock = os.open(home / f"{container}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        found.add(container)
    return sorted(found)


def forget(home: Path, container: str) -> None:
    """Remove an abandoned container's bundle."""
    remove(home / container)
    (home / f"{container}.lock").unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603  # mount(8)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ContainerError(" ".join(command), str(exc)) from exc
    if done.returncode:
        raise ContainerError(" ".join(command), done.stderr.strip() or f"{command[0]} failed")
