"""How one blob is cut into parts, and what to do when a source of it fails: pure decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    InternalError,
    NodeDiskError,
    RegistryError,
    SessionGoneError,
    SizeMismatchError,
    UnavailableError,
)
from cluster.fetch.retry import RetryPolicy

#: S3's limits on the parts of a multi-part upload (Amazon S3 user guide, "Multipart upload limits").
MIN_PART_BYTES = 5 * 1024**2
MAX_PARTS = 10_000
#: Ceilings of the pauses before a source is asked again, in seconds: of the first, and of all. Twice those of a
#: control request: a source that comes back is worth waiting for, as there is often no other.
_PAUSE_S = 0.4
_LONGEST_PAUSE_S = 16.0
_MIB = 1024**2


def part_size(size_bytes: int, configured_bytes: int) -> int:
    """Return the part size for a blob: what is configured, or the next whole MiB that 10,000 parts need."""
    needed = -(-size_bytes // MAX_PARTS)
    needed = -(-needed // _MIB) * _MIB
    return max(MIN_PART_BYTES, configured_bytes, needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRange:
    """One part: bytes ``offset`` to ``offset + length_bytes`` of the blob, number counted from 1."""

    number: int
    offset: int
    length_bytes: int

    @property
    def end(self) -> int:
        """Return the offset behind the last byte."""
        return self.offset + self.length_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive parts that one reader takes from one response."""

    parts: tuple[PartRange, ...]

    @property
    def offset(self) -> int:
        """Return the offset of the first byte."""
        return self.parts[0].offset

    @property
    def length_bytes(self) -> int:
        """Return how many bytes the run has."""
        return self.parts[-1].end - self.offset


def parts_of(size_bytes: int, part_bytes: int) -> tuple[PartRange, ...]:
    """Cut a blob into parts; the last may be shorter, an empty blob has none."""
    return tuple(
        PartRange(number=n, offset=offset, length_bytes=min(part_bytes, size_bytes - offset))
        for n, offset in enumerate(range(0, size_bytes, part_bytes), start=1)
    )


def missing_parts(parts: Iterable[PartRange], uploaded: Mapping[int, int]) -> tuple[PartRange, ...]:
    """Return the parts that the store lacks; a part of another length than planned counts as lacking.

    Args:
        parts: The plan.
        uploaded: Part number to size in bytes, as the store lists them.
    """
    return tuple(p for p in parts if uploaded.get(p.number) != p.length_bytes)


def runs_of(parts: Iterable[PartRange], *, max_parts: int | None) -> tuple[Run, ...]:
    """Join consecutive parts to runs of at most *max_parts* (None: as long as they are consecutive).

    One long run reads a layer with one request; runs of one part let several readers share it while
    the bytes still arrive nearly in order, so that they can be hashed and unpacked as they come.
    """
    runs: list[Run] = []
    current: list[PartRange] = []
    for part in parts:
        full = max_parts is not None and len(current) >= max_parts
        if current and (full or current[-1].end != part.offset):
            runs.append(Run(parts=tuple(current)))
            current = []
        current.append(part)
    if current:
        runs.append(Run(parts=tuple(current)))
    return tuple(runs)


# -- failures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TryAgain:
    """Ask the same source again, after a pause."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class NextSource:
    """This source is of no use for this blob: go to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOver:
    """This source lied about bytes that may be uploaded already: drop everything, then the next source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """No source is left."""

    error: ClusterError


SourceDecision = TryAgain | NextSource | StartOver | GiveUp


def _weight(error: ClusterError) -> int:
    """Say how much an error tells the caller: definite, then transient, then "nobody could answer for it"."""
    if isinstance(error, SessionGoneError):
        return 0
    return 1 if error.retryable else 2


class SourceState:
    """Which source a fetch reads from, and what a failure means for it.

    A transient failure is tried again at the same source as a :class:`RetryPolicy` says: within a number
    of tries, which progress refills, and a budget of seconds, which it does not, and which pauses use up,
    not the time in which bytes came. Then the next source is asked. A definite one (404, refused, wrong
    size or bytes) goes to the next source at once. Only when no source is left does the fetch fail, with
    the error that says most: a definite one before a transient one, so that a caller isn't told to try
    again in vain.
    """

    def __init__(self, sources: int, *, attempts: int, budget_s: float) -> None:
        if sources < 1:
            raise InternalError("a fetch was planned without a source")
        self._left = sources
        self._policy = RetryPolicy(attempts=attempts, budget_s=budget_s, base_s=_PAUSE_S, cap_s=_LONGEST_PAUSE_S)
        self._tries = 1
        self._waited_s = 0.0
        self._errors: list[ClusterError] = []
        #: Index of the source in use; rises, never falls.
        self.index = 0

    def progressed(self) -> None:
        """Note that bytes came: the tries of this source start afresh, its budget does not."""
        self._tries = 1

    def failed(self, error: ClusterError, *, draw: float) -> SourceDecision:
        """Decide what follows *error*.

        Args:
            error: What the source did.
            draw: A random number in [0, 1), for the pause.
        """
        if isinstance(error, NodeDiskError):
            return GiveUp(error=error)  # no source can help that
        if isinstance(error, UnavailableError):
            delay_s = self._policy.next_delay_s(error, self._tries, self._waited_s, draw)
            if delay_s is None:
                return self._advance(error, NextSource())
            self._tries += 1
            self._waited_s += delay_s
            return TryAgain(delay_s=delay_s)
        if isinstance(error, DigestMismatchError):
            return self._advance(error, StartOver())
        # A wrong size shows before a byte is taken: what came so far is kept.
        if isinstance(error, SizeMismatchError | BlobNotFoundError | RegistryError | SessionGoneError):
            return self._advance(error, NextSource())
        return GiveUp(error=error)

    def _advance(self, error: ClusterError, decision: NextSource | StartOver) -> SourceDecision:
        self._errors.append(error)
        self._left -= 1
        if self._left <= 0:
            return GiveUp(error=max(self._errors, key=_weight))
        self.index += 1
        self._tries = 1
        self._waited_s = 0.0
        return decision
