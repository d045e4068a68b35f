"""What both snapshotters do alike: unpack a layer in staging, check it, publish it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar

from cluster.collect.node_stock import MountState, SnapshotState
from cluster.descriptor import Descriptor
from cluster.digest import EMPTY_CHAIN, Digest
from cluster.disk_room import Spend, unbounded
from cluster.errors import DiffIdMismatchError, LayerError, SnapshotGoneError
from cluster.faultpoints import FaultPoint, hit
from cluster.ports import AppliedLayer, ByteStream
from storage.snapshots.attributes import AttributeWriter, Ledger
from storage.snapshots.diff import Changes, compare, write_layer
from storage.snapshots.faults import snapshot_error
from storage.snapshots.inflate import DamagedStreamError, LayerStream
from storage.snapshots.limits import LayerLimits, LayerMeter
from storage.snapshots.names import shown
from storage.snapshots.store import Store
from storage.snapshots.tar import TarError, TarReader
from storage.snapshots.tree import Tree
from storage.snapshots.unpack import DEFAULT_DIRECTORY, Unpacker
from storage.snapshots.workspace import StagedWorkspace


class LayeredSnapshotter(ABC):
    """A :class:`cluster.ports.Snapshotter` but for what a snapshot looks like on disk.

    Args:
        root: A directory of the node; several snapshotters and processes may share it.
        limits: How much one layer may come to; None: as the configuration has it by default.
    """

    name: str
    #: A snapshot has its own layer's files only: those below are needed as long as it is there.
    has_parts: ClassVar[bool]

    def __init__(self, root: Path, limits: LayerLimits | None = None) -> None:
        self._limits = limits or LayerLimits()
        try:
            self._store = Store(root / self.name, shown=self._shown, has_parts=self.has_parts)
            self._empty = self._store.root / "empty"
            self._empty.mkdir(exist_ok=True, mode=0o755)
            AttributeWriter(_implied_owner()).write(bytes(self._empty), b"", DEFAULT_DIRECTORY)
        except OSError as exc:
            raise snapshot_error(str(root), "opening", exc) from exc

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store.root.parent)!r})"

    # -- what differs --

    @abstractmethod
    def _new_ledger(self) -> Ledger | None:
        """Return where to record what can't be made; None where everything must be."""

    @abstractmethod
    def _tree(self, chain: Digest, doing: str) -> Tree:
        """Return the tree of a published snapshot."""

    @abstractmethod
    def _finish(self, unpacker: Unpacker, writer: AttributeWriter, staged: Path, parent: Digest | None) -> None:
        """Make of the unpacked layer in ``staged/fs`` what is published; *parent* is there."""

    @abstractmethod
    def _own_changes(self, chain: Digest, parent: Digest | None) -> Changes | None:
        """Return what *chain* changes of *parent* where that can be read off; None where trees must be compared."""

    @abstractmethod
    def _shown(self) -> Mapping[str, Path]:
        """Return where snapshots are seen through a mount, by their names."""

    @abstractmethod
    def workspace(self, parent: Digest | None, name: str) -> StagedWorkspace:
        """Open a writable tree on top of the snapshot *parent*; see the port."""

    @abstractmethod
    def mount(self, chain: Digest, name: str) -> Path:
        """Mount the snapshot *chain* read-only under *name*; see the port."""

    @abstractmethod
    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`; does nothing where there is no such mount."""

    @abstractmethod
    def unmount_idle(self, name: str, *, last_used_ns: int) -> str:
        """Undo a mount, unless it was asked for again since, or a process is seen to be in it.

        Args:
            name: Which; one that isn't there is undone already.
            last_used_ns: When it was asked for last, as far as the caller knows; see :meth:`mounted`.

        Returns:
            "" if it is gone, else why it stays.
        """

    @abstractmethod
    def mounted(self) -> list[MountState]:
        """Return the live mounts, of which chain each is, and when it was asked for last."""

    @abstractmethod
    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name."""

    @abstractmethod
    def recover(self) -> list[str]:
        """Remove what a killed process left; see the port."""

    # -- the port --

    def has(self, chain: Digest) -> bool:
        """Tell whether the snapshot of *chain* is published on this node."""
        return chain == EMPTY_CHAIN or self._store.info(chain) is not None

    def use(self, chain: Digest) -> bool:
        """Mark a snapshot used; tell whether it is here. See the port."""
        try:
            with self.hold(chain, "using"):
                return True
        except SnapshotGoneError:
            return False

    @contextmanager
    def hold(self, chain: Digest, doing: str) -> Iterator[None]:
        """Keep the snapshot of *chain*, or the empty one, from being removed while the body runs; it is used now.

        Args:
            chain: Which.
            doing: What for, for errors.

        Raises:
            SnapshotGoneError: it is not published here.
        """
        with ExitStack() as held:
            if chain != EMPTY_CHAIN:
                try:
                    held.enter_context(self._store.hold(chain, doing))
                except OSError as exc:
                    raise snapshot_error(chain, doing, exc) from exc
            yield

    def apply(
        self,
        *,
        chain: Digest,
        parent: Digest | None,
        layer: Descriptor,
        stream: ByteStream,
        await_parent: Callable[[], None],
        spend: Spend = unbounded,
    ) -> AppliedLayer:
        """Unpack a layer and publish it; see the port."""
        below = None if parent == EMPTY_CHAIN else parent
        is_held = False

        def lower() -> Tree | None:
            nonlocal is_held
            if below is None:
                return None
            if not is_held:
                await_parent()
                held.enter_context(self._store.hold(below, "unpacking onto"))
                is_held = True
            return self._tree(below, "unpacking onto")

        try:
            with ExitStack() as held, self._store.stage() as staged:
                files = staged / "fs"
                files.mkdir(mode=0o700)
                writer = AttributeWriter(self._new_ledger())
                meter = LayerMeter(layer.digest, self._limits, spend)
                with Unpacker(
                    layer=layer.digest, root=bytes(files), writer=writer, lower=lower, meter=meter
                ) as unpacker:
                    diff_id, tar_bytes = _unpack(unpacker, layer, stream, meter)
                    hit(FaultPoint.EXTRACT_APPLIED)
                    if layer.diff_id is not None and diff_id != layer.diff_id:
                        raise DiffIdMismatchError(layer.digest, layer.diff_id, diff_id)
                    lower()
                    self._finish(unpacker, writer, staged, below)
                return AppliedLayer(
                    diff_id=diff_id,
                    tar_bytes=tar_bytes,
                    content_bytes=unpacker.content_bytes,
                    entries=unpacker.entries,
                    was_published=self._store.publish(staged, chain=chain, parent=below, diff_id=diff_id),
                )
        except OSError as exc:
            raise snapshot_error(chain, "unpacking", exc) from exc

    def tree(self, chain: Digest) -> Tree:
        """Return the tree of a published snapshot, or of the empty chain, to be read without mounting it.

        It shows the owners and devices that could only be recorded, too. The caller holds it (:meth:`hold`).

        Raises:
            SnapshotError: it is not published here, or the disk refused.
        """
        if chain == EMPTY_CHAIN:
            return Tree([bytes(self._empty)], _implied_owner())
        try:
            return self._tree(chain, "reading")
        except OSError as exc:
            raise snapshot_error(chain, "reading", exc) from exc

    def snapshots(self) -> Iterable[Digest]:
        """List the published snapshots."""
        return self._store.snapshots()

    def states(self) -> list[SnapshotState]:
        """Return the published snapshots with what they take; the first look at one measures that.

        Raises:
            SnapshotError: the disk refused.
        """
        try:
            return self._store.states()
        except OSError as exc:
            raise snapshot_error(str(self._store.root), "looking at", exc) from exc

    def remove(self, chain: Digest, *, last_used_ns: int | None = None) -> str:
        """Remove the snapshot unless it is used; see the port."""
        try:
            return self._store.remove(chain, last_used_ns=last_used_ns)
        except OSError as exc:
            raise snapshot_error(chain, "removing", exc) from exc

    def diff(self, chain: Digest, parent: Digest | None, out: BinaryIO) -> Digest:
        """Write the layer tar that makes *chain* out of *parent*; see the port."""
        below = None if parent == EMPTY_CHAIN else parent
        try:
            with self.hold(chain, "comparing"), self.hold(below or EMPTY_CHAIN, "comparing"):
                return self._diff(chain, below, out)
        except OSError as exc:
            raise snapshot_error(chain, "comparing", exc) from exc

    def _diff(self, chain: Digest, below: Digest | None, out: BinaryIO) -> Digest:
        changes = self._own_changes(chain, below)
        if changes is None:
            changes = compare(
                None if chain == EMPTY_CHAIN else self._tree(chain, "comparing"),
                None if below is None else self._tree(below, "comparing"),
            )
        return write_layer(changes, out)

    def settle(self) -> int:
        """Flush what was published to the disk, so that a crash of the machine doesn't cost it; return how much.

        Until then a snapshot lasts as long as the machine does. May take seconds; once a minute is plenty.
        """
        try:
            return self._store.settle()
        except OSError as exc:
            raise snapshot_error(str(self._store.root), "settling", exc) from exc


def _implied_owner() -> Ledger | None:
    """Return a ledger by which all belongs to root, for a tree that is ours without root; None where we are root."""
    return Ledger(owner_is_root=True) if os.geteuid() else None


def _unpack(unpacker: Unpacker, layer: Descriptor, stream: ByteStream, meter: LayerMeter) -> tuple[Digest, int]:
    """Unpack a whole stream; return diff ID and length of its tar."""
    try:
        with LayerStream(stream, layer.compression) as source:

            def next_buffer() -> memoryview | None:
                view = source.next()
                if view is not None:
                    meter.read(len(view))
                return view

            reader = TarReader(next_buffer)
            while (entry := reader.next()) is not None:
                unpacker.add(entry, reader)
            reader.drain()
            return source.digest, source.length
    except TarError as exc:
        raise LayerError(layer.digest, shown(exc.entry), exc.reason) from exc
    except DamagedStreamError as exc:
        raise LayerError(layer.digest, "", f"its {layer.compression.value} stream is damaged: {exc}") from exc
