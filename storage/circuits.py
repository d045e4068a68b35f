"""Which registry hosts the cluster has given up, for those who look; :mod:`storage.limits` acts by it."""

from __future__ import annotations

from cluster.circuit import GivenUp
from storage.keys import Keys
from storage.link import RedisLink


class Circuits:
    """Reads the circuits that aren't closed."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._prefix = keys.prefix

    async def given_up(self) -> list[GivenUp]:
        """Return the hosts that are given up, longest ago first."""
        return [
            GivenUp(
                host=host.decode(),
                failing_s=since_ms / 1000,
                last_failure=failure.decode(),
                retry_in_s=retry_in_ms / 1000,
            )
            for host, since_ms, failure, retry_in_ms in await self._link.run(
                "hosts_given_up", self._prefix, may_repeat=True
            )
        ]
