"""Copies between trees, with the meaning they have in BuildKit (``tonistiigi/fsutil``, ``copy/copy.go``).

- A file over a directory, and a directory over anything else, are errors; a file over a file replaces it.
- The destination is found through symlinks, within its root; what is copied below it is never written through one.
- A directory that is there keeps its attributes if it is the destination itself, and takes the source's below that.
- Directories made on the way to the destination have mode 755 and the copy's owner.
- Hard links among the files of one source are kept, so are holes, xattrs, devices and times. Sockets are left out.

Unlike there, what is made on the way, and directories that something is put into, have one fixed time.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH115

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from cluster.patterns import PatternMatcher
from storage.containers.users import Owner
from storage.file_ops.paths import MADE_NS, Target, find, inside, open_file
from storage.file_ops.selection import Source, walk
from storage.snapshots.attributes import Attributes
from storage.snapshots.copy import copy_content, make_special
from storage.snapshots.names import join, parent_of, shown
from storage.snapshots.tree import Node

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """How one action copies."""

    #: Instead of the source's; None keeps that.
    owner: Owner | None = None
    #: Permission bits instead of the source's; None keeps those.
    mode: int | None = None
    contents_only: bool = True
    left_out: PatternMatcher = PatternMatcher(())  # noqa: RUF009  # without patterns it has no state
    #: Called before each file; raises to stop.
    checkpoint: Callable[[], None] = lambda: None


def new_directory(owner: Owner | None, mode: int = 0o755) -> Attributes:
    """Return the attributes of a directory that an op makes."""
    who = owner or Owner()
    return Attributes(mode=stat.S_IFDIR | (mode & 0o7777), uid=who.uid, gid=who.gid, mtime_ns=MADE_NS, atime_ns=MADE_NS)


def copy(source: Source, target: Target, destination: str, options: CopyOptions, *, into_directory: bool) -> None:
    """Copy one source to *destination*.

    Args:
        source: What.
        target: The tree that is changed.
        destination: A path from its root.
        options: How.
        into_directory: *destination* is a directory, made where it is missing.

    Raises:
        OSError: it can't be, or the disk refused.
    """
    above = new_directory(options.owner)
    found = find(target.tree, destination)
    if into_directory:
        target.make_directories(found, above)
        found = find(target.tree, found.relative)
    is_directory = source.node.is_dir
    goes_inside = found.node is not None and (not options.contents_only if is_directory else found.node.is_dir)
    relative = found.relative
    if goes_inside and source.name:
        relative = join(relative, source.name)
    # What is to be made is made below a directory that is there.
    made = relative if is_directory and options.contents_only else parent_of(relative)
    target.make_directories(find(target.tree, made, follow_last=False), above)
    _Copier(target, options).copy(source.node, relative)


class _Copier:
    """Copies one source."""

    def __init__(self, target: Target, options: CopyOptions) -> None:
        self._target = target
        self._options = options
        #: Hard-linked files by inode: where the first was put.
        self._links: dict[tuple[int, int], bytes] = {}
        #: Directories whose attributes are still to be set.
        self._directories: list[tuple[bytes, Node]] = []

    def copy(self, source: Node, relative: bytes) -> None:
        """Copy *source* and what is in it to *relative*."""
        with ExitStack() as stack:
            held: bytes | None = None
            fd = -1
            for path, node in walk(source, self._options.left_out):
                self._options.checkpoint()
                at = join(relative, path) if path else relative
                if not at:
                    # The root on the root.
                    continue
                if held != parent_of(at):
                    stack.close()
                    held = parent_of(at)
                    fd = stack.enter_context(self._target.changing(held))
                name = at.rpartition(b"/")[2]
                if node.is_dir:
                    self._directory(node, at, fd, name, is_top=not path)
                else:
                    self._file(node, at, fd, name)
        # Last, and the deepest first: making files in a directory changes its time, and may need its mode.
        for at, node in reversed(self._directories):
            with self._target.directory(at) as fd:
                self._target.writer.write(fd, at, self._attributes(node))

    def _attributes(self, node: Node) -> Attributes:
        attributes = node.attributes()
        owner, mode = self._options.owner, self._options.mode
        if owner is not None:
            attributes = replace(attributes, uid=owner.uid, gid=owner.gid)
        if mode is not None and not stat.S_ISLNK(attributes.mode):
            attributes = replace(attributes, mode=stat.S_IFMT(attributes.mode) | (mode & 0o7777))
        return attributes

    def _directory(self, node: Node, at: bytes, fd: int, name: bytes, *, is_top: bool) -> None:
        there = _status(fd, name)
        if there is None:
            os.mkdir(name, 0o700, dir_fd=fd)
        elif not stat.S_ISDIR(there.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a directory can't replace what is no directory", shown(at))
        elif is_top:
            return
        self._directories.append((at, node))

    def _file(self, node: Node, at: bytes, fd: int, name: bytes) -> None:
        if stat.S_ISSOCK(node.mode):
            return
        clear(self._target, at, fd, name)
        inode = node.inode
        if inode is not None and (first := self._links.get(inode)) is not None:
            self._link(first, at, fd, name)
            return
        attributes = self._attributes(node)
        writer = self._target.writer
        if stat.S_ISREG(attributes.mode):
            out = os.open(name, _NEW_FILE, 0o600, dir_fd=fd)
            try:
                with open_file(node) as content:
                    copy_content(content, out)
                writer.write(out, at, attributes)
            finally:
                os.close(out)
        elif stat.S_ISLNK(attributes.mode):
            os.symlink(os.readlink(node.path), name, dir_fd=fd)
            writer.write(inside(fd, name), at, attributes)
        else:
            make_special(inside(fd, name), at, attributes, writer)
        if inode is not None:
            self._links[inode] = at

    def _link(self, first: bytes, at: bytes, fd: int, name: bytes) -> None:
        with self._target.directory(parent_of(first)) as above:
            os.link(first.rpartition(b"/")[2], name, src_dir_fd=above, dst_dir_fd=fd, follow_symlinks=False)
        ledger = self._target.writer.ledger
        if ledger is not None and (recorded := ledger.get(first)) is not None:
            ledger.put(at, recorded)


def clear(target: Target, at: bytes, fd: int, name: bytes) -> None:
    """Remove the file at *at*, that is *name* in the open directory *fd*, if there is one.

    Raises:
        IsADirectoryError: there is a directory.
    """
    there = _status(fd, name)
    if there is not None:
        if stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a file can't replace a directory", shown(at))
        os.unlink(name, dir_fd=fd)
    if target.writer.ledger is not None:
        target.writer.ledger.discard(at)


def _status(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
