"""Digests of what a copy or a mount shows of an input: equal where that is the same files, whatever their times.

After BuildKit's ``contenthash``: names, kinds, modes, owners, link targets, bytes, xattrs, devices and which
files are hard links of one another; no times. Sources are read exactly as copies read them.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH115

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cluster.digest import Digest
from cluster.graph import CopyAction, FileOp, RunOp
from cluster.patterns import PatternMatcher
from storage.file_ops.faults import naming
from storage.file_ops.paths import find, open_file
from storage.file_ops.selection import Source, sources_of, walk
from storage.snapshots.tree import Node, Tree

if TYPE_CHECKING:
    from hashlib import _Hash

#: Changes whenever equal trees would have other digests than before.
_VERSION: Final = b"lazyfarm file selection 1"
_MOUNT_VERSION: Final = b"lazyfarm mount 1"
_BUFFER_BYTES: Final = 1 << 20


def content_digest(op: FileOp, index: int, tree: Tree, *, checkpoint: Callable[[], None] = lambda: None) -> Digest:
    """Return the digest of all that *op*'s copies read of the input *index*, whose files are *tree*.

    Args:
        op: The op; its own fields are not in the digest.
        index: Which of its inputs.
        tree: The input's files.
        checkpoint: Called before each file; raises to stop.

    Raises:
        FileActionError: a source is missing or can't be read; the copy would fail likewise.
    """
    total = hashlib.sha256()
    _add(total, _VERSION)
    for position, action in enumerate(op.actions):
        if not isinstance(action, CopyAction) or action.input != index:
            continue
        _add(total, b"action", b"%d" % position)
        with naming("copy", " ".join(action.sources)):
            left_out = PatternMatcher(action.exclude)
            for source in sources_of(action, tree):
                _add_source(total, source, left_out, contents_only=action.contents_only, checkpoint=checkpoint)
    return Digest(f"sha256:{total.hexdigest()}")


def mount_digest(op: RunOp, index: int, tree: Tree, *, checkpoint: Callable[[], None] = lambda: None) -> Digest:
    """Return the digest of all that *op*'s bind mounts show of the input *index*, whose files are *tree*.

    Args:
        op: The op; its own fields are not in the digest.
        index: Which of its inputs.
        tree: The input's files.
        checkpoint: Called before each file; raises to stop.

    Raises:
        FileActionError: a mount's source is missing or can't be read; the command couldn't be started either.
    """
    total = hashlib.sha256()
    _add(total, _MOUNT_VERSION)
    everything = PatternMatcher(())
    for position, mount in enumerate(op.binds):
        if mount.input != index:
            continue
        _add(total, b"mount", b"%d" % position)
        with naming("bind", mount.source):
            # What the path is called, and which links lead to it, is not to be seen in the mount.
            source = Source(b"", find(tree, mount.source).require())
            _add_source(total, source, everything, contents_only=False, checkpoint=checkpoint)
    return Digest(f"sha256:{total.hexdigest()}")


def _add_source(
    total: _Hash, source: Source, left_out: PatternMatcher, *, contents_only: bool, checkpoint: Callable[[], None]
) -> None:
    _add(total, b"source", source.path)
    links: dict[tuple[int, int], bytes] = {}
    for path, node in walk(source.node, left_out):
        checkpoint()
        if stat.S_ISSOCK(node.mode):
            continue
        if not path and node.is_dir and contents_only:
            # Its own attributes go nowhere.
            _add(total, b"contents")
            continue
        inode = node.inode
        if inode is not None and inode in links:
            _add(total, b"link", path, links[inode])
            continue
        if inode is not None:
            links[inode] = path
        _add_file(total, path, node)


def _add_file(total: _Hash, path: bytes, node: Node) -> None:
    attributes = node.attributes()
    mode = attributes.mode
    _add(total, b"file", path, b"%o %d %d %d" % (mode, attributes.uid, attributes.gid, attributes.rdev))
    for name, value in sorted(attributes.xattrs.items()):
        _add(total, b"xattr", name.encode("utf-8", "surrogateescape"), value)
    if stat.S_ISLNK(mode):
        _add(total, b"target", os.readlink(node.path))
    elif stat.S_ISREG(mode):
        _add(total, b"content", _hash_file(node))


def _hash_file(node: Node) -> bytes:
    content = hashlib.sha256()
    buffer = memoryview(bytearray(min(node.size + 1, _BUFFER_BYTES)))
    with open_file(node) as fd:
        while count := os.readv(fd, [buffer]):
            content.update(buffer[:count])
    return content.digest()


def _add(total: _Hash, *fields: bytes) -> None:
    """Add a record; two records are never alike but where all their fields are."""
    total.update(b"%d\n" % len(fields))
    for field in fields:
        total.update(b"%d:" % len(field))
        total.update(field)
