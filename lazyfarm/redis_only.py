"""What needs a farm's Redis alone: Ray is not joined."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.config import AuditConfig, Config
from cluster.errors import FarmNotRunningError
from cluster.settings import FarmSettings
from storage.audit import RedisAudit
from storage.connect import connect
from storage.keys import Keys
from storage.link import RedisLink


def connected(settings: FarmSettings) -> tuple[RedisLink, Keys]:
    """Return a client of a farm's Redis, which the caller closes, and the farm's keys.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    config: Config = settings.config
    if not config.redis.url:
        raise FarmNotRunningError(str(settings.state_dir), "nothing was brought up there")
    return connect(config.redis), Keys(config.farm.name)


def own_audit(link: RedisLink, keys: Keys, config: AuditConfig) -> RedisAudit:
    """Return the audit stream of a farm, in which this process is named as it is to people: ``HOST:PID``."""
    return RedisAudit(link, keys, config, by=f"{socket.gethostname()}:{os.getpid()}")


@asynccontextmanager
async def open_audit(settings: FarmSettings) -> AsyncIterator[RedisAudit]:
    """Connect to a farm's audit stream for as long as the body runs; raises as :func:`connected`."""
    async with connection(settings) as (link, keys):
        yield own_audit(link, keys, settings.config.audit)


@asynccontextmanager
async def connection(settings: FarmSettings) -> AsyncIterator[tuple[RedisLink, Keys]]:
    """Connect to a farm's Redis for as long as the body runs; raises as :func:`connected`."""
    link, keys = connected(settings)
    try:
        yield link, keys
    finally:
        await link.close()
