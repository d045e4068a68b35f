"""Builds of a real farm as they are seen from outside: who does what, whom to kill, and what must not be left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cluster.graph import CacheMount
from cluster.job import JobEvent, VertexEvent, VertexLog, VertexState
from cluster.messages import ActorRecord
from lazyfarm.graph import cache
from lazyfarm.job import Job
from storage.connect import connect
from tests.doubles.observed import ObservedFarm, eventually

T = TypeVar("T")

#: Seconds for what ends after a job has: what a dead scheduler began goes on until its session counts as gone.
_ENDS_WITHIN_S = 30.0


# -- what is told of a job ------------------------------------------------------------------------------------


async def wait_for(job: Awaitable[T]) -> T:
    """Await a job: what a task can be made of."""
    return await job


def states(events: Iterable[JobEvent], name: str) -> list[VertexState]:
    """Return the states that the vertices called *name* went through."""
    return [e.state for e in events if isinstance(e, VertexEvent) and e.name == name]


def said(events: Iterable[JobEvent]) -> str:
    """Return what commands said."""
    return "".join(e.text for e in events if isinstance(e, VertexLog))


async def log_of(job: Job, text: str) -> None:
    """Wait until a job's commands say *text*."""
    async with contextlib.aclosing(job.events()) as events:
        async for event in events:
            if isinstance(event, VertexLog) and text in event.text:
                return
    raise AssertionError(f"{job} ended before it said {text!r}")


async def state_of(job: Job, name: str, state: VertexState) -> None:
    """Wait until the vertex called *name* is in *state*."""
    async with contextlib.aclosing(job.events()) as events:
        async for event in events:
            if isinstance(event, VertexEvent) and (event.name, event.state) == (name, state):
                return
    raise AssertionError(f"{job} ended before {name!r} was {state.value}")


# -- the farm ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BuildFarm(ObservedFarm):
    """A farm that builds."""

    # -- whom to kill --

    async def of_kind(self, kind: str) -> list[ActorRecord]:
        """Return the actors of a kind that are there."""
        return [actor for actor in await self.actors() if actor.kind == kind]

    async def kill(self, *victims: ActorRecord) -> None:
        """Kill actors' processes, all before the first of them can be back."""
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)

    async def owner_of(self, job: Job) -> ActorRecord:
        """Return the scheduler that has a job."""
        owner = (await job.record()).owner
        return next(actor for actor in await self.actors() if actor.name == owner)

    async def worker(self, kind: str, node: str) -> ActorRecord:
        """Return a node's worker."""
        return next(actor for actor in await self.of_kind(kind) if actor.node == node)

    async def are_back(self, *killed: ActorRecord) -> None:
        """Wait until others are there in the place of those that were killed."""

        async def all_there() -> bool:
            pids = {actor.name: actor.pid for actor in await self.actors()}
            return all(pids.get(each.name, each.pid) != each.pid for each in killed)

        await eventually(all_there, "those who were killed", within_s=40)

    # -- what runs --

    def containers(self) -> dict[str, set[str]]:
        """Return the IDs of the containers that there are, by node; a dead worker's too until they are removed."""
        found: dict[str, set[str]] = {}
        for directory in self._nodes().glob("*/containers/*/*"):
            if directory.parent.name in ("bundles", "runc"):
                node = directory.parents[2].name
                found.setdefault(node, set()).add(directory.name.removesuffix(".lock"))
        return found

    def _nodes(self) -> Path:
        return self.running.state_dir / "nodes"

    # -- what is left --

    async def assert_nothing_left(self) -> None:
        """Once all jobs have ended: nothing is held for them, owned, waited for, running or mounted."""
        last: list[str] = []

        async def nothing() -> bool:
            last[:] = [*await self._left_in_redis(), *self._left_on_nodes()]
            return not last

        config = self.running.settings.config
        # What the dead held goes when it lapses.
        within_s = _ENDS_WITHIN_S + max(config.cache.lease_ttl_s, config.flight.lease_ttl_s)
        await eventually(nothing, lambda: f"these to go: {last}", within_s=within_s)

    async def _left_in_redis(self) -> list[str]:
        now_ms = time.time() * 1000  # this machine's clock is Redis's
        flights, waiters = await self.keys("flight:vertex:*"), await self.keys("waiters:vertex:*")
        link = connect(self.running.settings.config.redis)
        try:

            async def ask(*command: object) -> list[bytes]:
                return await link.execute(*command, may_repeat=True) or []

            live = [
                each.decode() for each in await ask("ZRANGE", f"{self.prefix}:leases", f"({now_ms}", "+inf", "BYSCORE")
            ]
            left = [f"lease {lease}" for lease in live if lease.startswith("hold-")]
            for index in ("jobs:held", "jobs:attended"):
                left += [f"{index} {job.decode()}" for job in await ask("ZRANGE", f"{self.prefix}:{index}", 0, -1)]
            for key in flights:
                (expires,) = await ask("HMGET", f"{self.prefix}:{key}", "expires")
                if expires is not None and float(expires) > now_ms:
                    left.append(key)
            left += [key for key in waiters if await live(key)]
        finally:
            await link.close()
        return left

    def _left_on_nodes(self) -> list[str]:
        left = [f"container {each} on {node}" for node, ids in self.containers().items() for each in sorted(ids)]
        nodes = str(self._nodes())
        for line in Path("/proc/self/mounts").read_text().splitlines():
            point = line.split(" ")[1]
            if point.startswith(f"{nodes}/") and (Path(point).name.startswith("op-") or "/bundles/" in point):
                left.append(f"mount {point}")
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = process.read_bytes().split(b"\0")
            except OSError:
                continue
            if Path(os.fsdecode(command[0])).name == "runc" and any(nodes in os.fsdecode(word) for word in command):
                left.append(f"process {os.fsdecode(b' '.join(command))}")
        return left


def cgroups_of(container: str) -> list[Path]:
    """Return the cgroups of a container."""
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/lazyfarm/{container}") if path.is_dir()]


# -- commands that wait -----------------------------------------------------------------------------------------


@dataclass
class Gate:
    """Holds commands until it is opened, and counts how often one came to it, on whichever nodes.

    By a cache mount of its own, which is a directory of each node.
    """

    farm: BuildFarm
    name: str = field(default_factory=lambda: f"gate-{secrets.token_hex(4)}")

    @property
    def mount(self) -> CacheMount:
        """Return what a command that comes to the gate mounts."""
        found = cache("/gate", id=self.name)
        assert isinstance(found, CacheMount)
        return found

    @property
    def command(self) -> str:
        """Return what a command says in order to come to the gate."""
        return "echo came >> /gate/came; echo at the gate; while ! [ -e /gate/open ]; do sleep 0.05; done"

    def came(self) -> int:
        """Return how many commands have come to it."""
        return sum(len(file.read_text().splitlines()) for file in self._files("came"))

    async def open_until(self, work: asyncio.Future[T]) -> T:
        """Open it on every node, also on those where commands only come to it later, until *work* is done."""
        while not work.done():
            for file in self._files("came"):
                file.with_name("open").touch()
            await asyncio.wait([work], timeout=0.1)
        return work.result()

    def _files(self, name: str) -> list[Path]:
        cache_id = hashlib.sha256(self.name.encode()).hexdigest()[:32]
        nodes = self.farm.running.state_dir / "nodes"
        return list(nodes.glob(f"*/containers/caches/{cache_id}/*/{name}"))
