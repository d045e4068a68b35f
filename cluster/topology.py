"""Which actors a cluster wants, against which it has: pure decisions of the supervisor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.config import Config
from cluster.messages import ActorRecord


class Kind(Enum):
    """Kinds of actor."""

    SUPERVISOR = "supervisor"
    CACHE_SHARD = "cache-shard"
    FETCH_WORKER = "fetch-worker"
    OP_WORKER = "op-worker"
    SCHEDULER = "solver-scheduler"


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
    #: Number of a shard or scheduler; 0 otherwise.
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """End an actor whose place is gone."""

    name: str


Step = Spawn | Retire


#: Kinds of which each node has one.
ON_EACH_NODE = (Kind.FETCH_WORKER, Kind.OP_WORKER)
#: Kinds of which there is a number, wherever.
NUMBERED = (Kind.CACHE_SHARD, Kind.SCHEDULER)

#: How the names of actors begin that have a place.
_PLACED = tuple(f"{kind.value}-" for kind in (*ON_EACH_NODE, *NUMBERED))


def numbers(config: Config) -> dict[Kind, int]:
    """Return how many of each of :data:`NUMBERED` a configuration wants."""
    return {Kind.CACHE_SHARD: config.cache.shards, Kind.SCHEDULER: config.build.schedulers}


def worker_name(node: str, version: str) -> str:
    """Name the fetch worker of a node; the version is in the name, as an old process keeps its old code."""
    return _name(Kind.FETCH_WORKER, node, version)


def op_worker_name(node: str, version: str) -> str:
    """Name the op worker of a node."""
    return _name(Kind.OP_WORKER, node, version)


def shard_name(index: int, version: str) -> str:
    """Name a cache shard."""
    return _name(Kind.CACHE_SHARD, index, version)


def scheduler_name(index: int, version: str) -> str:
    """Name a solver scheduler."""
    return _name(Kind.SCHEDULER, index, version)


def _name(kind: Kind, place: str | int, version: str) -> str:
    return f"{kind.value}-{place}@{version}"


def supervisor_name(version: str) -> str:
    """Name the supervisor."""
    return f"{Kind.SUPERVISOR.value}@{version}"


def version_of(name: str) -> str:
    """Return the release that an actor of the farm serves."""
    return name.rpartition("@")[2]


def unlike(actors: Sequence[ActorRecord], version: str) -> list[ActorRecord]:
    """Return the actors of a release that run another one's code: where they started, that is what is installed."""
    return [actor for actor in actors if version_of(actor.name) == version != actor.version]


def reconcile(
    nodes: Sequence[NodeView],
    actors: Collection[ActorView],
    *,
    numbers: Mapping[Kind, int],
    version: str,
    draining: Collection[str] = (),
) -> list[Step]:
    """Return what must be done so that there is one worker of each kind a live node, and the numbered ones somewhere.

    Idempotent: once its steps are performed it returns nothing. An actor of this version whose node is
    gone is retired first, and spawned anew in the next round, when its name is free; so is a worker that
    is not on the node it is named for, and what nobody wants any more. A numbered one stays where it is while its
    node lives. Actors of other versions are left alone: a rolling upgrade runs both.

    Args:
        nodes: The live ones.
        actors: Those that Ray knows by name.
        numbers: How many there are to be of each of :data:`NUMBERED`.
        version: Of this release.
        draining: Names of nodes where no numbered one is spawned, unless all drain.
    """
    live = {n.ray_id for n in nodes}
    known = {a.name: a for a in actors}
    by_name = sorted(nodes, key=lambda n: n.name)
    wanted: list[Spawn] = [
        Spawn(kind=kind, name=_name(kind, n.name, version), node=n, index=0) for kind in ON_EACH_NODE for n in by_name
    ]
    if by_name:
        open_ = [n for n in by_name if n.name not in draining] or by_name
        wanted += [
            Spawn(kind=kind, name=_name(kind, i, version), node=open_[i % len(open_)], index=i)
            for kind in NUMBERED
            for i in range(numbers.get(kind, 0))
        ]
    # Where each may be; nowhere for what is not wanted.
    places = {s.name: {s.node.ray_id} if s.kind in ON_EACH_NODE else live for s in wanted}
    steps: list[Step] = [
        Retire(name=a.name)
        for a in sorted(known.values(), key=lambda a: a.name)
        if version_of(a.name) == version
        and a.name.startswith(_PLACED)
        and a.ray_id
        and a.ray_id not in places.get(a.name, ())
    ]
    steps += [s for s in wanted if s.name not in known]
    return steps
