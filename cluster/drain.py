"""Draining a node: who gets new work, and when nothing is left of the old."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.errors import NodeDrainingError, NodeNotFoundError
from cluster.messages import ActorRecord, NodeRecord


def taking_work(nodes: Collection[NodeRecord]) -> list[str]:
    """Return the nodes that take new work: the live ones that don't drain.

    Raises:
        NodeNotFoundError: no node is alive. NodeDrainingError: all that are drain.
    """
    live = [node for node in nodes if node.alive]
    if not live:
        raise NodeNotFoundError("any")
    if not (taking := [node.id for node in live if not node.draining]):
        raise NodeDrainingError("any")
    return taking


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """What a node still does for others."""

    #: Ops of builds.
    ops: int = 0
    #: Flights that its worker owns.
    fetches: int = 0
    #: Calls of drivers and schedulers at its fetch worker: pulls, extracts, pushes. Of a fetch that somebody of the
    #: node's own waits for there is one, too.
    calls: int = 0

    @property
    def is_nothing(self) -> bool:
        """Tell whether there is nothing."""
        return not (self.ops or self.fetches or self.calls)


def under_way(node: str, *, ops: int, owners: Collection[str], actors: Collection[ActorRecord]) -> UnderWay:
    """Return what *node* does, from what is told of the whole farm.

    Args:
        node: Its name.
        ops: How many it is told to run.
        owners: Of all flights.
        actors: All of them; one that is lost does nothing any more.
    """
    return UnderWay(
        ops=ops,
        fetches=sum(owner.startswith(f"{node}/") for owner in owners),
        calls=sum(actor.calls for actor in actors if actor.node == node and actor.state == "ready"),
    )


class Settling:
    """Decides when a node has drained: once nothing was seen there for a while.

    One look is not enough: who had chosen the node a moment before it began to drain calls it a moment later, and a
    worker tells how many calls it has every few seconds only.

    Args:
        settle_s: For how long.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._idle_since_s: float | None = None

    def saw(self, left: UnderWay, now_s: float) -> bool:
        """Take note of a look; tell whether the node has drained."""
        if not left.is_nothing:
            self._idle_since_s = None
            return False
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        return now_s - self._idle_since_s >= self._settle_s
