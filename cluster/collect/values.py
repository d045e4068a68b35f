"""What is collected, and what a policy keeps. One vocabulary for the bucket and for each node's disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.collect.filters import Filter


class ItemKind(StrEnum):
    """Kinds of items, in BuildKit's spelling."""

    #: A layer, or its snapshot.
    REGULAR = "regular"
    #: A directory that a driver sent.
    LOCAL = "source.local"
    #: A cache mount of a command.
    CACHE_MOUNT = "exec.cachemount"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that can be collected."""

    #: Unique among the items of a store.
    id: str
    kind: ItemKind = ItemKind.REGULAR
    #: IDs of what it stands on: they go after it, or not at all.
    parents: tuple[str, ...] = ()
    #: Bytes that it takes; a lazy one takes 0.
    size_bytes: int
    #: Names the space that it takes, where several share one (two refs with one blob) that is freed with the last of
    #: them; "": its own.
    space: str = ""
    created_wall_s: float
    last_used_wall_s: float
    usage_count: int = 0
    #: A lease, a mount or a reader holds it: it stays.
    is_held: bool = False
    #: Others use its bytes too: removing it frees little, and a policy must say that it means such ones.
    is_shared: bool = False
    description: str = ""


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
