"""A farm as it is seen from outside: what Redis says of it, and which processes it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.messages import ActorRecord
from storage.connect import connect
from storage.keys import Keys
from storage.presence import Presence
from tests.doubles.farm import RunningFarm


async def eventually(fact: Callable[[], Any], what: str | Callable[[], str], *, within_s: float = 20.0) -> Any:
    """Wait until *fact* (awaited where it has to be) is true, and return it."""
    deadline_s = time.monotonic() + within_s
    while True:
        found = fact()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"waited {within_s:.0f} s for {what if isinstance(what, str) else what()}")
        await asyncio.sleep(0.05)


@dataclass(kw_only=True)
class ObservedFarm:
    """A farm that runs."""

    running: RunningFarm

    @property
    def prefix(self) -> str:
        """Return what every Redis key of the farm starts with."""
        return Keys(self.running.settings.config.farm.name).prefix

    async def redis(self, *command: Any) -> Any:
        """Ask the farm's Redis."""
        link = connect(self.running.settings.config.redis)
        try:
            return await link.execute(*command, may_repeat=True)
        finally:
            await link.close()

    async def keys(self, pattern: str) -> list[str]:
        """Return the keys that match, without the farm's prefix."""
        found, cursor = [], b"0"
        # The hash tag's braces are no pattern of Redis's.
        while True:
            cursor, batch = await self.redis("SCAN", cursor, "MATCH", f"{self.prefix}:{pattern}", "COUNT", 1000)
            found += [key.decode().removeprefix(f"{self.prefix}:") for key in batch]
            if int(cursor) == 0:
                return sorted(set(found))

    async def live_flights(self) -> list[str]:
        """Return the keys of flights that somebody owns or waits for; what a dead one left lies a day and is taken up.

        By Redis's clock, which is this machine's.
        """
        now_ms = time.time() * 1000
        found = []
        for key in await self.keys("flight:*"):
            expires = await self.redis("HGET", f"{self.prefix}:{key}", "expires")
            if expires is not None and float(expires) > now_ms:
                found.append(key)
        waited = await self.keys("waiters:*")
        alive = [await self.redis("ZCOUNT", f"{self.prefix}:{key}", now_ms, "+inf") for key in waited]
        return found + [key for key, count in zip(waited, alive, strict=True) if count]

    async def actors(self) -> list[ActorRecord]:
        """Return the actors that say that they are there."""
        link = connect(self.running.settings.config.redis)
        try:
            actors = await Presence(link, Keys(self.running.settings.config.farm.name)).actors()
        finally:
            await link.close()
        return [actor for actor in actors if actor.state == "ready"]

    async def pids(self, kind: str) -> dict[str, int]:
        """Return the pids of actors of a kind, by name."""
        return {actor.name: actor.pid for actor in await self.actors() if actor.kind == kind}
