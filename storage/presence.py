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
        """Say which nodes the cluster has."""
        await self._link.execute("SET", self._keys.nodes, encode("nodes", list(nodes)), may_repeat=True)

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes as the supervisor last saw them."""
        payload = await self._link.execute("GET", self._keys.nodes, may_repeat=True)
        return [] if payload is None else decode("nodes", list[NodeRecord], payload)

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
