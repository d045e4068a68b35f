"""Copying of files between trees of one node."""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH102, PTH115, PTH211

from __future__ import annotations

import errno
import fcntl
import os
import stat

from cluster.disk_room import ENTRY_BYTES, Spend, unbounded
from storage.snapshots.attributes import Attributes, AttributeWriter, is_device
from storage.snapshots.tree import Node, Tree

#: ``linux/fs.h``: share the extents of another file.
_FICLONE = 0x40049409
_CHUNK_BYTES = 1 << 30
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_content(source: int, target: int, spend: Spend = unbounded) -> None:
    """Copy a regular file's content to an empty one: shared where the file system can, holes kept.

    Args:
        source: What is copied.
        target: Where to.
        spend: Is told of the bytes of disk that it takes, unless it is shared.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}:
            raise
    else:
        return
    status = os.fstat(source)
    size = status.st_size
    spend(min(size, status.st_blocks * 512))
    if status.st_blocks * 512 >= size:
        _copy_range(source, target, 0, size)
        return
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, at)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    at = start
    while at < end:
        try:
            count = os.copy_file_range(source, target, min(end - at, _CHUNK_BYTES), at, at)
        except OSError as exc:
            if exc.errno not in {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
            count = os.pwrite(target, os.pread(source, min(end - at, 1 << 20), at), at)
        if not count:
            raise OSError(errno.EIO, "a file became shorter while it was copied")
        at += count


def make_file(node: Node, path: bytes, relative: bytes, writer: AttributeWriter, spend: Spend = unbounded) -> None:
    """Make a copy of *node*, which is no directory, at *path*; hard links are the caller's affair.

    Args:
        node: What is copied.
        path: Where to, on disk: nothing may be there.
        relative: Where to, in the new tree.
        writer: Sets the attributes.
        spend: Is told of the bytes of disk that it takes.
    """
    spend(ENTRY_BYTES)
    attributes = node.attributes()
    if stat.S_ISREG(attributes.mode):
        source = os.open(node.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            target = os.open(path, _NEW_FILE, 0o600)
            try:
                copy_content(source, target, spend)
                writer.write(target, relative, attributes)
            finally:
                os.close(target)
        finally:
            os.close(source)
    elif stat.S_ISLNK(attributes.mode):
        os.symlink(os.readlink(node.path), path)
        writer.write(path, relative, attributes)
    else:
        make_special(path, relative, attributes, writer)


def make_special(path: bytes, relative: bytes, attributes: Attributes, writer: AttributeWriter) -> None:
    """Make a device or FIFO at *path*, or record the device."""
    try:
        os.mknod(path, stat.S_IFMT(attributes.mode) | 0o600, attributes.rdev)
    except PermissionError:
        if writer.ledger is None or not is_device(attributes.mode):
            raise
        writer.ledger.put(relative, attributes)
    else:
        writer.write(path, relative, attributes)


def copy_tree(tree: Tree, target: bytes, writer: AttributeWriter, spend: Spend = unbounded) -> None:
    """Copy *tree* into the empty directory *target*: content, attributes, hard links, holes.

    Args:
        tree: What is copied.
        target: Where to.
        writer: Sets the attributes.
        spend: Is told of the bytes of disk that it takes.
    """
    links: dict[tuple[int, int], tuple[bytes, bytes]] = {}
    directories: list[Node] = []
    for node in tree.walk():
        path = target + b"/" + node.relative
        if node.is_dir:
            if node.relative:
                spend(ENTRY_BYTES)
                os.mkdir(path, 0o700)
            directories.append(node)
            continue
        inode = node.inode
        if inode is not None and inode in links:
            first, relative = links[inode]
            os.link(first, path, follow_symlinks=False)
            if writer.ledger is not None and (recorded := writer.ledger.get(relative)) is not None:
                writer.ledger.put(node.relative, recorded)
            continue
        make_file(node, path, node.relative, writer, spend)
        if inode is not None:
            links[inode] = (path, node.relative)
    # Last, and the deepest first: making files in a directory changes its time, and may need its mode.
    for node in reversed(directories):
        writer.write(target + b"/" + node.relative, node.relative, node.attributes())
