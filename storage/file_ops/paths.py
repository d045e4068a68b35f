"""Paths of a tree, resolved as if its root were ``/``: no symlink leads out of it.

Nothing here lets the kernel follow a link. Reading goes through :class:`storage.snapshots.tree.Node`, which
looks at one component at a time; writing goes through descriptors of directories, opened one component at a
time with ``O_NOFOLLOW``. The trees must not change meanwhile but through their one user.

What is wrong with a path is an OSError, as the kernel would raise it: the action that needed the path says
which it was.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH115

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cluster.tree import MTIME_S
from storage.snapshots.attributes import Attributes, AttributeWriter, Ledger
from storage.snapshots.names import MAX_PATH_BYTES, join, shown, split
from storage.snapshots.tree import Node, Tree

#: Symlinks that are followed on the way to one path, as in Linux.
_MAX_LINKS: Final = 40
#: When everything that an op on files makes itself was last changed, directories that it puts something into as well:
#: the same op over the same files comes to the same files, whenever and wherever.
MADE_NS: Final = MTIME_S * 1_000_000_000
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def directory_tree(path: Path) -> Tree:
    """Return a plain directory, a mounted snapshot say, as a tree."""
    return Tree([os.fsencode(path)])


def components(path: str | bytes) -> list[bytes]:
    """Return the components of *path* from the root, cleaned without looking at any file.

    Raises:
        OSError: it has a zero byte or is too long.
    """
    name = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    if b"\0" in name or len(name) > MAX_PATH_BYTES:
        raise OSError(errno.EINVAL, "a zero byte in the path" if b"\0" in name else "the path is too long")
    parts = split(b"/" + name)
    assert parts is not None  # noqa: S101  # an absolute path can't lead out
    return parts


class Found:
    """Where a path leads: *relative* has no symlinks in it but perhaps the last; *node* is None where nothing is."""

    __slots__ = ("node", "relative")

    def __init__(self, relative: bytes, node: Node | None) -> None:
        self.relative = relative
        self.node = node

    def require(self) -> Node:
        """Return what is there.

        Raises:
            FileNotFoundError: nothing is.
        """
        if self.node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", shown(self.relative))
        return self.node


def find(tree: Tree, path: str | bytes, *, follow_last: bool = True) -> Found:
    """Resolve *path* in *tree*; what is missing on the way is taken as it is written.

    Follows containerd's ``fs.RootPath``: ``..`` that is written goes first, ``..`` in a link's target goes up
    from where the link is, and never above the root.

    Raises:
        OSError: ENOTDIR, a file is where a directory should be; ELOOP, too many links; EINVAL, no path at all.
    """
    pending = components(path)[::-1]
    walked: list[Node | None] = [tree.root]
    names: list[bytes] = []
    links = 0
    while pending:
        name = pending.pop()
        if name == b"..":
            if names:
                names.pop()
                walked.pop()
            continue
        here = walked[-1]
        if here is not None and not here.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", shown(b"/".join(names)))
        child = None if here is None else here.child(name)
        if child is None or not stat.S_ISLNK(child.mode) or not (pending or follow_last):
            names.append(name)
            walked.append(child)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, "too many levels of symbolic links")
        target = os.readlink(child.path)
        if target.startswith(b"/"):
            names, walked = [], [tree.root]
        pending += [part for part in target.split(b"/") if part and part != b"."][::-1]
    return Found(b"/".join(names), walked[-1])


def read_file(tree: Tree, path: str, *, limit_bytes: int) -> bytes | None:
    """Return a regular file's content, links followed; None where there is no such file.

    Raises:
        OSError: it is longer than *limit_bytes*, or can't be read.
    """
    try:
        node = find(tree, path).node
    except NotADirectoryError:
        return None
    if node is None or not stat.S_ISREG(node.mode):
        return None
    with open_file(node) as fd:
        data = b""
        while len(data) <= limit_bytes and (piece := os.read(fd, limit_bytes + 1 - len(data))):
            data += piece
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes", path)
    return data


@contextmanager
def open_file(node: Node) -> Iterator[int]:
    """Open a regular file of a tree for reading."""
    # Without O_NONBLOCK, a FIFO in its place would be waited for.
    fd = os.open(node.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


class Target:
    """A tree that is changed.

    Args:
        path: Its root; nobody else may change it meanwhile.
        ledger: Where to record what can't be made without root; None where everything must be.
    """

    def __init__(self, path: Path, ledger: Ledger | None = None) -> None:
        self.path = os.fsencode(path)
        self.tree = Tree([self.path], ledger)
        self.writer = AttributeWriter(ledger)

    @contextmanager
    def changing(self, relative: bytes) -> Iterator[int]:
        """Open a directory, as :meth:`directory` does, to put files into it or take them out.

        Where that changes its time, it gets :data:`MADE_NS` and not the time at which it happened to be done.
        """
        with self.directory(relative) as fd:
            before, recorded = os.fstat(fd), self._devices_in(relative)
            try:
                yield fd
            finally:
                # A device that can only be recorded would have changed it, too.
                if os.fstat(fd).st_mtime_ns != before.st_mtime_ns or self._devices_in(relative) != recorded:
                    os.utime(fd, ns=(MADE_NS, MADE_NS))

    def _devices_in(self, relative: bytes) -> dict[bytes, Attributes | None]:
        ledger = self.writer.ledger
        return {} if ledger is None else {path: ledger.get(path) for path in ledger.absent_in(relative)}

    @contextmanager
    def directory(self, relative: bytes) -> Iterator[int]:
        """Open a directory without following any link.

        Raises:
            OSError: ENOENT, ENOTDIR (a link, too).
        """
        fd = os.open(self.path, _OPEN_DIRECTORY)
        try:
            for name in relative.split(b"/") if relative else ():
                inner = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def make_directories(self, found: Found, attributes: Attributes) -> None:
        """Make the directory at *found* and those above it that are missing; leave those that are there.

        Raises:
            OSError: ENOTDIR, something else is in the way.
        """
        node = found.node
        if node is not None:
            if not node.is_dir:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", shown(found.relative))
            return
        made: list[bytes] = []
        path = b""
        for name in found.relative.split(b"/"):
            with self.changing(path) as fd:
                path = join(path, name)
                try:
                    os.mkdir(name, 0o700, dir_fd=fd)
                except FileExistsError:
                    continue
            made.append(path)
        # The deepest first: making one changes the time of the one above it.
        for path in reversed(made):
            with self.directory(path) as fd:
                self.writer.write(fd, path, attributes)


def inside(fd: int, name: bytes) -> bytes:
    """Return a path of *name* in an open directory for calls that take no descriptor; good while *fd* is open."""
    return b"/proc/self/fd/%d/%s" % (fd, name)
