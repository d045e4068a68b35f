"""What is asked of the kernel about mounts: which there are, overlays made, frozen and undone."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cluster.errors import SnapshotError

_TIMEOUT_S: Final = 30.0
#: Options of a mount(2) come in one page.
_PAGE_BYTES: Final = 4096
#: ``sys/mount.h``.
_MS_RDONLY: Final = 1
_MS_REMOUNT: Final = 32
#: How long the last writers of a mount may take to be gone: a killed process's files are closed a little later.
_QUIESCE_S: Final = 10.0
_QUIESCE_PAUSE_S: Final = 0.02
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def mount_points() -> set[Path]:
    """Return every mount point that this process sees."""
    return set(_mount_points())


def mounts_below(directory: Path) -> Iterator[tuple[Path, str]]:
    """Yield what is mounted at or under *directory*: where, and the line of the mount table, which says of what."""
    real = directory.resolve()
    for point, line in _mounts():
        if point.is_relative_to(real):
            yield point, line


def _mount_points() -> list[Path]:
    """Return the mount points in the order in which they were mounted; what is mounted twice is there twice."""
    return [point for point, _ in _mounts()]


def _mounts() -> list[tuple[Path, str]]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [(Path(_unescape(line.split(" ")[4])), line) for line in lines]


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mount_overlay(subject: str, source: str, point: Path, directory: Path, options: Sequence[str]) -> None:
    """Mount an overlay at *point*.

    Args:
        subject: What is mounted, for errors.
        source: What the mount table is to say of it.
        point: An empty directory.
        directory: What the paths in *options* are relative to: short names are what lets many layers fit.
        options: As mount(8) has them; ``lowerdir`` is among them.

    Raises:
        SnapshotError: the options are too long, or the kernel refused.
    """
    joined = ",".join(options)
    if len(joined) >= _PAGE_BYTES:
        layers = joined.count(":") + 1
        raise SnapshotError(subject, "mounting", f"{layers} layers are more than one overlay mount can have")
    run_mount(subject, "mounting", ["mount", "-t", "overlay", "-o", joined, source, str(point)], directory)


def run_mount(subject: str, doing: str, command: list[str], directory: Path) -> None:
    """Run mount(8) or umount(8) in *directory*.

    Raises:
        SnapshotError: it failed.
    """
    # Newer mount(8) passes options one by one, with 256 bytes each at most, unless told to use mount(2).
    environment = {**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"}
    try:
        done = subprocess.run(  # noqa: S603  # mount(8) and paths of our own
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise SnapshotError(subject, doing, str(exc)) from exc
    if done.returncode:
        raise SnapshotError(subject, doing, done.stderr.strip() or f"{command[0]} failed")


def unmount(subject: str, point: Path) -> None:
    """Undo the uppermost mount at *point*. A busy one disappears from sight now and goes when its last user does."""
    run_mount(subject, "unmounting", ["umount", "--lazy", "--no-canonicalize", str(point)], Path("/"))


def unmount_idle(subject: str, point: Path) -> None:
    """Undo the uppermost mount at *point*; SnapshotError where a process has a file or directory of it open."""
    run_mount(subject, "unmounting", ["umount", "--no-canonicalize", str(point)], Path("/"))


def unmount_below(directory: Path) -> None:
    """Undo every mount at or under *directory*, the last made first.

    Raises:
        SnapshotError: the kernel refused one: nothing under *directory* must be removed then.
    """
    for point, _ in reversed(list(mounts_below(directory))):
        unmount(str(point), point)


def freeze(subject: str, point: Path) -> None:
    """Make the file system mounted at *point* read-only, for whoever has it mounted.

    The kernel refuses as long as any process has a file of it open for writing, in any mount namespace: so
    once this returns, nobody writes to it any more.

    Raises:
        SnapshotError: somebody still writes to it after 10 s.
    """
    deadline = time.monotonic() + _QUIESCE_S
    while _LIBC.mount(None, os.fsencode(point), None, _MS_REMOUNT | _MS_RDONLY, None) != 0:
        code = ctypes.get_errno()
        if code != errno.EBUSY:
            raise SnapshotError(subject, "freezing", os.strerror(code))
        if time.monotonic() >= deadline:
            raise SnapshotError(subject, "freezing", "a process still has a file of it open for writing")
        time.sleep(_QUIESCE_PAUSE_S)
