"""What flights are made of: fences, upload progress, outcomes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ref import BlobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The right of one owner to write for one key; compared for equality, all three parts.

    ``number`` rises for ever in the life of one Redis data set; ``epoch`` names that data set's
    incarnation and ``token`` the owner, so a fail-over that loses the last writes can't hand a number
    out twice to owners that are taken for each other.
    """

    key: str
    epoch: str
    number: int
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadState:
    """An unfinished multi-part upload, as the next owner needs it to resume.

    ``parts`` may lag behind what S3 has (the owner died in between): S3's list of parts is the truth.
    """

    key: str
    upload_id: str
    part_bytes: int
    #: Part number (from 1) to ETag.
    parts: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """Nothing to do: the blob is there."""

    blob: BlobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """The caller owns the flight; *upload* is what an earlier owner left, if any."""

    fence: Fence
    upload: UploadState | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Another owns it; the caller is recorded as a waiter."""

    fence_number: int
    #: Worker that owns the flight.
    owner: str
    current_bytes: int
    total_bytes: int
    #: Seconds until the owner's lease lapses unless it renews.
    lease_remaining_s: float
    #: The span that its owner works under, as a ``traceparent``; "" where it is not traced.
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborting:
    """The flight's last waiter has gone and its owner is stopping: wait for that, then start afresh."""

    fence_number: int
    lease_remaining_s: float


#: Where a blob is, or comes from, without one's own doing.
Elsewhere = Present | Joined | Aborting
JoinOutcome = Elsewhere | Owned


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Bytes so far; told to those who listen, not kept."""

    fence_number: int
    current_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The blob is present."""

    fence_number: int
    blob: BlobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The flight failed; *error* is the wire form of the error. For those who waited, never for late arrivals."""

    fence_number: int
    error: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacated:
    """The owner gave up its ownership without an outcome (handed over or aborted): join again."""

    fence_number: int


FlightEvent = Progressed | Committed | Failed | Vacated
