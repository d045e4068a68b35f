"""Writable trees on top of a snapshot, and what becomes of them: a layer, and the snapshot that it makes.

A workspace lies in a staging directory, which its process holds locked: killed, it leaves nothing but that
directory and a mount under it, which :meth:`storage.snapshots.store.Store.recover` undoes.
"""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH108

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from cluster.digest import EMPTY_CHAIN, Digest, chain_id
from cluster.errors import InternalError, SnapshotError
from storage.snapshots.attributes import AttributeWriter, Ledger, is_device
from storage.snapshots.copy import copy_tree
from storage.snapshots.diff import Changes, clamp_times, compare, read_upper, write_layer
from storage.snapshots.faults import snapshot_error
from storage.snapshots.kernel import freeze, mount_overlay, unmount_below
from storage.snapshots.mounts import check_name
from storage.snapshots.store import LEDGER, Store
from storage.snapshots.tidy import is_storable, refuse_mark, tidy_upper
from storage.snapshots.tree import Tree
from storage.snapshots.unpack import DEFAULT_DIRECTORY

_NS: Final = 1_000_000_000


class StagedWorkspace(ABC):
    """A :class:`cluster.ports.Workspace` but for how its tree is written to.

    Args:
        store: Where it is staged and published.
        parent: Chain ID of the snapshot that it stands on.
        lower: That snapshot's tree; None for an empty one.
        name: For people: in errors and, where there is a mount, in the mount table.

    Raises:
        SnapshotError: the disk or the kernel refused.
    """

    #: The tree, to be changed at will until it is committed.
    path: Path
    #: Where whoever changes it records what can't be made without root; None where everything must be made.
    ledger: Ledger | None = None

    def __init__(self, store: Store, parent: Digest | None, lower: Tree | None, name: str) -> None:
        self._store = store
        self._parent = parent
        self._lower = lower
        self._name = check_name(name)
        self._changes: Changes | None = None
        self._diff_id: Digest | None = None
        self._latest_ns: int | None = None
        with self._reporting("preparing"), ExitStack() as opening:
            if lower is not None and parent is not None:
                # As long as it is open: what is committed is told apart from what is below.
                opening.enter_context(store.hold(parent, "standing on"))
            self._staged = opening.enter_context(store.stage())
            self._files = self._staged / "fs"
            self._files.mkdir(mode=0o700)
            self.path = self._prepare()
            self._opened = opening.pop_all()
        self._is_open = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, {str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    # -- what differs --

    @abstractmethod
    def _prepare(self) -> Path:
        """Make the tree; return where it can be written to."""

    @abstractmethod
    def _freeze(self) -> Changes:
        """End the writing; return what has changed."""

    @abstractmethod
    def _finish(self, changes: Changes, latest_ns: int | None) -> None:
        """Make of the files in staging what is published."""

    # -- the port --

    def is_unchanged(self) -> bool:
        """Tell whether the tree is still that of the parent; see the port."""
        changes = self._frozen("comparing")
        if changes.deleted or changes.opaque or changes.links:
            return False
        # A tree on top of nothing has its root at least.
        return set(changes.nodes) <= (set() if self._lower is not None else {b""})

    def commit(self, out: BinaryIO, *, source_date_epoch: int | None) -> Digest:
        """Write the layer tar of what has changed; see the port."""
        changes = self._frozen("committing")
        latest_ns = None if source_date_epoch is None else source_date_epoch * _NS
        with self._reporting("committing"):
            self._diff_id = write_layer(changes, out, latest_ns=latest_ns)
        self._latest_ns = latest_ns
        return self._diff_id

    def publish(self, chain: Digest) -> bool:
        """Publish the tree as the snapshot of *chain*; see the port."""
        changes = self._frozen("publishing")
        if self._diff_id is None or chain != chain_id(self._parent, self._diff_id):
            raise InternalError(f"workspace {self._name} is published as {chain}, its layer is {self._diff_id}")
        below = None if self._parent == EMPTY_CHAIN else self._parent
        with self._reporting("publishing"):
            self._finish(changes, self._latest_ns)
            was_published = self._store.publish(self._staged, chain=chain, parent=below, diff_id=self._diff_id)
        self.discard()
        return was_published

    def discard(self) -> None:
        """Drop the tree with all that is mounted under it; see the port."""
        self._is_open = False
        with self._reporting("discarding"):
            self._opened.close()

    def _frozen(self, doing: str) -> Changes:
        if not self._is_open:
            raise SnapshotError(self._name, doing, "this workspace was published or discarded already")
        if self._changes is None:
            with self._reporting(doing):
                self._changes = self._freeze()
        return self._changes

    @contextmanager
    def _reporting(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise snapshot_error(self._name, doing, exc) from exc


class OverlayWorkspace(StagedWorkspace):
    """An overlay mount whose upper directory becomes the snapshot.

    What differs from overlayfs's defaults, and why:

    - ``redirect_dir``, ``metacopy`` and ``index`` are off: the upper directory means the same without them.
    - ``volatile``: nothing of it is flushed, neither by programs that ask (``dpkg`` does for every file) nor
      by the unmount. A workspace that a crash of the machine interrupts is dropped, and a published snapshot
      isn't counted on until :meth:`Store.settle` has flushed it.

    Args:
        layers: Names of the layers' directories below, uppermost first, relative to the published snapshots.
    """

    def __init__(
        self, store: Store, parent: Digest | None, lower: Tree | None, name: str, *, layers: Sequence[str]
    ) -> None:
        self._layers = layers
        super().__init__(store, parent, lower, name)

    def _prepare(self) -> Path:
        # Overlayfs shows the upper directory's own attributes for the root.
        attributes = DEFAULT_DIRECTORY if self._lower is None else self._lower.root.attributes()
        AttributeWriter(None).write(bytes(self._files), b"", attributes)
        return mount_writable(self._name, self._staged, self._store.published, self._layers)

    def _freeze(self) -> Changes:
        freeze(self._name, self.path)
        unmount_below(self._staged)
        upper = bytes(self._files)
        tidy_upper(upper, self._lower, self._name)
        below = [] if self._lower is None else list(self._lower.root.places)
        return read_upper(upper, Tree([upper, *below]), self._lower)

    def _finish(self, changes: Changes, latest_ns: int | None) -> None:
        clamp_times(changes, latest_ns, None)


def mount_writable(name: str, staged: Path, directory: Path, layers: Sequence[str]) -> Path:
    """Mount ``staged/fs`` to be written to, over *layers* (uppermost first, relative to *directory*); return where.

    Raises:
        SnapshotError: the kernel refused.
        OSError: the disk refused.
    """
    for each in ("work", "root", "empty"):
        (staged / each).mkdir(mode=0o700)
    here = os.path.relpath(staged, directory)
    options = [
        "volatile",
        "redirect_dir=nofollow",
        "metacopy=off",
        "index=off",
        f"upperdir={here}/fs",
        f"workdir={here}/work",
        f"lowerdir={':'.join(layers) or f'{here}/empty'}",
    ]
    mount_overlay(name, name, staged / "root", directory, options)
    return staged / "root"


class CopyingWorkspace(StagedWorkspace):
    """A copy of the parent's tree, which becomes the snapshot whole.

    Nothing but the caller's good manners ends the writing to it.
    """

    def _prepare(self) -> Path:
        self.ledger = self._ledger = Ledger(owner_is_root=os.geteuid() != 0)
        writer = AttributeWriter(self._ledger)
        root = bytes(self._files)
        if self._lower is None:
            writer.write(root, b"", DEFAULT_DIRECTORY)
        else:
            copy_tree(self._lower, root, writer)
        #: What is recorded and what is on disk of files: tells later whether these are still the same.
        self._recorded = {path: (self._ledger.get(path), _lstat(root + b"/" + path)) for path in self._ledger}
        return self._files

    def _freeze(self) -> Changes:
        root = bytes(self._files)
        _drop_unstorable(root, self._name)
        self._update_ledger(root)
        return compare(Tree([root], self._ledger), self._lower)

    def _update_ledger(self, root: bytes) -> None:
        """Forget what is recorded of files that were replaced or removed, and note the modes that were changed."""
        for path, (known, before) in self._recorded.items():
            recorded = self._ledger.get(path)
            if recorded is None or recorded is not known:
                continue  # whoever replaced it has recorded that
            now = _lstat(root + b"/" + path)
            if is_device(recorded.mode):
                if now is not None or _lstat(os.path.dirname(root + b"/" + path)) is None:  # noqa: PTH120
                    self._ledger.discard(path)
            elif now is None or before is None or now.st_ino != before.st_ino:
                self._ledger.discard(path)
            elif now.st_mode != before.st_mode:
                self._ledger.put(path, replace(recorded, mode=now.st_mode))

    def _finish(self, changes: Changes, latest_ns: int | None) -> None:
        clamp_times(changes, latest_ns, self._ledger)
        if len(self._ledger) or self._ledger.owner_is_root:
            self._ledger.save(self._staged / LEDGER)


def _lstat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _drop_unstorable(root: bytes, subject: str) -> None:
    """Remove what a layer can't hold from the tree at *root*; SnapshotError for a name that it can't."""
    pending = [b""]
    while pending:
        directory = pending.pop()
        on_disk = root + b"/" + directory
        before = os.lstat(on_disk)
        with os.scandir(on_disk) as listing:
            items = list(listing)
        for item in items:
            refuse_mark(item.name, directory, subject)
            status = item.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                pending.append(directory + b"/" + item.name if directory else item.name)
            elif not is_storable(status):
                os.unlink(item.path)
                os.utime(on_disk, ns=(before.st_atime_ns, before.st_mtime_ns))
