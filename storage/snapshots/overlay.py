"""Snapshots that share their files: a layer each, merged by overlayfs when mounted."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.collect.node_stock import MountState
from cluster.digest import EMPTY_CHAIN, Digest
from cluster.errors import SnapshotError
from storage.snapshots.attributes import AttributeWriter
from storage.snapshots.base import LayeredSnapshotter
from storage.snapshots.diff import Changes, read_upper
from storage.snapshots.faults import snapshot_error
from storage.snapshots.kernel import mounts_below, unmount
from storage.snapshots.limits import LayerLimits
from storage.snapshots.mounts import Mounts
from storage.snapshots.store import LAYER, OPAQUE_ROOT, short_name
from storage.snapshots.tree import Tree
from storage.snapshots.unpack import Unpacker
from storage.snapshots.workspace import OverlayWorkspace, mount_writable


class OverlaySnapshotter(LayeredSnapshotter):
    """Keeps a layer's own files, and whiteouts as overlayfs has them. Needs root.

    Layers are unpacked side by side: one waits for what is below only where it must look there.
    """

    name = "overlay"
    has_parts = True

    def __init__(self, root: Path, limits: LayerLimits | None = None) -> None:
        super().__init__(root, limits)
        self._mounts = Mounts(self._store.root)

    def mount(self, chain: Digest, name: str) -> Path:
        """Mount the snapshot read-only under *name*; see the port."""
        with self.hold(chain, "mounting"):
            layers = [f"{short_name(each)}/fs" for each in self._layers(chain, "mounting")]
            try:
                return self._mounts.mount(name, chain, self._store.published, layers)
            except OSError as exc:
                raise snapshot_error(chain, "mounting", exc) from exc

    def workspace(self, parent: Digest | None, name: str) -> OverlayWorkspace:
        """Open a writable tree on top of the snapshot *parent*; see the port."""
        below = None if parent in (None, EMPTY_CHAIN) else parent
        lower = None if below is None else self._tree(below, "standing on")
        layers = [] if below is None else [f"{short_name(each)}/fs" for each in self._layers(below, "standing on")]
        return OverlayWorkspace(self._store, parent, lower, name, layers=layers)

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`; does nothing where there is no such mount."""
        self._mounts.unmount(name)

    def unmount_idle(self, name: str, *, last_used_ns: int) -> str:
        """Undo a mount, unless it was asked for again since, or a process is in it."""
        return self._mounts.unmount_idle(name, last_used_ns=last_used_ns)

    def mounted(self) -> list[MountState]:
        """Return the live mounts, of which chain each is, and when it was asked for last."""
        return self._mounts.mounted()

    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name, those that an earlier process made too."""
        return self._mounts.mounts()

    def recover(self) -> list[str]:
        """Remove abandoned staging directories, unsure snapshots and mounts that show nothing published.

        A mount whose snapshot is there stays: mounts outlive the process that made them, and programs may
        run from them. :meth:`mounts` lists it, for whoever knows whether it is still wanted.
        """
        try:
            removed = self._store.recover()
            for name, chain in self._mounts.chains().items():
                if chain is None or not self._is_whole(chain):
                    self._mounts.unmount(name)
                    removed.append(f"mnt/{name}")
            return removed + self._mounts.recover()
        except OSError as exc:
            raise snapshot_error(str(self._store.root), "recovering", exc) from exc

    def _is_whole(self, chain: Digest) -> bool:
        try:
            self._store.chain(chain, "recovering")
        except SnapshotError:
            return False
        return True

    def _shown(self) -> Mapping[str, Path]:
        # Whatever the kernel has mounted of a layer: a killed process's workspace, too.
        return {name: point for point, line in mounts_below(self._store.root) for name in LAYER.findall(line)}

    def _new_ledger(self) -> None:
        return None

    def _tree(self, chain: Digest, doing: str) -> Tree:
        return Tree([bytes(self._store.files(each)) for each in self._layers(chain, doing)])

    def _layers(self, chain: Digest, doing: str) -> list[Digest]:
        """Return the layers that are seen in *chain*, uppermost first.

        Overlayfs ignores the opaque mark of a layer's root: what is below such a layer is left out here.
        """
        layers: list[Digest] = []
        for each in self._store.chain(chain, doing):
            layers.append(each)
            if self._has_opaque_root(each):
                break
        return layers

    def _has_opaque_root(self, chain: Digest) -> bool:
        return (self._store.path(chain) / OPAQUE_ROOT).exists()

    def _finish(
        self,
        unpacker: Unpacker,
        writer: AttributeWriter,
        staged: Path,
        parent: Digest | None,  # noqa: ARG002  # the unpacker knows what is below
    ) -> None:
        root = bytes(staged / "fs")
        for path in unpacker.directories:
            directory = root + b"/" + path
            # Only where there is something to hide: overlayfs shows whiteouts of a directory that it needn't
            # merge, and a single layer is mounted as it is.
            for name in unpacker.deleted_in(path):
                os.mknod(directory + b"/" + name, stat.S_IFCHR, 0)
            if unpacker.hides_below(path):
                if path:
                    os.setxattr(directory, "trusted.overlay.opaque", b"y")
                else:
                    (staged / OPAQUE_ROOT).touch()
            writer.write(directory, path, unpacker.attributes_of(path))

    def _own_changes(self, chain: Digest, parent: Digest | None) -> Changes | None:
        if not self._store.has_parent(chain, parent):
            return None
        lower = None if parent is None else self._tree(parent, "comparing")
        changes = read_upper(bytes(self._store.files(chain)), self._tree(chain, "comparing"), lower)
        if self._has_opaque_root(chain):
            changes.opaque.add(b"")
        return changes


def can_mount(root: Path) -> bool:
    """Tell whether this process can mount overlays of directories under *root*: by doing it."""
    if os.geteuid() != 0:
        return False
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=root, prefix="probe-") as scratch:
        base = Path(scratch)
        for directory in ("a", "b", "w", "w/fs"):
            (base / directory).mkdir()
        chain = Digest("probe")
        try:
            os.mknod(base / "a" / "whiteout", stat.S_IFCHR, 0)
            os.setxattr(base / "a", "trusted.overlay.opaque", b"y")
            mounts = Mounts(base / "mounts")
            mounts.mount("probe", chain, base, ["a", "b"])
            mounts.unmount("probe")
            # Some file systems serve for the layers and not for what is written to.
            unmount("probe", mount_writable("probe", base / "w", base, ["a", "b"]))
        except (OSError, SnapshotError):
            return False
    return True
