"""Makes of a directory that overlayfs has written a layer as the unpacker would have written it.

Overlayfs leaves more in its upper directory than what has changed: marks of its own (``trusted.overlay.*``),
opaque marks on directories with nothing below them, copies of files that were only opened for writing or
given the owner that they had. A snapshot that is published with these would not be the one that its own
layer unpacks to.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH106, PTH108, PTH208

from __future__ import annotations

import os
import stat

from cluster.errors import SnapshotError
from storage.snapshots.attributes import OVERLAY_XATTR
from storage.snapshots.diff import are_alike
from storage.snapshots.names import WHITEOUT, join, shown
from storage.snapshots.tree import OPAQUE_XATTR, Node, Tree, is_opaque, is_whiteout


def tidy_upper(upper: bytes, lower: Tree | None, subject: str) -> None:
    """Take out of *upper* what changes nothing of *lower*, what a layer can't hold, and overlayfs's own marks.

    Whiteouts and opaque marks stay where they hide something; sockets go. Nobody may use *upper* meanwhile.

    Raises:
        SnapshotError: a name in it would mean something else in a layer.
        OSError: the disk refused.
    """
    visited: list[tuple[Node, os.stat_result, Node | None]] = []
    root = os.lstat(upper)
    pending = [(Node(b"", (upper,), root, None), root, None if lower is None else lower.root)]
    while pending:
        directory, status, below = pending.pop()
        visited.append((directory, status, below))
        for name in os.listdir(directory.path):
            refuse_mark(name, directory.relative, subject)
            path = directory.path + b"/" + name
            status = os.lstat(path)
            child = Node(join(directory.relative, name), (path,), status, None)
            hidden = None if below is None else below.child(name)
            if child.is_dir:
                pending.append((child, status, _merged_with(child, hidden)))
            else:
                _tidy_file(child, status, hidden)
    # The deepest first: emptying a directory changes its time, and may leave nothing of it.
    for directory, status, below in reversed(visited):
        _strip_marks(directory.path, keep=OPAQUE_XATTR)
        os.utime(directory.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        is_changed = below is None or os.listdir(directory.path) or not are_alike(directory, below)
        if directory.relative and not is_changed:
            os.rmdir(directory.path)


def refuse_mark(name: bytes, directory: bytes, subject: str) -> None:
    """Raise SnapshotError if *name* is that of a deleted file in a layer."""
    if name.startswith(WHITEOUT):
        path = shown(join(directory, name))
        raise SnapshotError(subject, "committing", f"{path!r} can't be in a layer: .wh. is its mark of a deleted file")


def is_storable(status: os.stat_result) -> bool:
    """Tell whether a layer can hold a file: sockets have no type in a tar, a device 0:0 means a deleted file."""
    return not stat.S_ISSOCK(status.st_mode) and not is_whiteout(status)


def _merged_with(directory: Node, hidden: Node | None) -> Node | None:
    """Return the directory below that is seen through *directory*; drop an opaque mark that hides nothing."""
    shows = hidden if hidden is not None and hidden.is_dir else None
    if not is_opaque(directory.path):
        return shows
    if shows is None:
        os.removexattr(directory.path, OPAQUE_XATTR, follow_symlinks=False)
    return None


def _tidy_file(file: Node, status: os.stat_result, hidden: Node | None) -> None:
    if is_whiteout(status):
        if hidden is None:
            os.unlink(file.path)
    elif not is_storable(status):
        os.unlink(file.path)
        if hidden is not None:
            os.mknod(file.path, stat.S_IFCHR, 0)
    elif hidden is not None and file.inode is None and are_alike(file, hidden):
        os.unlink(file.path)
    else:
        _strip_marks(file.path)


def _strip_marks(path: bytes, keep: str = "") -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(OVERLAY_XATTR) and name != keep:
            os.removexattr(path, name, follow_symlinks=False)
