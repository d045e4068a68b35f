"""The audit stream's entries: who had what done with which layer, as whom, from where, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.collect.ports import Doomed
from cluster.collect.sweep import NAMELESS
from cluster.collect.verify import BlobFault
from cluster.ref import BlobRecord

#: Digits of an identity that an entry keeps: enough to tell accounts apart.
_HANDLE_CHARS = 12


class Operation(StrEnum):
    """What was done."""

    #: An image's manifest was read, and refs were made of its layers (``pull``) or not (``resolve``).
    PULL = "pull"
    RESOLVE = "resolve"
    #: Somebody needed a layer: ``fetched`` by a flight of its own process that it began, ``joined`` another's,
    #: ``present``.
    UNLAZY = "unlazy"
    #: An owner's attempt to bring a layer to the content store ended: ``committed``, ``failed`` or ``vacated``.
    FETCH = "fetch"
    #: A flight was owned anew because its owner, the *source*, had died: ``resumed`` what it left, or ``afresh``.
    TAKE_OVER = "take-over"
    #: A node's disk got a layer from the content store.
    DOWNLOAD = "download"
    #: A chain was brought to a node.
    EXTRACT = "extract"
    #: A manifest was pushed; and a layer, with how it got there: ``exists``, ``mounted``, ``uploaded``, ``foreign``.
    PUSH = "push"
    PUSH_LAYER = "push-layer"
    #: An image was made of a chain; a remote cache was written, or read.
    ASSEMBLE = "assemble"
    EXPORT_CACHE = "export_cache"
    IMPORT_CACHE = "import_cache"
    #: A job was asked to be cancelled.
    CANCEL = "cancel"
    #: A ref or an image was collected; an object was deleted.
    PRUNE = "prune"
    DELETE = "delete"
    #: A blob was found ``missing``, ``damaged`` or ``unreadable`` by who looked for that; *source* is the node whose
    #: copy it is, or the quarantine that its bytes are kept in.
    VERIFY = "verify"
    #: A blob that was present turned lazy: its object, the *source*, is gone or damaged.
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the audit stream. It holds no credential, and no text that came from a registry.

    What is unknown, or makes no sense of an operation, is "" or 0.
    """

    #: An :class:`Operation`, or what a later release has.
    operation: str
    #: ``ok``, ``failed``, ``cancelled``, or what :class:`Operation` says.
    outcome: str = "ok"
    #: Whose session it was done for, a driver's or a job's.
    who: str = ""
    job: str = ""
    #: Digest of the job's vertex that waited for it.
    vertex: str = ""
    #: Names the credentials that were used, :func:`handle_of`; ``anonymous`` for none.
    credential: str = ""
    #: Actor, process or driver that did it.
    by: str = ""
    #: Of the blob, or the manifest.
    digest: str = ""
    #: Ref's ID.
    ref: str = ""
    #: Image's name.
    image: str = ""
    #: Where it came from, or went: ``registry/repository`` (a mirror's own), ``s3``, ``snapshot``, or a worker.
    source: str = ""
    #: Bytes of the blob, and those that this step moved from or to *source*.
    size_bytes: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    #: Number of the flight's owner.
    fence: int = 0
    #: Type of the error.
    error: str = ""
    #: When it was written, by the store's clock.
    wall_s: float = 0.0

    @property
    def rate(self) -> float:
        """Return the bytes a second that were moved; 0 where none were, or in no time."""
        return self.moved_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which entries somebody wants to see; "" asks for nothing."""

    #: A job's ID, or how that begins.
    job: str = ""
    #: A blob's or manifest's digest, or how that begins.
    digest: str = ""
    operation: str = ""

    def matches(self, entry: AuditEntry) -> bool:
        """Tell whether it is one of them."""
        return (
            entry.job.startswith(self.job)
            and entry.digest.startswith(self.digest)
            and self.operation in ("", entry.operation)
        )


def handle_of(identity: str) -> str:
    """Return the credential handle of who somebody is to a registry (:meth:`cluster.ports.Authorizer.identity`)."""
    return identity[:_HANDLE_CHARS]


def outcome_of(error: BaseException) -> str:
    """Return how something ended that raised *error*: ``cancelled`` or ``failed``."""
    # By what it is not: a cancellation is no Exception, and neither is what ends a process.
    return "failed" if isinstance(error, Exception) else "cancelled"


def error_of(error: BaseException) -> str:
    """Return the type of an error, for an entry: what it says may have come from anywhere."""
    return type(error).__name__ if isinstance(error, Exception) else ""


def absence(blob: BlobRecord) -> AuditEntry:
    """Return the entry of a present blob that turned lazy."""
    return AuditEntry(
        operation=Operation.ABSENT, digest=blob.digest, source=blob.key, size_bytes=blob.size_bytes, fence=blob.fence
    )


def fault_entry(fault: BlobFault) -> AuditEntry:
    """Return the entry of a blob, or a node's copy, that is not what its record says."""
    return AuditEntry(
        operation=Operation.VERIFY,
        outcome=fault.kind,
        digest=fault.digest,
        source=fault.node or fault.quarantine,
        size_bytes=fault.size_bytes,
    )


def deletion(doomed: Doomed) -> AuditEntry:
    """Return the entry of an object that was deleted."""
    digest = "" if doomed.digest == NAMELESS else doomed.digest
    return AuditEntry(operation=Operation.DELETE, digest=digest, source=doomed.key)


class NoAudit:
    """Notes nothing."""

    def note(self, *entries: AuditEntry) -> None:
        """Note nothing."""
