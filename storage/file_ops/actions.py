"""A file op carried out: its copies, directories and files, in order, on one writable root."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, assert_never

from cluster.errors import InternalError
from cluster.graph import CopyAction, FileAction, FileOp, MakeDirectory, MakeFile
from cluster.patterns import PatternMatcher
from storage.containers.users import find_owner
from storage.file_ops.copy import CopyOptions, clear, copy, new_directory
from storage.file_ops.faults import naming
from storage.file_ops.paths import MADE_NS, Target, components, find
from storage.file_ops.selection import Source, sources_of
from storage.file_ops.unpack import try_unpack
from storage.snapshots.attributes import Attributes, Ledger
from storage.snapshots.names import parent_of
from storage.snapshots.tree import Tree

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def perform(
    op: FileOp,
    root: Path,
    inputs: Mapping[int, Tree],
    *,
    ledger: Ledger | None = None,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Carry *op* out on *root*. Blocks; what fails midway leaves *root* as far as it got.

    What is copied keeps its time; what else is made or changed gets :data:`storage.file_ops.paths.MADE_NS`. So
    the outcome depends on *op*, *root* and *inputs* alone.

    Args:
        op: What to do.
        root: A writable directory that nobody else uses.
        inputs: The files of the inputs that are copied from, by their index; they must not change meanwhile.
        ledger: Records what can't be made without root; None: everything must be made.
        checkpoint: Called before each file that is copied; raises to stop.

    Raises:
        FileActionError: an action can't be done; names it and its path.
        UnknownUserError: an owner's name isn't in *root*'s passwd or group file.
        NodeDiskError: this node's disk is full or fails.
    """
    target = Target(root, ledger)
    for action in op.actions:
        with naming(_doing(action), _subject(action), root=str(root)):
            _perform(action, target, inputs, checkpoint)


def describe(action: FileAction) -> str:
    """Say in a few words what *action* does, and to what."""
    return f"{_doing(action)} {_subject(action)}"


def _doing(action: FileAction) -> str:
    match action:
        case CopyAction():
            return "copy"
        case MakeDirectory():
            return "make directory"
        case MakeFile():
            return "make file"
        case _:
            assert_never(action)


def _subject(action: FileAction) -> str:
    if isinstance(action, CopyAction):
        return f"{' '.join(action.sources)} to {action.destination}"
    return action.path


def _perform(action: FileAction, target: Target, inputs: Mapping[int, Tree], checkpoint: Callable[[], None]) -> None:
    match action:
        case CopyAction():
            if action.input not in inputs:
                raise InternalError(f"a copy from input {action.input}, which was not given")
            _copy(action, target, inputs[action.input], checkpoint)
        case MakeDirectory():
            owner = find_owner(target.tree, action.owner)
            target.make_directories(find(target.tree, action.path), new_directory(owner, action.mode))
        case MakeFile():
            _make_file(action, target)
        case _:
            assert_never(action)


def _copy(action: CopyAction, target: Target, tree: Tree, checkpoint: Callable[[], None]) -> None:
    options = CopyOptions(
        owner=find_owner(target.tree, action.owner),
        mode=action.mode,
        contents_only=action.contents_only,
        left_out=PatternMatcher(action.exclude),
        checkpoint=checkpoint,
    )
    sources = sources_of(action, tree)
    last = action.destination.rpartition("/")[2]
    into_directory = last in ("", ".", "..") or len(action.sources) > 1 or len(sources) > 1
    for source in sources:
        if action.unpack and _unpack(source, tree, target, action.destination, options):
            continue
        copy(source, target, action.destination, options, into_directory=into_directory)


def _unpack(source: Source, tree: Tree, target: Target, destination: str, options: CopyOptions) -> bool:
    """Unpack *source* if it is an archive, one that a symlink points to as well."""
    node = find(tree, source.path).node
    if node is None or not stat.S_ISREG(node.mode):
        return False
    return try_unpack(node, target, destination, owner=options.owner, checkpoint=options.checkpoint)


def _make_file(action: MakeFile, target: Target) -> None:
    owner = find_owner(target.tree, action.owner)
    found = find(target.tree, action.path)
    name = found.relative.rpartition(b"/")[2]
    if not components(action.path) or not name or action.path.endswith("/"):
        raise IsADirectoryError(errno.EISDIR, "is a directory", action.path)
    attributes = Attributes(
        mode=stat.S_IFREG | (action.mode & 0o7777),
        uid=owner.uid if owner else 0,
        gid=owner.gid if owner else 0,
        mtime_ns=MADE_NS,
        atime_ns=MADE_NS,
    )
    with target.changing(parent_of(found.relative)) as fd:
        # A new one, not the old one emptied: that may be a FIFO, or have other names.
        clear(target, found.relative, fd, name)
        out = os.open(name, _NEW_FILE, 0o600, dir_fd=fd)
        try:
            rest = memoryview(action.data)
            while rest:
                rest = rest[os.write(out, rest) :]
            target.writer.write(out, found.relative, attributes)
        finally:
            os.close(out)
