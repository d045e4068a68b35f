"""Why things are as they are in a farm, as commands outside the cluster are told."""

from __future__ import annotations

from lazyfarm.explain import FarmExplain, LayerWait, PullStory
from lazyfarm.gateway import reads
from lazyfarm.gateway.link import GatewayLink
from lazyfarm.miss import Miss


class GatewayExplain(FarmExplain):
    """Explains a farm over its gateway, which does all the reading; each method is as the base's."""

    def __init__(self, link: GatewayLink) -> None:
        self._link = link

    async def miss(self, step: str, *, job: str = "", against: str = "") -> Miss:
        """Tell why a step of a job was not found in the cache."""
        return await self._link.call(reads.MISS, reads.MissCall(step=step, job=job, against=against))

    async def wait(self, name: str, *, watch_s: float = 1.0) -> list[LayerWait]:
        """Tell what layers wait for."""
        return await self._link.call(reads.WAIT, reads.WatchCall(name=name, watch_s=watch_s))

    async def pull(self, name: str, *, watch_s: float = 1.0) -> PullStory:
        """Tell how layers came here."""
        return await self._link.call(reads.PULL_STORY, reads.WatchCall(name=name, watch_s=watch_s))
