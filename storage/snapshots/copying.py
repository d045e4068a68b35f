"""Snapshots that are whole trees: the parent's copied, the layer carried out on the copy."""

# Names of files are bytes here, which pathlib can't hold.
# ruff: noqa: PTH102, PTH104, PTH108, PTH208

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.collect.node_stock import MountState
from cluster.digest import EMPTY_CHAIN, Digest
from cluster.errors import SnapshotError
from storage.snapshots.attributes import AttributeWriter, Ledger
from storage.snapshots.base import LayeredSnapshotter
from storage.snapshots.copy import copy_tree
from storage.snapshots.diff import Changes
from storage.snapshots.faults import snapshot_error
from storage.snapshots.limits import LayerLimits
from storage.snapshots.locks import locked, mark_used
from storage.snapshots.mounts import check_name
from storage.snapshots.names import join
from storage.snapshots.store import LEDGER, remove_tree
from storage.snapshots.tree import Tree
from storage.snapshots.unpack import Unpacker
from storage.snapshots.workspace import CopyingWorkspace


class CopyingSnapshotter(LayeredSnapshotter):
    """Needs no root and no overlayfs, but the space of a whole tree a snapshot (shared where the file system reflinks).

    Layers are unpacked side by side as the overlay snapshotter's are; then each waits for its parent,
    copies it and moves its own files in. Without root, what can't be made is recorded in a ledger beside
    the snapshot. A "mount" is the snapshot itself: nothing but file modes makes it read-only.
    """

    name = "copying"
    has_parts = False

    def __init__(self, root: Path, limits: LayerLimits | None = None) -> None:
        super().__init__(root, limits)
        self._links = self._store.root / "mnt"
        try:
            self._links.mkdir(exist_ok=True, mode=0o755)
        except OSError as exc:
            raise snapshot_error(str(root), "opening", exc) from exc

    def mount(self, chain: Digest, name: str) -> Path:
        """Return the snapshot's tree, and note that it is in use under *name*."""
        link = self._links / check_name(name)
        target = self._empty if chain == EMPTY_CHAIN else self._store.files(chain)
        with self.hold(chain, "mounting"), locked(self._links, fcntl.LOCK_EX):
            try:
                link.symlink_to(target)
            except FileExistsError:
                if link.readlink() != target:
                    raise SnapshotError(chain, "mounting", f"{name} is mounted already, of another snapshot") from None
                mark_used(link)
            except OSError as exc:
                raise snapshot_error(chain, "mounting", exc) from exc
        return target

    def workspace(self, parent: Digest | None, name: str) -> CopyingWorkspace:
        """Open a writable copy of the snapshot *parent*; see the port. Takes as long as copying it does."""
        lower = None if parent is None or parent == EMPTY_CHAIN else self._tree(parent, "standing on")
        return CopyingWorkspace(self._store, parent, lower, name)

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`; does nothing where there is no such mount."""
        (self._links / check_name(name)).unlink(missing_ok=True)

    def unmount_idle(self, name: str, *, last_used_ns: int) -> str:
        """Undo a mount, unless it was asked for again since. Who is in it can't be seen."""
        link = self._links / check_name(name)
        with locked(self._links, fcntl.LOCK_EX), suppress(FileNotFoundError):
            if link.lstat().st_mtime_ns != last_used_ns:
                return "it was mounted again meanwhile"
            link.unlink()
        return ""

    def mounted(self) -> list[MountState]:
        """Return the live mounts, of which chain each is, and when it was asked for last."""
        chains = {self._store.files(chain): chain for chain in self._store.snapshots()}
        chains[self._empty] = EMPTY_CHAIN
        found: list[MountState] = []
        for link in sorted(self._links.iterdir()):
            with suppress(FileNotFoundError):  # unmounted just now
                used_ns, target = link.lstat().st_mtime_ns, link.readlink()
                if target in chains:
                    found.append(MountState(name=link.name, chain=chains[target], last_used_ns=used_ns))
        return found

    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name."""
        return {link.name: link.readlink() for link in sorted(self._links.iterdir()) if link.exists()}

    def recover(self) -> list[str]:
        """Remove abandoned staging directories, unsure snapshots and the names of mounts that are gone."""
        try:
            removed = self._store.recover()
            for link in sorted(self._links.iterdir()):
                if not link.exists():
                    link.unlink(missing_ok=True)
                    removed.append(f"mnt/{link.name}")
        except OSError as exc:
            raise snapshot_error(str(self._store.root), "recovering", exc) from exc
        return removed

    def _shown(self) -> Mapping[str, Path]:
        return {link.readlink().parent.name: link for link in self._links.iterdir()}

    def _new_ledger(self) -> Ledger:
        return Ledger(owner_is_root=os.geteuid() != 0)

    def _tree(self, chain: Digest, doing: str) -> Tree:
        self._store.require(chain, doing)
        return Tree([bytes(self._store.files(chain))], Ledger.load(self._store.path(chain) / LEDGER))

    def _own_changes(self, chain: Digest, parent: Digest | None) -> Changes | None:  # noqa: ARG002  # trees don't say
        return None

    def _finish(self, unpacker: Unpacker, writer: AttributeWriter, staged: Path, parent: Digest | None) -> None:
        ledger = writer.ledger
        assert ledger is not None  # noqa: S101  # _new_ledger makes one
        if parent is not None:
            (staged / "fs").rename(staged / "upper")
            (staged / "fs").mkdir(mode=0o700)
            whole = self._new_ledger()
            writer = AttributeWriter(whole)
            copy_tree(self._tree(parent, "unpacking onto"), bytes(staged / "fs"), writer, unpacker.meter.spend)
            _Carrier(bytes(staged / "upper"), bytes(staged / "fs"), ledger, whole).carry_out(unpacker)
            ledger = whole
        for path in unpacker.directories:
            attributes = unpacker.attributes_of(path)
            writer.write(bytes(staged / "fs") + b"/" + path, path, attributes, is_new=False)
        if len(ledger) or ledger.owner_is_root:
            ledger.save(staged / LEDGER)


class _Carrier:
    """Carries an unpacked layer out on a copy of its parent: deletes what it deletes, moves its files in."""

    def __init__(self, upper: bytes, whole: bytes, upper_ledger: Ledger, ledger: Ledger) -> None:
        self._upper = upper
        self._whole = whole
        self._upper_ledger = upper_ledger
        self._ledger = ledger

    def carry_out(self, unpacker: Unpacker) -> None:
        """Do it; the attributes of directories are left to the caller."""
        for path, directory in unpacker.directories.items():
            self._make_directory(path, is_opaque=directory.is_opaque)
            for name in directory.whiteouts:
                self._delete(join(path, name))
            with os.scandir(self._upper + b"/" + path) as listing:
                for item in listing:
                    child = join(path, item.name)
                    if child not in unpacker.directories:
                        self._delete(child)
                        os.rename(item.path, self._whole + b"/" + child)
            for absent in self._upper_ledger.absent_in(path):
                self._delete(absent)
        for path in self._upper_ledger:
            recorded = self._upper_ledger.get(path)
            if recorded is not None:
                self._ledger.put(path, recorded)

    def _make_directory(self, path: bytes, *, is_opaque: bool) -> None:
        on_disk = self._whole + b"/" + path
        if not path:
            if is_opaque:
                for name in os.listdir(on_disk):
                    self._delete(name)
                for absent in list(self._ledger.absent_in(b"")):
                    self._delete(absent)
            return
        try:
            is_directory = stat.S_ISDIR(os.lstat(on_disk).st_mode)
        except FileNotFoundError:
            is_directory = False
        if is_directory and not is_opaque:
            return
        self._delete(path)
        os.mkdir(on_disk, 0o700)

    def _delete(self, path: bytes) -> None:
        on_disk = self._whole + b"/" + path
        try:
            is_directory = stat.S_ISDIR(os.lstat(on_disk).st_mode)
        except FileNotFoundError:
            # Perhaps a device, only recorded.
            self._ledger.discard(path)
            return
        if not is_directory:
            os.unlink(on_disk)
            self._ledger.discard(path)
            return
        remove_tree(Path(os.fsdecode(on_disk)))
        for recorded in self._ledger:
            if recorded == path or recorded.startswith(path + b"/"):
                self._ledger.discard(recorded)
