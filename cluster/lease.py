"""Leases: what keeps things from being collected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

LeaseId = NewType("LeaseId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A named, expiring hold on refs, blobs and images; pinned where *expires_wall_s* is None.

    Not to be confused with a flight's lease, which is its owner's right to go on.
    """

    id: LeaseId
    #: By the store's clock; None: pinned, never expires.
    expires_wall_s: float | None
    created_wall_s: float
    labels: dict[str, str] = field(default_factory=dict)
    #: ``ref:ID``, ``blob:DIGEST``, ``image:NAME``, sorted.
    resources: tuple[str, ...] = ()


def ref_resource(ref_id: str) -> str:
    """Name a ref as a lease's resource."""
    return f"ref:{ref_id}"


def blob_resource(digest: str) -> str:
    """Name a blob as a lease's resource."""
    return f"blob:{digest}"


def object_resource(key: str) -> str:
    """Name an object of the content store, which no record may name yet, as a lease's resource."""
    return f"object:{key}"


def tree_resource(tree: str) -> str:
    """Name a driver's directory as a lease's resource."""
    return f"tree:{tree}"


def image_resource(name: str) -> str:
    """Name an image as a lease's resource."""
    return f"image:{name}"
