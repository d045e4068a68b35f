"""Goes round all there is of something, bit by bit: stopped at any point, the next process goes on from there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from cluster.collect.ports import CollectStore
from cluster.collect.rounds import due_round


async def go_round(
    store: CollectStore,
    work: str,
    *,
    every_s: float,
    names: Callable[[], Awaitable[Sequence[str]]],
    look: Callable[[Sequence[str]], Awaitable[None]],
    most: int,
) -> bool:
    """Look at everything once, if a round is due; tell whether one was.

    Args:
        store: Remembers how far the round has come.
        work: What is done.
        every_s: Seconds between the beginnings of two rounds.
        names: Tells what there is. What is new while the round goes on is for the next one.
        look: Looks at some, in order. Where it raises, the next call goes on with these.
        most: How many at a time; as many are looked at again by who goes on after a stop.
    """
    current = due_round(await store.round(work), now_wall_s=await store.now_wall_s(), every_s=every_s)
    if current is None:
        return False
    left = sorted(name for name in await names() if name > current.after)
    for start in range(0, len(left), most):
        batch = left[start : start + most]
        await look(batch)
        current = replace(current, after=batch[-1])
        await store.keep_round(work, current)
    await store.keep_round(work, replace(current, is_done=True))
    return True
