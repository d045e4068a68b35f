"""What a job records of each of its targets, for its driver and for those who come later."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import wire
from cluster.digest import Digest
from cluster.ref import RefId

_KIND = "job-result"


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineEntry:
    """A vertex of which the target's lowest layers are the result: for a cache within the image's config."""

    keys: tuple[Digest, ...]
    #: How many of the layers.
    layers: int
    #: As :attr:`cluster.remote_cache.CacheEntry.config`.
    config: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetResult:
    """What a target came to."""

    #: Top of its chain; None: an empty filesystem.
    ref: RefId | None
    #: Image config (JSON) of the image it was built upon.
    config: bytes | None = None
    #: Where an inline cache was asked for.
    inline: tuple[InlineEntry, ...] = ()


def encode_result(result: TargetResult) -> bytes:
    """Return a result as a payload."""
    return wire.encode(_KIND, result)


def decode_result(data: bytes) -> TargetResult:
    """Return the result in a payload; raises as :func:`cluster.wire.decode`."""
    return wire.decode(_KIND, TargetResult, data)
