"""Unpacks one layer's entries into a directory of its own, without touching what is below it.

The outcome is an *upper*: a directory with the layer's files and, in memory, the paths that it deletes and
the directories that hide what is below them. The overlay snapshotter writes these down as overlayfs
wants them, the copying one carries them out on a copy of the parent: so both come to the same tree.

Rules, by the OCI image-spec (``layer.md``) and, where it is silent, containerd's ``pkg/archive``:

- An entry replaces what an earlier one put at its path; a directory over a directory only changes its attributes.
- A whiteout or opaque marker deletes from the layers below only, wherever it stands in the archive.
- A directory over anything but a directory, below or earlier, has nothing of what was there.
- Symlinks on the way to an entry are followed within the tree, those of the layers below too. Directories
  missing from the archive are those of the layers below, else made (mode 755, of 0:0).
- A hard link to a file of the layers below copies it up first.

No path is ever resolved by the kernel: directories are opened one component at a time without following
links, and entries are made relative to those, exclusively. So nothing outside the upper can be reached.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH106, PTH108, PTH115, PTH208

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from cluster.errors import LayerError, UnprivilegedEntryError, UnsafeEntryError
from storage.snapshots import tar
from storage.snapshots.attributes import OVERLAY_XATTR, Attributes, AttributeWriter, impossible_xattr, is_device
from storage.snapshots.copy import make_file
from storage.snapshots.limits import LayerMeter
from storage.snapshots.names import (
    MAX_PATH_BYTES,
    OPAQUE,
    WHITEOUT,
    WHITEOUT_META,
    join,
    parent_of,
    shown,
    split,
)
from storage.snapshots.tree import Node, Tree

#: Directories of one layer that are held open. Archives go through them in order, so a few do.
_OPEN_DIRECTORIES: Final = 24
#: Symlinks that are followed on the way to one entry, as in Linux.
_MAX_LINKS: Final = 40

#: What the kernel says to an entry that can't be; anything else is the disk's fault.
_ENTRY_FAULTS: Final = frozenset(
    (
        errno.ENOENT,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EMLINK,
        errno.EFBIG,
        errno.E2BIG,
    )
)

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_TYPE: Final = {
    tar.REGULAR: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHARACTER: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
}
#: What a directory has that is neither in the archive nor below.
DEFAULT_DIRECTORY: Final = Attributes(mode=stat.S_IFDIR | 0o755)


class _LostError(Exception):
    """A path leads nowhere. Never leaves this module."""


class UpperDirectory:
    """What is known of a directory of the upper."""

    __slots__ = ("attributes", "is_new", "is_opaque", "whiteouts")

    def __init__(self, attributes: Attributes | None, *, is_new: bool) -> None:
        #: As the archive says; None for a directory that it doesn't have.
        self.attributes = attributes
        #: Whether it hides what the directory of that path below has in it.
        self.is_opaque = is_new
        #: Whether it is another one than that altogether: deleted or replaced, then made.
        self.is_new = is_new
        #: Names in it that are deleted from below.
        self.whiteouts: set[bytes] = set()


class Unpacker:
    """Puts entries into the empty directory *root*. A context manager, for its open directories.

    Args:
        layer: Digest of the layer, for errors.
        root: Where to; nobody else may use it.
        writer: Sets attributes.
        lower: Returns the tree below, waiting for it; None where there is none. Called when it is needed first.
        meter: Bounds how much is made and remembered.
    """

    def __init__(
        self,
        *,
        layer: str,
        root: bytes,
        writer: AttributeWriter,
        lower: Callable[[], Tree | None],
        meter: LayerMeter,
    ) -> None:
        self._layer = layer
        self._root = root
        self._writer = writer
        self._ledger = writer.ledger
        self._get_lower = lower
        self.meter = meter
        #: Every directory of the upper by its path, a parent before its children.
        self.directories: dict[bytes, UpperDirectory] = {b"": UpperDirectory(None, is_new=False)}
        self.entries = 0
        self.content_bytes = 0
        self._root_fd = os.open(root, _OPEN_DIRECTORY)
        self._fds: OrderedDict[bytes, int] = OrderedDict()
        #: Directory as written in a name → its path with symlinks followed.
        self._resolved: dict[bytes, bytes] = {b"": b""}
        #: Symlinks that were followed for those.
        self._followed: set[bytes] = set()
        self._lower_cache: dict[bytes, Node | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_directories()
        os.close(self._root_fd)

    # -- entries --

    def add(self, entry: tar.Entry, reader: tar.TarReader) -> None:
        """Make *entry*; *reader* is at its data.

        Raises:
            LayerError, UnsafeEntryError, UnprivilegedEntryError: it can't or must not be made.
            LayerLimitError: it is one too many.
            tar.TarError: its data is truncated.
            OSError: the disk refused.
        """
        self.meter.make()
        self.entries += 1
        parts = split(entry.name)
        if parts is None:
            raise self._unsafe(entry.name, "its name leads out of the root")
        if reason := tar.impossible(entry):
            raise self._malformed(entry.name, reason)
        if not parts:
            if entry.kind != tar.DIRECTORY:
                raise self._malformed(entry.name, "the root must be a directory")
            self.directories[b""].attributes = self._attributes(entry)
            return
        base = parts[-1]
        is_mark = base.startswith(WHITEOUT)
        if parts[0].startswith(WHITEOUT_META) and not is_mark:
            return
        try:
            if is_mark:
                self._mark(entry.name, parts, base)
            else:
                self._place(entry, reader, parts)
        except OSError as exc:
            if exc.errno in _ENTRY_FAULTS:
                raise self._malformed(entry.name, str(exc.strerror)) from exc
            if isinstance(exc, PermissionError) and os.geteuid():
                raise UnprivilegedEntryError(self._layer, shown(entry.name), str(exc.strerror)) from exc
            raise

    def _place(self, entry: tar.Entry, reader: tar.TarReader, parts: list[bytes]) -> None:
        """Make an entry that is neither the root nor a mark."""
        base = parts[-1]
        parent, fd = self._parent(parts)
        path = join(parent, base)
        if len(path) > MAX_PATH_BYTES:
            raise self._malformed(entry.name, f"its path is longer than {MAX_PATH_BYTES} bytes")
        if path in self._followed:
            self._forget_paths()
        kind = entry.kind
        if kind == tar.REGULAR:
            self._regular(entry, reader, path, base, fd)
        elif kind == tar.DIRECTORY:
            self._directory(entry, parent, path, base, fd)
        elif kind == tar.HARD_LINK:
            self._hard_link(entry, path, base)
        elif kind == tar.SYMLINK:
            self._make(path, lambda: os.symlink(entry.link, base, dir_fd=fd))
            self._writer.write(self._on_disk(path), path, self._attributes(entry))
        else:
            self._special(entry, path, base, fd)
        if kind != tar.DIRECTORY:
            # The entry itself hides what is below now.
            self.directories[parent].whiteouts.discard(base)

    def _regular(self, entry: tar.Entry, reader: tar.TarReader, path: bytes, base: bytes, directory: int) -> None:
        try:
            fd = os.open(base, _NEW_FILE, 0o600, dir_fd=directory)
        except FileExistsError:
            self._remove(path)
            fd = os.open(base, _NEW_FILE, 0o600, dir_fd=directory)
        try:
            if entry.extents is None:
                while (piece := reader.read()) is not None:
                    while (written := os.write(fd, piece)) < len(piece):
                        piece = piece[written:]
            else:
                _write_extents(fd, entry, reader)
            self._writer.write(fd, path, self._attributes(entry))
        finally:
            os.close(fd)
        self.content_bytes += entry.size

    def _directory(self, entry: tar.Entry, parent: bytes, path: bytes, base: bytes, fd: int) -> None:
        attributes = self._attributes(entry)
        known = self.directories.get(path)
        if known is not None:
            known.attributes = attributes
            return
        is_new = False
        try:
            os.mkdir(base, 0o700, dir_fd=fd)
        except FileExistsError:
            self._remove(path)
            os.mkdir(base, 0o700, dir_fd=fd)
            is_new = True
        if self._ledger is not None and self._ledger.get(path) is not None:
            self._ledger.discard(path)
            is_new = True
        self._register(parent, path, base, attributes, is_new=is_new)

    def _register(
        self, parent: bytes, path: bytes, base: bytes, attributes: Attributes | None, *, is_new: bool
    ) -> None:
        whiteouts = self.directories[parent].whiteouts
        if base in whiteouts:
            whiteouts.discard(base)
            is_new = True
        self.meter.remember(path)
        self.directories[path] = UpperDirectory(attributes, is_new=is_new)
        if self._lower_cache:
            self._lower_cache.clear()

    def _hard_link(self, entry: tar.Entry, path: bytes, base: bytes) -> None:
        parts = split(entry.link)
        if parts is None:
            raise self._unsafe(entry.name, f"its target {shown(entry.link)!r} leads out of the root")
        target = self._find(entry, parts)
        if target == path:
            return
        if target in self.directories:
            raise self._malformed(entry.name, "a hard link to a directory")
        recorded = None if self._ledger is None else self._ledger.get(target)
        if recorded is not None and is_device(recorded.mode):
            self._clear(path)
        else:
            # A copy of the descriptor: opening the other directory may close this one.
            source = os.dup(self._fd(parent_of(target)))
            directory = self._fd(parent_of(path))
            name = target.rpartition(b"/")[2]
            try:
                self._make(
                    path,
                    lambda: os.link(name, base, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False),
                )
            except FileNotFoundError:
                raise self._malformed(entry.name, f"its target {shown(entry.link)!r} was replaced by it") from None
            finally:
                os.close(source)
        if recorded is not None and self._ledger is not None:
            self._ledger.put(path, recorded)

    def _special(self, entry: tar.Entry, path: bytes, base: bytes, fd: int) -> None:
        attributes = self._attributes(entry)
        if entry.kind == tar.CHARACTER and attributes.rdev == 0:
            raise self._unsafe(entry.name, "a character device 0:0 is overlayfs's mark for a deleted file")
        try:
            self._make(path, lambda: os.mknod(base, stat.S_IFMT(attributes.mode) | 0o600, attributes.rdev, dir_fd=fd))
        except PermissionError:
            if self._ledger is None or entry.kind == tar.FIFO:
                raise
            self._clear(path)
            self._ledger.put(path, attributes)
        else:
            self._writer.write(self._on_disk(path), path, attributes)

    def _make(self, path: bytes, make: Callable[[], None]) -> None:
        """Make something at *path*, instead of what is there."""
        try:
            make()
        except FileExistsError:
            self._remove(path)
            make()
        self._forget_recorded(path)

    def _clear(self, path: bytes) -> None:
        """Remove what an earlier entry put at *path*, if it did."""
        if path in self.directories or os.path.lexists(self._on_disk(path)):
            self._remove(path)
        self._forget_recorded(path)

    def _forget_recorded(self, path: bytes) -> None:
        if self._ledger is not None:
            recorded = self._ledger.get(path)
            if recorded is not None and is_device(recorded.mode):
                self._ledger.discard(path)

    def _attributes(self, entry: tar.Entry) -> Attributes:
        for name in entry.xattrs:
            if name.startswith(OVERLAY_XATTR):
                raise self._unsafe(entry.name, f"its xattr {name} would direct overlayfs")
            if reason := impossible_xattr(name, entry.xattrs[name]):
                raise self._malformed(entry.name, reason)
        is_node = entry.kind in (tar.CHARACTER, tar.BLOCK_DEVICE)
        return Attributes(
            mode=_TYPE[entry.kind] | entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            mtime_ns=entry.mtime_ns,
            atime_ns=entry.atime_ns,
            rdev=os.makedev(entry.major, entry.minor) if is_node else 0,
            xattrs=entry.xattrs,
        )

    def _mark(self, name: bytes, parts: list[bytes], base: bytes) -> None:
        """Take a whiteout or an opaque marker."""
        if base == OPAQUE:
            parent, _ = self._parent(parts)
            self.directories[parent].is_opaque = True
            self._lower_cache.clear()
            self._forget_paths()
            return
        if base.startswith(WHITEOUT_META):
            return
        target = base[len(WHITEOUT) :]
        if target in (b"", b".", b".."):
            raise self._malformed(name, "a whiteout of no name")
        parent, fd = self._parent(parts)
        path = join(parent, target)
        known = self.directories.get(path)
        if known is not None:
            known.is_opaque = known.is_new = True
            self._lower_cache.clear()
        elif not self._is_in_upper(path, target, fd):
            self.meter.remember(target)
            self.directories[parent].whiteouts.add(target)
            self._lower_cache.clear()
        if path in self._followed:
            self._forget_paths()

    def _is_in_upper(self, path: bytes, base: bytes, fd: int) -> bool:
        if self._ledger is not None and self._ledger.get(path) is not None:
            return True
        try:
            os.stat(base, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _remove(self, path: bytes) -> None:
        """Remove what the layer has put at *path*, with all that is in it."""
        if path not in self.directories:
            self._unlink(path)
            return
        # Only those within: the caller holds the descriptor of the directory that *path* is in.
        for inner in [held for held in self._fds if held == path or held.startswith(path + b"/")]:
            os.close(self._fds.pop(inner))
        self._forget_paths()
        found = [path]
        for directory in found:
            for name in os.listdir(self._on_disk(directory)):
                child = join(directory, name)
                if child in self.directories:
                    found.append(child)
                else:
                    self._unlink(child)
            if self._ledger is not None:
                for absent in list(self._ledger.absent_in(directory)):
                    self._ledger.discard(absent)
        for directory in reversed(found):
            os.rmdir(self._on_disk(directory))
            del self.directories[directory]
        self._lower_cache.clear()

    def _unlink(self, path: bytes) -> None:
        os.unlink(self._on_disk(path))
        if self._ledger is not None:
            self._ledger.discard(path)

    # -- paths --

    def _on_disk(self, path: bytes) -> bytes:
        return self._root + b"/" + path if path else self._root

    def _parent(self, parts: list[bytes]) -> tuple[bytes, int]:
        """Return path and descriptor of the directory that an entry is made in, making it where it is missing."""
        written = b"/".join(parts[:-1])
        path = self._resolved.get(written)
        if path is None:
            path = self._resolve(parts[:-1])
            self._resolved[written] = path
        return path, self._fd(path)

    def _resolve(self, parts: list[bytes]) -> bytes:
        """Follow *parts* within the tree, making directories that aren't there yet; return the path."""

        def look(path: bytes, child: bytes, part: bytes) -> bytes | None:
            target = self._link_at(path, child, part)
            if target is None:
                self._make_missing(path, child, part)
            else:
                self._followed.add(child)
            return target

        try:
            return self._follow(parts, look)
        except _LostError as exc:
            raise self._malformed(b"/".join(parts), str(exc)) from None

    def _follow(self, parts: list[bytes], look: Callable[[bytes, bytes, bytes], bytes | None]) -> bytes:
        """Return the path that *parts* lead to, symlinks followed within the tree.

        Args:
            parts: Where to, from the root.
            look: Called with a directory's path, the path of what is next and its name, where that is no
                directory of the upper. Returns the target of the symlink there, or None for a directory.

        Raises:
            _LostError: there are too many symlinks; and whatever *look* raises.
        """
        path = b""
        pending = list(reversed(parts))
        links = 0
        while pending:
            part = pending.pop()
            if part == b"..":
                path = parent_of(path)
                continue
            child = join(path, part)
            target = None if child in self.directories else look(path, child, part)
            if target is None:
                path = child
                continue
            links += 1
            if links > _MAX_LINKS:
                raise _LostError("too many symlinks on its way")
            if target.startswith(b"/"):
                path = b""
            pending.extend(reversed([step for step in target.split(b"/") if step and step != b"."]))
        return path

    def _link_at(self, parent: bytes, child: bytes, base: bytes) -> bytes | None:
        """Return the target of the symlink at *child*; None where there is a directory below, or nothing.

        Raises:
            LayerError: something else is there.
        """
        fd = self._fd(parent)
        try:
            status = os.stat(base, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISLNK(status.st_mode):
                return os.readlink(base, dir_fd=fd)
            raise self._malformed(child, "a file is where a directory should be")
        if self._ledger is not None and self._ledger.get(child) is not None:
            raise self._malformed(child, "a device is where a directory should be")
        below = self._below(parent, base)
        if below is None or below.is_dir:
            return None
        if stat.S_ISLNK(below.mode):
            return os.readlink(below.path)
        raise self._malformed(child, "a file is where a directory should be")

    def _make_missing(self, parent: bytes, child: bytes, base: bytes) -> None:
        if base.startswith(WHITEOUT):
            raise self._malformed(child, "a whiteout's name on the way to it")
        if len(child) > MAX_PATH_BYTES:
            raise self._malformed(child, f"its path is longer than {MAX_PATH_BYTES} bytes")
        self.meter.make()
        os.mkdir(base, 0o700, dir_fd=self._fd(parent))
        self._register(parent, child, base, None, is_new=False)

    def _find(self, entry: tar.Entry, parts: list[bytes]) -> bytes:
        """Return the path of a hard link's target, copied up where it lies below."""
        if not parts:
            raise self._malformed(entry.name, "a hard link to the root")
        base = parts[-1]
        missing = f"its target {shown(entry.link)!r} is missing"
        # Only a target that is there has a directory to be made for it.
        parent = self._resolved.get(b"/".join(parts[:-1]))
        if parent is None:
            if not self._exists(parts[:-1]):
                raise self._malformed(entry.name, missing)
            parent, _ = self._parent(parts)
        path = join(parent, base)
        if path in self.directories or self._is_in_upper(path, base, self._fd(parent)):
            return path
        below = self._below(parent, base)
        if below is None:
            raise self._malformed(entry.name, missing)
        if below.is_dir:
            raise self._malformed(entry.name, "a hard link to a directory")
        make_file(below, self._on_disk(path), path, self._writer, self.meter.spend)
        return path

    def _exists(self, parts: list[bytes]) -> bool:
        """Tell whether the directory *parts* is in the upper or below, links followed; make nothing."""

        def look(path: bytes, child: bytes, part: bytes) -> bytes | None:
            if path in self.directories and (target := self._link_at(path, child, part)) is not None:
                return target
            node = self._below(path, part)
            if node is not None and stat.S_ISLNK(node.mode):
                return os.readlink(node.path)
            if node is None or not node.is_dir:
                raise _LostError("nothing is there")
            return None

        try:
            self._follow(parts, look)
        except _LostError:
            return False
        return True

    # -- what is below --

    def lower_directory(self, path: bytes) -> Node | None:
        """Return the directory below that is seen through the upper's directory *path*, or None."""
        if path in self._lower_cache:
            return self._lower_cache[path]
        upper = self.directories.get(path)
        node = None if upper is not None and upper.is_opaque else self._same_below(path)
        self._lower_cache[path] = node
        return node

    def _below(self, parent: bytes, base: bytes) -> Node | None:
        """Return what is below at *base* in *parent* and not hidden, or None."""
        upper = self.directories.get(parent)
        if upper is not None and base in upper.whiteouts:
            return None
        directory = self.lower_directory(parent)
        return None if directory is None else directory.child(base)

    def attributes_of(self, path: bytes) -> Attributes:
        """Return the attributes that the directory *path* is to have: the archive's, else those below, else 755."""
        directory = self.directories[path]
        if directory.attributes is not None:
            return directory.attributes
        node = None if directory.is_new else self._same_below(path)
        return DEFAULT_DIRECTORY if node is None else node.attributes()

    def deleted_in(self, path: bytes) -> list[bytes]:
        """Return the names in the directory *path* that are below and that the layer deletes."""
        whiteouts = self.directories[path].whiteouts
        if not whiteouts:
            return []
        below = self.lower_directory(path)
        return [] if below is None else sorted(name for name in whiteouts if below.child(name) is not None)

    def hides_below(self, path: bytes) -> bool:
        """Tell whether the directory *path* is opaque and there is a directory below to be hidden."""
        return self.directories[path].is_opaque and self._same_below(path) is not None

    def _same_below(self, path: bytes) -> Node | None:
        """Return the directory below that the upper's directory *path* stands on, hidden by it or not."""
        if not path:
            tree = self._get_lower()
            return None if tree is None else tree.root
        parent, _, base = path.rpartition(b"/")
        node = self._below(parent, base)
        return node if node is not None and node.is_dir else None

    # -- open directories --

    def _fd(self, path: bytes) -> int:
        """Return a descriptor of a directory of the upper; valid until the next call."""
        fds = self._fds
        fd = fds.get(path)
        if fd is not None:
            fds.move_to_end(path)
            return fd
        if not path:
            return self._root_fd
        missing: list[bytes] = []
        ancestor = path
        while ancestor and ancestor not in fds:
            ancestor, _, base = ancestor.rpartition(b"/")
            missing.append(base)
        fd = fds[ancestor] if ancestor else self._root_fd
        for base in reversed(missing):
            fd = os.open(base, _OPEN_DIRECTORY, dir_fd=fd)
            ancestor = join(ancestor, base)
            fds[ancestor] = fd
            if len(fds) > _OPEN_DIRECTORIES:
                os.close(fds.popitem(last=False)[1])
        return fd

    def _close_directories(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _forget_paths(self) -> None:
        self._resolved = {b"": b""}
        self._followed.clear()

    # -- errors --

    def _malformed(self, name: bytes, reason: str) -> LayerError:
        return LayerError(self._layer, shown(name), reason)

    def _unsafe(self, name: bytes, reason: str) -> UnsafeEntryError:
        return UnsafeEntryError(self._layer, shown(name), reason)


def _write_extents(fd: int, entry: tar.Entry, reader: tar.TarReader) -> None:
    """Write a sparse file's data where its map says, and its length."""
    os.ftruncate(fd, entry.size)
    extents = [extent for extent in entry.extents or () if extent.length]
    index = done = 0
    while (piece := reader.read()) is not None:
        while piece:
            extent = extents[index]
            written = os.pwrite(fd, piece[: extent.length - done], extent.offset + done)
            piece = piece[written:]
            done += written
            if done == extent.length:
                index, done = index + 1, 0
