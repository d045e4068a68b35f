"""What verifying present blobs comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from cluster.digest import Digest
from cluster.ref import BlobRecord


class FaultKind(StrEnum):
    """What can be wrong with a blob that is recorded as present."""

    #: The content store has no such object.
    MISSING = "missing"
    #: Its bytes hash to another digest.
    DAMAGED = "damaged"
    #: The content store does not give it, or it could not be repaired: nothing is known of its bytes.
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFault:
    """A blob that is not what its record says."""

    digest: Digest
    #: Of its object; for a node's copy, the file's path.
    key: str
    size_bytes: int
    kind: FaultKind
    #: For people.
    reason: str
    #: It is lazy again, and fetched anew when somebody needs it; a node's copy is dropped.
    is_repaired: bool = False
    #: Key under which the damaged bytes are kept for a while; "" for none.
    quarantine: str = ""
    #: Node whose copy it is; "": the object in the content store.
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was read, and what was wrong with it."""

    blobs: int = 0
    size_bytes: int = 0
    faults: tuple[BlobFault, ...] = ()

    def __add__(self, other: Verified) -> Verified:
        """Return both together."""
        return Verified(
            blobs=self.blobs + other.blobs,
            size_bytes=self.size_bytes + other.size_bytes,
            faults=self.faults + other.faults,
        )

    @property
    def unrepaired(self) -> tuple[BlobFault, ...]:
        """Return the faults that are still there."""
        return tuple(fault for fault in self.faults if not fault.is_repaired)


def batches(blobs: Iterable[BlobRecord], *, most: int, most_bytes: int) -> list[list[BlobRecord]]:
    """Return the blobs in batches of up to *most*, and of up to *most_bytes* unless it is one alone; in their order."""
    found: list[list[BlobRecord]] = []
    left_bytes = 0
    for blob in blobs:
        if not found or len(found[-1]) == most or blob.size_bytes > left_bytes:
            found.append([])
            left_bytes = most_bytes
        found[-1].append(blob)
        left_bytes -= blob.size_bytes
    return found
