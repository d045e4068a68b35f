"""Decides what of some items goes, in which order, so that a policy is kept. Follows BuildKit's ``cache/manager.go``.

Different from it on purpose: a limit that is not reached lets everything stay (there, a ``minFreeSpace`` that is
kept already means none), and of what takes no bytes only that goes on which something stands that frees some.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cluster.collect.policy import KeepPolicy
from cluster.collect.values import Item


def keep_bytes(policy: KeepPolicy, *, total_bytes: int, free_bytes: int | None) -> int | None:
    """Return down to how many bytes the items may go; None where the policy sets no limit.

    Args:
        policy: What is wanted.
        total_bytes: Bytes that all items take.
        free_bytes: Bytes of the disk that are free; None where that has no meaning.
    """
    if not (policy.max_used_bytes or policy.min_free_bytes):
        return policy.reserved_bytes or None
    keep = min(total_bytes, policy.max_used_bytes or total_bytes)
    if free_bytes is not None:
        keep = min(keep, total_bytes - max(0, policy.min_free_bytes - free_bytes))
    return max(keep, policy.reserved_bytes)


def total_bytes(items: Iterable[Item]) -> int:
    """Return the bytes that items take together: a space that several share counts once."""
    return sum({item.space or item.id: item.size_bytes for item in items}.values())


def freed_bytes(items: Iterable[Item], going: Sequence[Item]) -> int:
    """Return the bytes that are free once *going*, of *items*, are gone: a space is, with the last that shares it."""
    left = Counter(item.space or item.id for item in items)
    left.subtract(item.space or item.id for item in going)
    return sum({item.space or item.id: item.size_bytes for item in going if not left[item.space or item.id]}.values())


def plan(items: Sequence[Item], policy: KeepPolicy, *, now_wall_s: float, free_bytes: int | None = None) -> list[Item]:
    """Return what goes, each after all that stands on it.

    Nothing that is held goes, and nothing that something which stays stands on. What was used longest ago and least
    often goes first: by the sum of an item's ranks among the candidates in both, each from 0 to 1.

    Args:
        items: All items of the store. Parents that are not among them are taken to be gone.
        policy: What is wanted.
        now_wall_s: Seconds, by the clock that last uses are told by.
        free_bytes: Bytes of the disk that are free; None where that has no meaning.
    """
    total = total_bytes(items)
    keep = keep_bytes(policy, total_bytes=total, free_bytes=free_bytes)
    if keep is not None and total <= keep:
        return []
    candidates = {item.id: item for item in items if _may_go(item, policy, now_wall_s)}
    scores = _scores(list(candidates.values()))
    standing = Counter(parent for item in items for parent in item.parents)
    sharing = Counter(item.space or item.id for item in items)
    ready = [scores[item.id] for item in candidates.values() if not standing[item.id]]
    heapq.heapify(ready)
    going: list[Item] = []
    while ready and (keep is None or total > keep):
        item = candidates[heapq.heappop(ready)[-1]]
        going.append(item)
        space = item.space or item.id
        sharing[space] -= 1
        if not sharing[space]:
            total -= item.size_bytes
        for parent in item.parents:
            standing[parent] -= 1
            if not standing[parent] and parent in candidates:
                heapq.heappush(ready, scores[parent])
    return going if keep is None else _useful(going)


def _may_go(item: Item, policy: KeepPolicy, now_wall_s: float) -> bool:
    if item.is_held or (item.is_shared and not policy.includes_shared):
        return False
    if policy.filters and not any(wanted.matches(item) for wanted in policy.filters):
        return False
    return not policy.keep_duration_s or item.last_used_wall_s <= now_wall_s - policy.keep_duration_s


def _scores(items: Sequence[Item]) -> dict[str, tuple[float, float, str]]:
    """Return by what the items are ordered; of equals the one that was used first goes first."""
    used = _ranks(items, lambda item: item.last_used_wall_s)
    counted = _ranks(items, lambda item: item.usage_count)
    return {item.id: (used[item.id] + counted[item.id], item.last_used_wall_s, item.id) for item in items}


def _ranks(items: Sequence[Item], by: Callable[[Item], float]) -> dict[str, float]:
    """Return each item's place, from 0 to 1; equals have one place."""
    places = {value: place for place, value in enumerate(sorted({by(item) for item in items}))}
    last = max(1, len(places) - 1)
    return {item.id: places[by(item)] / last for item in items}


def _useful(going: Sequence[Item]) -> list[Item]:
    """Leave out what frees nothing, itself or by letting go what it stands on."""
    useful: dict[str, Item] = {}
    for item in reversed(going):  # what it stands on comes before it
        if item.size_bytes or any(parent in useful for parent in item.parents):
            useful[item.id] = item
    return list(useful.values())[::-1]
