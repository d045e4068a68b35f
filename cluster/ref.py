"""Refs: the entries of the cache, as they are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

from cluster.descriptor import Descriptor
from cluster.digest import Digest, blob_chain_id, chain_id
from cluster.errors import InvalidDescriptorError
from cluster.origin import decode_origin
from cluster.provider import ProviderHandle

#: A ref's ID is its blob chain ID: one record per blob chain ID (invariant I4) by construction.
RefId = NewType("RefId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefRecord:
    """One layer on top of a parent ref (or none). Immutable but for what merges into it.

    "Blob present" and "snapshot present" are facts of their own (:class:`BlobRecord`, the nodes'
    snapshots); nothing here says either.
    """

    #: Blob chain ID.
    id: RefId
    #: The layer: digest, size, media type, diff ID.
    blob: Descriptor
    #: The ref below; None for a lowest layer.
    parent: RefId | None
    #: Chain ID: names the extracted filesystem; equal for other compressions of the same chain.
    chain: Digest
    #: Chain ID of the parent; None for a lowest layer.
    parent_chain: Digest | None
    #: How many layers, this one included.
    depth: int
    #: Normalised image references it came from, sorted; grows by merging, never overwritten.
    image_refs: tuple[str, ...] = ()
    #: Wall-clock seconds by the store's clock.
    created_wall_s: float = 0.0
    #: What it is, for people; the first that was given stays.
    description: str = ""
    #: What it was made of, as texts of :mod:`cluster.origin`, the newest first, merged by
    #: :func:`cluster.origin.merge_origins`. Empty: it was pulled, or is from before this was recorded.
    origins: tuple[str, ...] = ()

    @classmethod
    def over(cls, blob: Descriptor, parent: RefRecord | None, image_ref: str | None = None) -> RefRecord:
        """Return the record of *blob* on top of *parent*.

        Raises:
            InvalidDescriptorError: the descriptor has no diff ID.
        """
        if blob.diff_id is None:
            raise InvalidDescriptorError(blob.digest, "it has no diff ID, so its chain can't be named")
        below = None if parent is None else Digest(parent.id)
        return cls(
            id=RefId(blob_chain_id(below, blob.digest, blob.diff_id)),
            blob=blob,
            parent=None if parent is None else parent.id,
            chain=chain_id(None if parent is None else parent.chain, blob.diff_id),
            parent_chain=None if parent is None else parent.chain,
            depth=1 if parent is None else parent.depth + 1,
            image_refs=() if image_ref is None else (image_ref,),
            description="" if image_ref is None else f"pulled from {image_ref}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefUsage:
    """When and how often a ref was used."""

    last_used_wall_s: float
    usage_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob that is present: complete, in S3 under *key*, and hashing to its digest (invariant I2)."""

    digest: Digest
    #: Object key; unique to the upload that made it (``blobs/sha256/HEX/NONCE``).
    key: str
    size_bytes: int
    etag: str
    #: Fence under which it was committed.
    fence: int
    #: ``registry/repository`` that all its bytes were read from; empty where that were several, or isn't known.
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefState:
    """A record with the facts around it, read in one go."""

    record: RefRecord
    #: None: the ref is lazy.
    present: BlobRecord | None
    #: Every provider known for its digest.
    providers: tuple[ProviderHandle, ...]

    @property
    def is_lazy(self) -> bool:
        """Tell whether the blob is not in the content store."""
        return self.present is None

    @property
    def may_be_asked(self) -> Iterator[ProviderHandle]:
        """Yield where may be asked whether a caller may have it: for the blob, or for what it was made of."""
        yield from self.providers
        for text in self.record.origins:
            for need in decode_origin(text):
                yield from need.providers


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainUse:
    """Who needs a chain ID, and with it its snapshots."""

    #: Refs that have it, sorted.
    refs: tuple[RefId, ...]
    #: IDs of live leases that hold one of these, sorted.
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """An image that was resolved: its manifest and config are in the content store, its layers are refs."""

    #: Normalised reference, e.g. ``docker.io/library/debian:12``.
    name: str
    #: Manifest (never an index) and config as stored.
    manifest: Descriptor
    config: Descriptor
    #: ``os/architecture[/variant]``.
    platform: str
    #: Layers, lowest first.
    layers: tuple[Descriptor, ...]
    #: The top ref; None for an image without layers.
    ref: RefId | None
    created_wall_s: float = 0.0
