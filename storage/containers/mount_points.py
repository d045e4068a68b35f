"""Mount points in a root that are made for a container and gone after it, as BuildKit's ``MountStubsCleaner`` does.

Neither making nor removing them shows: the directories they are in keep their times.
"""

# Names of files are bytes here, which pathlib can't hold.

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from storage.file_ops.paths import Target, find
from storage.snapshots.names import join


class MountPoints:
    """The mount points made in one root."""

    def __init__(self, target: Target) -> None:
        self._target = target
        #: What was made: paths in the root, those above first.
        self._made: list[bytes] = []

    def make(self, path: str, *, is_directory: bool) -> None:
        """Make an empty file or directory at *path*, and directories above it, where they are missing.

        Raises:
            OSError: a file is in the way.
        """
        found = find(self._target.tree, path)
        if found.node is not None:
            return
        parts = found.relative.split(b"/")
        above = b""
        for index, name in enumerate(parts):
            with self._target.directory(above) as fd, _unseen(fd):
                above = join(above, name)
                try:
                    if is_directory or index < len(parts) - 1:
                        os.mkdir(name, 0o755, dir_fd=fd)
                    else:
                        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd))
                except FileExistsError:
                    continue
            self._made.append(above)

    def remove(self) -> None:
        """Remove those that are still empty; what a command has put something in stays."""
        while self._made:
            above, _, name = self._made.pop().rpartition(b"/")
            try:
                with self._target.directory(above) as fd, _unseen(fd):
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        os.rmdir(name, dir_fd=fd)
                    elif stat.S_ISREG(status.st_mode) and not status.st_size:
                        os.unlink(name, dir_fd=fd)
            except OSError:
                # Not empty, or replaced by the command: its own now.
                continue


@contextmanager
def _unseen(fd: int) -> Iterator[None]:
    """Give a directory its times back."""
    before = os.fstat(fd)
    try:
        yield
    finally:
        os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
