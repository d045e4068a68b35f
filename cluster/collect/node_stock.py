"""What lies on a node's disk, as it is at one moment, with who needs it: snapshots, cached blobs, cache mounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.collect.values import Item, ItemKind
from cluster.digest import Digest
from cluster.fetch.extract import mount_name
from cluster.ref import ChainUse

_NS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotState:
    """A snapshot that is published."""

    chain: Digest
    #: What it stands on, where that must be there as long as it is.
    parent: Digest | None
    #: Bytes on the disk, of its own.
    size_bytes: int
    created_wall_s: float
    #: Wall-clock nanoseconds, exactly as kept: what was used since is told by that.
    last_used_ns: int
    #: A process has it.
    is_locked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MountState:
    """A snapshot that is mounted."""

    name: str
    chain: Digest
    #: When it was asked for last, as of a snapshot.
    last_used_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobState:
    """A compressed blob in the node's cache."""

    digest: Digest
    size_bytes: int
    last_used_ns: int
    #: It is being read by this process.
    is_read: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """A directory of a cache mount."""

    #: Names the directory.
    name: str
    #: The cache's ID, as its ops have it.
    id: str
    size_bytes: int
    last_used_ns: int
    #: A command has it.
    is_locked: bool


@dataclass(frozen=True, kw_only=True)
class NodeStock:
    """Everything that a node's collection looks at. What is removed is looked at again, under its lock."""

    snapshots: Sequence[SnapshotState]
    mounts: Sequence[MountState]
    blobs: Sequence[BlobState]
    caches: Sequence[CacheState]
    #: Of every snapshot's chain; None: nobody could be asked, and all are taken to be held.
    uses: Mapping[Digest, ChainUse] | None
    #: Of chains, for people.
    descriptions: Mapping[Digest, str] = field(default_factory=dict)

    def items(self) -> list[Item]:
        """Return what can be collected."""
        return [item for _, item in self._items()]

    def states(self) -> Mapping[str, SnapshotState | BlobState | CacheState]:
        """Return what each item is, by its ID."""
        return {item.id: state for state, item in self._items()}

    def mounts_of(self, chain: Digest) -> list[MountState]:
        """Return the mounts of a chain that extracts made: they end when no lease holds it and its room is wanted."""
        return [mount for mount in self.mounts if mount.chain == chain and mount.name == mount_name(chain)]

    def _items(self) -> list[tuple[SnapshotState | BlobState | CacheState, Item]]:
        found: list[tuple[SnapshotState | BlobState | CacheState, Item]] = []
        found += [(snapshot, self._snapshot(snapshot)) for snapshot in self.snapshots]
        found += [(blob, _blob(blob)) for blob in self.blobs]
        found += [(cache, _cache(cache)) for cache in self.caches]
        return found

    def _snapshot(self, snapshot: SnapshotState) -> Item:
        held_by = self._holder(snapshot)
        return Item(
            id=_snapshot_id(snapshot.chain),
            parents=() if snapshot.parent is None else (_snapshot_id(snapshot.parent),),
            size_bytes=snapshot.size_bytes,
            created_wall_s=snapshot.created_wall_s,
            last_used_wall_s=snapshot.last_used_ns / _NS,
            is_held=bool(held_by),
            held_by=held_by,
            description=self.descriptions.get(snapshot.chain, ""),
        )

    def _holder(self, snapshot: SnapshotState) -> str:
        if snapshot.is_locked:
            return "a process"
        for mount in self.mounts:
            if mount.chain == snapshot.chain and mount.name != mount_name(snapshot.chain):
                return f"mount {mount.name}"
        if self.uses is None:
            return "perhaps a lease: the farm's records can't be read"
        use = self.uses.get(snapshot.chain)
        return f"lease {use.holders[0]}" if use is not None and use.holders else ""


def _snapshot_id(chain: Digest) -> str:
    return f"snapshot {chain}"


def _blob(blob: BlobState) -> Item:
    used_wall_s = blob.last_used_ns / _NS
    return Item(
        id=f"blob {blob.digest}",
        size_bytes=blob.size_bytes,
        created_wall_s=used_wall_s,
        last_used_wall_s=used_wall_s,
        is_held=blob.is_read,
        held_by="a process" if blob.is_read else "",
    )


def _cache(cache: CacheState) -> Item:
    used_wall_s = cache.last_used_ns / _NS
    return Item(
        id=f"cache {cache.name}",
        kind=ItemKind.CACHE_MOUNT,
        size_bytes=cache.size_bytes,
        created_wall_s=used_wall_s,
        last_used_wall_s=used_wall_s,
        is_held=cache.is_locked,
        held_by="a command" if cache.is_locked else "",
        description=cache.id,
    )
