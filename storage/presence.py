"""Who is there: what actors and the supervisor say of themselves in Redis, for readers that never join Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.messages import ActorRecord, NodeRecord
from cluster.wire import decode, encode
from storage.keys import Keys
from storage.link import RedisLink

#: Seconds after which an actor that says nothing counts as lost; it speaks every third of it.
PRESENCE_TTL_S = 6.0
#: Seconds after which a node that is gone is forgotten to drain: a cluster that is started anew has it back by then.
DRAIN_GONE_S = 3600.0


class Presence:
    """The writing side, for actors."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def announce(self, actor: ActorRecord) -> None:
        """Say that *actor* is there, for the next few seconds."""
        payload = encode("actor", actor)
        await self._link.execute_many(
            [
                ("HSET", self._keys.actors, actor.name, payload),
                ("SET", self._keys.actor_alive(actor.name), "1", "PX", int(PRESENCE_TTL_S * 1000)),
            ],
            may_repeat=True,
        )

    async def pulse(self) -> float:
        """Say that the farm can speak to Redis; return the seconds that it could not, and that count for no lease."""
        return int(await self._link.run("pulse", self._keys.prefix, may_repeat=True)) / 1000

    async def forget(self, names: Sequence[str]) -> None:
        """Forget actors that are no longer wanted."""
        if names:
            await self._link.execute("HDEL", self._keys.actors, *names, may_repeat=True)

    async def announce_nodes(self, nodes: Sequence[NodeRecord]) -> None:
        """Say which nodes the cluster has; one that has been none of them for an hour drains no more."""
        await self._link.run(
            "nodes_announce",
            self._keys.prefix,
            encode("nodes", list(nodes)),
            int(DRAIN_GONE_S * 1000),
            *(node.id for node in nodes),
            may_repeat=True,
        )

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes as the supervisor last saw them, and which of them drain."""
        payload, draining = await self._link.execute_many(
            [("GET", self._keys.nodes), ("ZRANGE", self._keys.draining, 0, -1)], may_repeat=True
        )
        nodes = [] if payload is None else decode("nodes", list[NodeRecord], payload)
        named = {node.decode() for node in draining}
        return [replace(node, draining=node.id in named) for node in nodes]

    async def drain(self, node: str) -> None:
        """Have a node get nothing new to do, whatever is restarted, until :meth:`undrain`."""
        await self._link.run("node_drain", self._keys.prefix, node, may_repeat=True)

    async def undrain(self, node: str) -> bool:
        """Have a node take work again; tell whether it drained."""
        return bool(await self._link.execute("ZREM", self._keys.draining, node, may_repeat=True))

    async def actors(self) -> list[ActorRecord]:
        """Return the actors, ``lost`` where one has been silent for too long."""
        known = (await self._link.execute("HGETALL", self._keys.actors, may_repeat=True))[1::2]
        records = [decode("actor", ActorRecord, payload) for payload in known]
        alive = await self._link.execute_many(
            [("EXISTS", self._keys.actor_alive(r.name)) for r in records], may_repeat=True
        )
        return _judged(records, alive)


def _judged(records: Sequence[ActorRecord], alive: Sequence[int]) -> list[ActorRecord]:
    judged = (r if is_alive else replace(r, state="lost") for r, is_alive in zip(records, alive, strict=True))
    return sorted(judged, key=lambda r: (r.kind, r.name))
