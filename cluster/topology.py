"""Which actors a cluster wants, against which it has: pure decisions of the supervisor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of actor."""

    SUPERVISOR = "supervisor"
    CACHE_SHARD = "cache-shard"
    FETCH_WORKER = "fetch-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A live node: its name in the farm and its Ray ID."""

    name: str
    ray_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorView:
    """An actor that Ray knows by name."""

    name: str
    #: Ray ID of the node it is pinned to; "" while it isn't known.
    ray_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Create an actor, pinned to a node."""

    kind: Kind
    name: str
    node: NodeView
    #: Shard number for shards; 0 otherwise.
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """End an actor whose place is gone."""

    name: str


Step = Spawn | Retire


#: How the names of actors begin that have a place.
_PLACED = (f"{Kind.FETCH_WORKER.value}-", f"{Kind.CACHE_SHARD.value}-")


def worker_name(node: str, version: str) -> str:
    """Name the fetch worker of a node; the version is in the name, as an old process keeps its old code."""
    return f"{Kind.FETCH_WORKER.value}-{node}@{version}"


def shard_name(index: int, version: str) -> str:
    """Name a cache shard."""
    return f"{Kind.CACHE_SHARD.value}-{index}@{version}"


def supervisor_name(version: str) -> str:
    """Name the supervisor."""
    return f"{Kind.SUPERVISOR.value}@{version}"


def reconcile(nodes: Sequence[NodeView], actors: Collection[ActorView], *, shards: int, version: str) -> list[Step]:
    """Return what must be done so that there is one fetch worker a live node and each shard somewhere.

    Idempotent: once its steps are performed it returns nothing. An actor of this version whose node is
    gone is retired first, and spawned anew in the next round, when its name is free; so is a worker that
    is not on the node it is named for, and what nobody wants any more. A shard stays where it is while its
    node lives. Actors of other versions are left alone: a rolling upgrade runs both.
    """
    live = {n.ray_id for n in nodes}
    known = {a.name: a for a in actors}
    wanted: list[Spawn] = [
        Spawn(kind=Kind.FETCH_WORKER, name=worker_name(n.name, version), node=n, index=0)
        for n in sorted(nodes, key=lambda n: n.name)
    ]
    by_name = sorted(nodes, key=lambda n: n.name)
    if by_name:
        wanted += [
            Spawn(kind=Kind.CACHE_SHARD, name=shard_name(i, version), node=by_name[i % len(by_name)], index=i)
            for i in range(shards)
        ]
    # Where each may be; nowhere for what is not wanted.
    places = {s.name: {s.node.ray_id} if s.kind is Kind.FETCH_WORKER else live for s in wanted}
    steps: list[Step] = [
        Retire(name=a.name)
        for a in sorted(known.values(), key=lambda a: a.name)
        if a.name.endswith(f"@{version}")
        and a.name.startswith(_PLACED)
        and a.ray_id
        and a.ray_id not in places.get(a.name, ())
    ]
    steps += [s for s in wanted if s.name not in known]
    return steps
