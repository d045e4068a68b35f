"""What is collected: one vocabulary for the bucket and for each node's disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    #: What that is, for people.
    held_by: str = ""
    #: Others use its bytes too: removing it frees little, and a policy must say that it means such ones.
    is_shared: bool = False
    description: str = ""
