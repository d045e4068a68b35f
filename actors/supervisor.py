"""The supervisor: observes nodes and actors, asks :mod:`cluster.topology` what is to be done, does it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import ray
import structlog

from actors.boot import Boot, Starter, Stores, build_stores
from actors.options import namespace, options
from actors.remote import RemoteCacheShard, RemoteFetchWorker
from actors.version import VERSION
from cluster.errors import InternalError
from cluster.messages import NodeRecord
from cluster.topology import ActorView, Kind, NodeView, Retire, Spawn, Step, reconcile
from cluster.wire import decode, encode
from storage.presence import Presence

log = structlog.get_logger()

_ROUND_S = 1.0
#: Label that the farm's own nodes carry; others go by their Ray ID.
NODE_LABEL = "lazyfarm-node"
_CLASSES: dict[Kind, type[Any]] = {Kind.CACHE_SHARD: RemoteCacheShard, Kind.FETCH_WORKER: RemoteFetchWorker}


class Supervisor:
    """Keeps one fetch worker a node and S cache shards there, whatever dies."""

    def __init__(self, boot: bytes) -> None:
        self._starter = Starter(decode("boot", Boot, boot))
        self._stores: Stores | None = None
        #: Actors as this supervisor last saw or made them, with the node they are pinned to.
        self._pinned: dict[str, str] = {}
        self._loop_task: asyncio.Task[object] | None = None

    async def _build(self) -> Presence:
        self._stores = build_stores(self._starter.boot.config)
        return self._stores.presence

    async def ready(self) -> bool:
        """Start reconciling, unless it runs already."""
        await self._starter.start(self._build)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = self._starter.background.spawn(self._reconcile_forever())
        return True

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._round()
            except asyncio.CancelledError:
                raise
            except Exception as exc:  # noqa: BLE001  # the next round tries again; a supervisor never gives up
                log.warning("reconcile.failed", error=str(exc), error_type=type(exc).__name__)
            await asyncio.sleep(_ROUND_S)

    async def _round(self) -> None:
        config = self._starter.boot.config
        stores = self._stores
        if stores is None:
            raise InternalError("the supervisor reconciles before it was built")
        nodes, records = await asyncio.to_thread(_observe_nodes)
        actors = await self._observe_actors(stores)
        steps = reconcile(nodes, actors, shards=config.cache.shards, version=VERSION)
        for step in steps:
            await asyncio.to_thread(self._perform, step)
            log.info("reconcile.step", step=type(step).__name__, actor=step.name)
        await stores.presence.announce_nodes(records)
        gone = {a.name for a in await stores.presence.actors() if a.state == "lost"} - {a.name for a in actors}
        await stores.presence.forget(sorted(gone))

    async def _observe_actors(self, stores: Stores) -> list[ActorView]:
        space = namespace(self._starter.boot.config.farm.name)
        listed = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        named = {a["name"] for a in listed if a["namespace"] == space}
        # Where an actor is pinned is ours to remember: Ray forgets the node of one that it can't restart.
        said = {record.name: record.ray_id for record in await stores.presence.actors()}
        self._pinned = {name: self._pinned.get(name) or said.get(name, "") for name in named}
        return [ActorView(name=name, ray_id=self._pinned[name]) for name in named]

    def _perform(self, step: Step) -> None:
        farm = self._starter.boot.config.farm.name
        match step:
            case Retire(name=name):
                ray.kill(ray.get_actor(name, namespace=namespace(farm)), no_restart=True)
                self._pinned.pop(name, None)
            case Spawn(kind=kind, name=name, node=node, index=index):
                boot = replace(
                    self._starter.boot, name=name, kind=kind.value, node=node.name, ray_id=node.ray_id, index=index
                )
                chosen = options(kind, name=name, farm=farm, ray_node_id=node.ray_id)
                actor = ray.remote(_CLASSES[kind]).options(**chosen).remote(encode("boot", boot))
                self._pinned[name] = node.ray_id
                actor.ready.remote()


def _observe_nodes() -> tuple[list[NodeView], list[NodeRecord]]:
    views, records = [], []
    for node in ray.nodes():  # type: ignore[no-untyped-call]  # Ray doesn't say
        name = (node.get("Labels") or {}).get(NODE_LABEL) or f"node-{node['NodeID'][:8]}"
        if node["Alive"]:
            views.append(NodeView(name=name, ray_id=node["NodeID"]))
        records.append(
            NodeRecord(id=name, ray_id=node["NodeID"], address=node["NodeManagerAddress"], alive=bool(node["Alive"]))
        )
    live = {r.id for r in records if r.alive}
    # A node that was restarted under its name has one live record; its dead ones say nothing more.
    shown = {r.id: r for r in records if r.alive or r.id not in live}
    return views, sorted(shown.values(), key=lambda r: r.id)
