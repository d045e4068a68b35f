"""The ports: what the farm needs of the world, as Protocols.

Adapters live in ``storage/``, verified fakes in ``storage/memory.py``; each port has one contract
suite in ``tests/contract/`` that every implementation passes.

Two kinds. *Control* ports are asynchronous and small. *Byte* ports are synchronous and are called
from threads with the caller's buffers, because that is what measured fastest (one event loop caps a
process at a third of what four threads reach).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from cluster.descriptor import Descriptor
from cluster.digest import Digest

# -- bytes ------------------------------------------------------------------------------------------


class ByteStream(Protocol):
    """Bytes that are read once, in order, by one thread."""

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes into *buffer*; block until there is at least one.

        Returns:
            How many bytes were read; 0 at the end.

        Raises:
            ClusterError: the rest can't be had.
        """
        ...


# -- snapshots ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLayer:
    """What unpacking a layer came to."""

    #: Digest of the uncompressed tar as it was read.
    diff_id: Digest
    #: Length of the uncompressed tar.
    tar_bytes: int
    #: Bytes of regular files that the layer brought.
    content_bytes: int
    #: Tar entries applied.
    entries: int
    #: False where another had published this snapshot first, and what was unpacked here was dropped.
    was_published: bool


class Snapshotter(Protocol):
    """One node's extracted snapshots: at most one a chain ID, each complete or not there.

    Synchronous and thread-safe. A snapshot is unpacked in a staging directory and published by a
    rename, so a crash leaves only staging directories, which :meth:`recover` removes; a second
    process that publishes the same chain finds it there and drops its own work (invariant I4).
    """

    #: ``overlay`` or ``copying``.
    name: str

    def has(self, chain: Digest) -> bool:
        """Tell whether the snapshot of *chain* is published on this node."""
        ...

    def apply(
        self,
        *,
        chain: Digest,
        parent: Digest | None,
        layer: Descriptor,
        stream: ByteStream,
        await_parent: Callable[[], None],
    ) -> AppliedLayer:
        """Unpack *stream*, the blob of *layer* as stored, on top of *parent*, and publish it as *chain*.

        Whiteouts and opaque directories, hard links, device nodes, FIFOs, xattrs, owners, modes, times,
        sparse files and long names are kept. An entry never leaves the root, through symlinks either.
        The stream's own digest is the caller's affair; the diff ID is checked here, before publishing.

        Args:
            chain: Chain ID under which to publish.
            parent: Chain ID of the snapshot below; None for the lowest layer.
            layer: Its descriptor: compression and expected diff ID.
            stream: The blob's bytes; may still be arriving.
            await_parent: Blocks until *parent* is published (raises if it won't be). Called only when
                the lower layers must be seen (a directory missing from the tar, a link into a lower
                layer), and in any case before publishing, so that layers unpack in parallel exactly
                where that is exact.

        Raises:
            LayerError: the layer is truncated or malformed, or (UnsafeEntryError) leaves its root.
            UnprivilegedEntryError: without root, an entry can't be made and its absence would show.
            DiffIdMismatchError: it unpacks to another diff ID; nothing is published.
            SnapshotError: the disk refused.
            ClusterError: whatever *stream* or *await_parent* raised, unchanged.
        """
        ...

    def mount(self, chain: Digest, name: str) -> Path:
        """Mount the snapshot *chain* read-only under *name* and return the path; idempotent.

        Raises:
            SnapshotError: it is not published here, or the kernel refused.
        """
        ...

    def unmount(self, name: str) -> None:
        """Undo :meth:`mount`; does nothing where there is no such mount."""
        ...

    def mounts(self) -> dict[str, Path]:
        """Return the live mounts by name."""
        ...

    def snapshots(self) -> Iterable[Digest]:
        """List the published snapshots."""
        ...

    def remove(self, chain: Digest) -> None:
        """Remove the snapshot; does nothing where there is none. The caller knows that nothing needs it."""
        ...

    def diff(self, chain: Digest, parent: Digest | None, out: BinaryIO) -> Digest:
        """Write the uncompressed layer tar that makes *chain* out of *parent*; return its diff ID.

        Entries are sorted by path, so that one tree gives one tar. What could not be made without
        root and was recorded beside the snapshot is restored from there.
        """
        ...

    def recover(self) -> list[str]:
        """Remove what a killed process left (staging directories, stale mounts); return what it removed."""
        ...
