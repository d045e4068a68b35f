"""A snapshot's tree as it is seen: layers merged as overlayfs merges them, without mounting anything."""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH208

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from storage.snapshots.attributes import Attributes, Ledger, is_device, read_attributes
from storage.snapshots.names import join

#: Overlayfs's mark of a directory that hides what is below it.
OPAQUE_XATTR = "trusted.overlay.opaque"


def is_whiteout(status: os.stat_result) -> bool:
    """Tell whether a file is overlayfs's mark for a deleted one: a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: bytes) -> bool:
    """Tell whether a directory of an overlay layer hides what is below it."""
    try:
        return os.getxattr(path, OPAQUE_XATTR, follow_symlinks=False) == b"y"
    except OSError:
        # ENODATA; ENOTSUP, and without root the attribute isn't there to be seen.
        return False


class Node:
    """A file of a tree. Directories know where their parts lie."""

    __slots__ = ("_ledger", "_recorded", "_status", "path", "places", "relative")

    def __init__(
        self,
        relative: bytes,
        places: Sequence[bytes],
        status: os.stat_result | None,
        ledger: Ledger | None,
        recorded: Attributes | None = None,
    ) -> None:
        #: Path in the tree.
        self.relative = relative
        #: Directories only: where its parts lie on disk, uppermost first.
        self.places = places
        #: Where it lies on disk, uppermost; empty for a device that could only be recorded.
        self.path = places[0] if places else b""
        self._status = status
        self._ledger = ledger
        self._recorded = recorded

    @property
    def mode(self) -> int:
        """Return type and permission bits as on disk."""
        if self._status is None:
            assert self._recorded is not None  # noqa: S101  # one of the two is given
            return self._recorded.mode
        return self._status.st_mode

    @property
    def is_dir(self) -> bool:
        """Tell whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def size(self) -> int:
        """Return its length in bytes."""
        return 0 if self._status is None else self._status.st_size

    @property
    def inode(self) -> tuple[int, int] | None:
        """Return what hard links of one file have in common; None where it has a single link."""
        if self._status is None or self._status.st_nlink < 2 or self.is_dir:  # noqa: PLR2004
            return None
        return (self._status.st_dev, self._status.st_ino)

    def attributes(self) -> Attributes:
        """Return the attributes that it should have."""
        if self._status is None:
            assert self._recorded is not None  # noqa: S101  # one of the two is given
            return self._recorded
        return read_attributes(self.path, self._status, self.relative, self._ledger)

    def child(self, name: bytes) -> Node | None:
        """Look *name* up in this directory."""
        relative = join(self.relative, name)
        parts: list[bytes] = []
        first: os.stat_result | None = None
        for place in self.places:
            path = place + b"/" + name
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if is_whiteout(status):
                break
            if not stat.S_ISDIR(status.st_mode):
                if first is None:
                    return Node(relative, (path,), status, self._ledger)
                break
            first = first or status
            parts.append(path)
            if is_opaque(path):
                break
        if first is not None:
            return Node(relative, parts, first, self._ledger)
        recorded = self._ledger.get(relative) if self._ledger is not None else None
        if recorded is not None and is_device(recorded.mode):
            return Node(relative, (), None, self._ledger, recorded)
        return None

    def children(self) -> list[Node]:
        """Return what is in this directory, by name."""
        names = {name for place in self.places for name in os.listdir(place)}
        if self._ledger is not None:
            names |= {path.rpartition(b"/")[2] for path in self._ledger.absent_in(self.relative)}
        found = (self.child(name) for name in sorted(names))
        return [node for node in found if node is not None]


class Tree:
    """A snapshot's tree.

    Args:
        roots: The directories of its layers, uppermost first; whiteouts and opaque directories as overlayfs has them.
        ledger: What could not be made in it.
    """

    def __init__(self, roots: Sequence[bytes], ledger: Ledger | None = None) -> None:
        self._roots = list(roots)
        self.ledger = ledger

    @property
    def root(self) -> Node:
        """Return its root."""
        return Node(b"", self._roots, os.lstat(self._roots[0]), self.ledger)

    def walk(self) -> Iterator[Node]:
        """Yield every file, a directory before what is in it, in the order of paths compared by component."""
        pending = [self.root]
        while pending:
            node = pending.pop()
            yield node
            if node.is_dir:
                pending.extend(reversed(node.children()))
