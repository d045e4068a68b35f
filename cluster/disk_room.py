"""Who may have how much of a node's disk: first come, first served, and never more than there is.

What is reserved and not yet written is not free, though the disk says so. Who asks for more than is left waits in
line, and nobody behind it is served from what it waits for: a big one is never starved by many small ones. Who only
has an estimate says how little will do as well: that is what it gets where nobody is left who could give room back,
and it asks again, by its old place in line, once it needs more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.descriptor import Compression, Descriptor
from cluster.digest import Digest

#: What an entry of a layer takes beside its length in the tar, at most: the rest of its last block. Its inode and its
#: place in a directory are less than its header in the tar.
ENTRY_BYTES: Final = 4096
#: What a tar comes to of a byte of its blob, mostly: layers of distributions, and of packages for Python and Node.js.
_RATIO: Final = {Compression.NONE: 1.0, Compression.GZIP: 2.75, Compression.ZSTD: 3.0}
#: What the smallest layer is taken for: asking again costs more than this.
_SMALLEST_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one reservation has been given of a disk, and what it waits for."""

    #: Its place in line: who came earlier has a lower one.
    ticket: int
    #: What it is for, for people.
    what: str
    #: Whose it is, for people: 0 is nobody's.
    pid: int = 0
    #: Bytes that it may still write.
    held_bytes: int = 0
    #: Bytes that it waits for besides; None: it waits for nothing.
    asked_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The bytes are given."""

    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """There is not enough yet."""

    #: Bytes that must become free until it is this one's turn.
    missing_bytes: int
    #: Nobody who came earlier waits, so it is for this one to make room.
    is_first: bool


Admission = Admitted | Short


def free_beyond(claims: Iterable[Claim], *, free_bytes: int, headroom_bytes: int) -> int:
    """Return the bytes that are nobody's: neither reserved nor to be left alone; negative where others took those."""
    return free_bytes - headroom_bytes - sum(claim.held_bytes for claim in claims)


def admit(
    ticket: int,
    others: Sequence[Claim],
    *,
    asked_bytes: int,
    least_bytes: int,
    held_bytes: int = 0,
    free_bytes: int,
    headroom_bytes: int,
    is_last: bool = False,
) -> Admission:
    """Decide whether one who asks is given what is asked.

    Args:
        ticket: Its place in line.
        others: All other claims on the disk.
        asked_bytes: What it likely needs.
        least_bytes: What it needs in any case; at most *asked_bytes*.
        held_bytes: What it has been given already and not written yet.
        free_bytes: What the disk says, read after *others*: so what is written meanwhile counts twice, not never.
        headroom_bytes: What must be left.
        is_last: It won't wait any longer, and takes less.
    """
    left = free_beyond(others, free_bytes=free_bytes, headroom_bytes=headroom_bytes) - held_bytes
    ahead = [other.asked_bytes for other in others if other.asked_bytes is not None and other.ticket < ticket]
    left_bytes = left - sum(ahead)
    if asked_bytes <= left_bytes:
        return Admitted(asked_bytes)
    is_alone = not ahead and not any(other.held_bytes for other in others)
    if (is_last or is_alone) and least_bytes <= left_bytes:
        return Admitted(left_bytes)
    return Short(missing_bytes=asked_bytes - left_bytes, is_first=not ahead)


# -- how much -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing that is to come onto the disk, whoever brings it: those who want the same thing reserve it once."""

    #: ``blob:DIGEST`` or ``snapshot:CHAIN``, or of its own.
    key: str
    #: Bytes that it will likely come to.
    likely_bytes: int
    #: Bytes that it will come to in any case.
    least_bytes: int

    @classmethod
    def of_blob(cls, digest: Digest, size_bytes: int) -> Part:
        """Return the part that is a blob as stored."""
        return cls(key=f"blob:{digest}", likely_bytes=size_bytes, least_bytes=size_bytes)


def snapshot_parts(
    layers: Sequence[tuple[Digest, Descriptor]],
    lacking: Collection[Digest],
    known_bytes: Callable[[Digest], int | None],
    *,
    are_whole: bool,
) -> list[Part]:
    """Return the parts that are snapshots.

    Args:
        layers: Chain ID and layer of each of an image, the lowest first.
        lacking: Chain IDs of those that are to be unpacked.
        known_bytes: Gives what a layer came to when it was unpacked; None where that isn't known.
        are_whole: A snapshot has its parents' files, too, not its layer's alone.
    """
    parts = []
    below_bytes = 0
    for chain, layer in layers:
        known = known_bytes(layer.digest)
        likely = _likely_bytes(layer) if known is None else known
        if chain in lacking:
            # What a layer replaces of those below isn't there twice: only its own files are certain.
            least = layer.size_bytes if known is None else known
            parts.append(Part(key=snapshot_key(chain), likely_bytes=below_bytes + likely, least_bytes=least))
        if are_whole:
            below_bytes += likely
    return parts


def snapshot_key(chain: Digest) -> str:
    """Return the key of a snapshot's part."""
    return f"snapshot:{chain}"


def taken_bytes(tar_bytes: int, entries: int) -> int:
    """Return what an unpacked layer takes of the disk, at most."""
    return tar_bytes + entries * ENTRY_BYTES


def _likely_bytes(layer: Descriptor) -> int:
    return max(_SMALLEST_BYTES, int(layer.size_bytes * _RATIO[layer.compression]))


# -- what reserves --------------------------------------------------------------------------------------------

#: Is told what is waited for, in words, now and then as long as it is.
OnWait = Callable[[str], Awaitable[None]]
#: Is told before so many bytes are written; returns once they are reserved.
Spend = Callable[[int], None]


def unbounded(count_bytes: int) -> None:
    """Let bytes be written that nobody counts: a :data:`Spend`."""


class NodeDisk(Protocol):
    """The disk of a node, on which nothing is written that was not reserved."""

    def reserved(
        self, what: str, parts: Sequence[Part], on_wait: OnWait, *, wait_s: float | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Reserve *parts*, all or none, for as long as the body runs; those that are reserved here already are shared.

        Args:
            what: What it is for, for people.
            parts: What is to come; of one that turns out bigger, more is asked for when it does.
            on_wait: Is told while there is not enough room.
            wait_s: Seconds to wait for room; None: as configured.

        Raises:
            NodeDiskError: there was not enough, and nothing became free in time; or it is more than the whole disk.
        """
        ...

    def allocating(self, what: str, part: Part) -> AbstractContextManager[None]:
        """Reserve *part* for a body that takes all its bytes from the disk at once. Blocks, but doesn't wait for room.

        Unless it was reserved here before, and that is used up: then more is waited for.

        Raises:
            NodeDiskError: there is no room for it just now.
        """
        ...

    def spending(self, key: str, checkpoint: Callable[[], None]) -> AbstractContextManager[Spend]:
        """Write, within the body, what was reserved under *key*; left without an error, the rest is given back.

        What is given is called, by one thread, before bytes are written; it asks for more where those reserved don't
        do, and waits for them. It raises NodeDiskError where they can't be had, and what *checkpoint* raises, which it
        calls as long as it waits.
        """
        ...


class BoundlessDisk:
    """A disk that is never full."""

    @asynccontextmanager
    async def reserved(
        self,
        what: str,  # noqa: ARG002
        parts: Sequence[Part],  # noqa: ARG002
        on_wait: OnWait,  # noqa: ARG002
        *,
        wait_s: float | None = None,  # noqa: ARG002
    ) -> AsyncIterator[None]:
        """Reserve nothing."""
        yield

    @contextmanager
    def allocating(self, what: str, part: Part) -> Iterator[None]:  # noqa: ARG002
        """Reserve nothing."""
        yield

    @contextmanager
    def spending(self, key: str, checkpoint: Callable[[], None]) -> Iterator[Spend]:  # noqa: ARG002
        """Count nothing."""
        yield unbounded
