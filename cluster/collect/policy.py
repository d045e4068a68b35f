"""What a policy keeps, and the policies that a farm collects by when nobody says otherwise: BuildKit's four classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.collect.filters import Condition, Filter
from cluster.collect.values import ItemKind

_DAY_S = 24 * 3600.0

#: What drivers send and commands cache is soon of no use.
SOON_USELESS = tuple(Filter((Condition("type", "==", kind.value),)) for kind in (ItemKind.LOCAL, ItemKind.CACHE_MOUNT))
SOON_USELESS_S = 2 * _DAY_S
SOON_USELESS_BYTES = 512 * 1000**2
UNUSED_S = 60 * _DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPolicy:
    """What may go, and how far: BuildKit's garbage-collection policy.

    Without a limit all that matches goes. With one, what matches goes in the order of :func:`cluster.collect.plan.plan`
    until the limit is kept, and never below the reserve.
    """

    #: An item matches if one of these does; none: every item matches.
    filters: tuple[Filter, ...] = ()
    #: Items that are shared, too.
    includes_shared: bool = False
    #: Seconds since its last use for which an item is kept; 0: no item is kept for that.
    keep_duration_s: float = 0.0
    #: Bytes below which nothing is collected; 0: none.
    reserved_bytes: int = 0
    #: Bytes that all items together may take; 0: any number.
    max_used_bytes: int = 0
    #: Bytes of the disk that should be free; 0: any number. Has no meaning for a bucket.
    min_free_bytes: int = 0


def default_policies(
    *, reserved_bytes: int, max_used_bytes: int, min_free_bytes: int = 0, unused_s: float = UNUSED_S
) -> tuple[KeepPolicy, ...]:
    """Return them, to be applied one after the other. Each limit may be 0: none.

    1. what drivers sent and cache mounts, unused for two days, while all takes over 512 MB;
    2. whatever is unused for *unused_s* seconds;
    3. what is not shared, beyond the limits;
    4. anything, beyond the limits.
    """
    limits = KeepPolicy(reserved_bytes=reserved_bytes, max_used_bytes=max_used_bytes, min_free_bytes=min_free_bytes)
    is_limited = max_used_bytes or min_free_bytes
    return (
        KeepPolicy(filters=SOON_USELESS, keep_duration_s=SOON_USELESS_S, max_used_bytes=SOON_USELESS_BYTES),
        KeepPolicy(includes_shared=True, keep_duration_s=unused_s),
        *((limits, replace(limits, includes_shared=True)) if is_limited else ()),
    )
