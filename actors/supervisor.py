"""The supervisor: observes nodes and actors, asks :mod:`cluster.topology` what is to be done, does it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
import structlog

from actors.boot import Boot, Starter, Stores, build_stores
from actors.metrics import show_circuits
from actors.nodes import live_nodes, observe_nodes, worth_telling
from actors.options import namespace, options
from cluster.config_record import actor_digest
from cluster.errors import ClusterError, InternalError
from cluster.messages import NodeRecord
from cluster.metrics import NODES, PULSE_MISSED
from cluster.topology import ActorView, Kind, Retire, Spawn, Step, numbers, reconcile
from cluster.wire import decode, encode
from storage.circuits import Circuits
from storage.keys import Keys
from storage.presence import Presence
from storage.services.ray_nodes import taken_down

log = structlog.get_logger()

_ROUND_S = 1.0
#: Seconds between looks at which registries are given up.
_CIRCUITS_S = 5.0
#: Seconds between pulses; leases stand still 3 s after the last one (storage/lua/lib/lapse.lua).
_PULSE_S = 1.0


class Supervisor:
    """Keeps the workers of each node, the cache shards and the schedulers there, whatever dies."""

    def __init__(self, boot: bytes, classes: Mapping[Kind, type[Any]]) -> None:
        """Make one that starts actors of *classes*, as Ray is to see them."""
        self._starter = Starter(decode("boot", Boot, boot))
        self._classes = classes
        self._stores: Stores | None = None
        #: Actors as this supervisor last saw or made them, with the node they are pinned to.
        self._pinned: dict[str, str] = {}
        self._loop_task: asyncio.Task[object] | None = None

    async def _build(self) -> Presence:
        self._stores = build_stores(self._starter.boot.config, name=self._starter.boot.name)
        return self._stores.presence

    def config_digest(self) -> str:
        """Return the digest of the configuration it gives to every actor; answered before it is ready, too."""
        return actor_digest(self._starter.boot.config)

    async def ready(self) -> bool:
        """Start reconciling, unless it runs already."""
        await self._starter.start(self._build)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = self._starter.background.spawn(self._reconcile_forever())
            self._starter.background.spawn(self._pulse_forever(self._built()))
            self._starter.background.spawn(self._show_circuits_forever(self._built()))
        return True

    async def _pulse_forever(self, stores: Stores) -> None:
        """Keep time for leases, beside the rounds: those may take a while."""
        while True:
            try:
                stood_s = await stores.presence.pulse()
            except ClusterError as exc:
                log.warning("pulse.failed", error=str(exc))
            else:
                PULSE_MISSED.add(stood_s)
                if stood_s:
                    log.warning("pulse.missed", stood_s=stood_s)
            await asyncio.sleep(_PULSE_S)

    async def _show_circuits_forever(self, stores: Stores) -> None:
        circuits = Circuits(stores.link, Keys(self._starter.boot.config.farm.name))
        named: frozenset[str] = frozenset()
        while True:
            with contextlib.suppress(ClusterError):  # Redis is away: what was shown last stands
                named = await show_circuits(circuits, named)
            await asyncio.sleep(_CIRCUITS_S)

    def _built(self) -> Stores:
        if self._stores is None:
            raise InternalError("the supervisor works before it was built")
        return self._stores

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
        stores = self._built()
        observed = await asyncio.to_thread(observe_nodes)
        actors = await self._observe_actors(stores)
        draining = [node.id for node in await stores.presence.nodes() if node.draining]
        # An older release's, restarted after an upgrade, runs the new code and goes on with the older one's actors.
        version = self._starter.boot.version
        steps = reconcile(live_nodes(observed), actors, numbers=numbers(config), version=version, draining=draining)
        for step in steps:
            await asyncio.to_thread(self._perform, step)
            if isinstance(step, Retire):
                await stores.presence.forget([step.name])
            log.info("reconcile.step", step=type(step).__name__, actor=step.name)
        told = worth_telling(observed, taken_down(self._starter.boot.state_dir))
        alive = sum(node.is_alive for node in told)
        NODES.set(alive, state="alive")
        NODES.set(len(told) - alive, state="dead")
        await stores.presence.announce_nodes(
            [NodeRecord(id=n.view.name, ray_id=n.view.ray_id, address=n.address, alive=n.is_alive) for n in told]
        )
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
                actor = ray.remote(self._classes[kind]).options(**chosen).remote(encode("boot", boot))
                self._pinned[name] = node.ray_id
                actor.ready.remote()
