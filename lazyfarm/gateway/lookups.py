"""What a gateway looks at for its drivers, in the farm's Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from cluster.config import Config
from cluster.ports import ObjectInfo
from cluster.settings import FarmSettings
from lazyfarm.explain import RedisExplain
from lazyfarm.leases import RedisLeases
from lazyfarm.miss import OpenTree
from lazyfarm.now import Now, look
from lazyfarm.records import RedisRecords
from lazyfarm.status import FarmStatus, status_of
from lazyfarm.verify import quarantined
from lazyfarm.web.reading import FarmReader
from storage.farm_file import read_running
from storage.keys import Keys
from storage.link import RedisLink


class Lookups:
    """What one driver may look at.

    Args:
        config: The farm's.
        state_dir: Its state directory.
        link: Its Redis; whoever gives it closes it.
        open_tree: Reads what drivers sent to it.
    """

    def __init__(self, config: Config, state_dir: Path, link: RedisLink, open_tree: OpenTree) -> None:
        keys = Keys(config.farm.name)
        self._settings = FarmSettings(state_dir=state_dir, wanted=config)
        self.records = RedisRecords.over(link, keys)
        self.leases = RedisLeases.over(link, keys, config.cache)
        self.explain = RedisExplain.over(link, keys, config.audit, open_tree)
        #: Made when it is looked through first: it remembers what it saw, which is what a rate is told of.
        self._reader: FarmReader | None = None

    async def aclose(self) -> None:
        """Disconnect."""
        if self._reader is not None:
            await self._reader.aclose()

    async def status(self) -> FarmStatus:
        """Return what runs."""
        # Read each time: `up` may have started more since the gateway joined.
        running = await asyncio.to_thread(read_running, self._settings.state_dir)
        return await status_of(replace(self._settings, running=running), self.records)

    async def quarantined(self) -> list[ObjectInfo]:
        """Return the damaged objects that were put aside."""
        return await asyncio.to_thread(quarantined, self._settings)

    async def now(self) -> Now:
        """Return what goes on."""
        if self._reader is None:
            self._reader = FarmReader(self._settings)
        return await look(self._reader)
