"""Turns: what one process of the farm at a time is enough for. They save work; nothing rests on them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import ClusterError
from storage.keys import Keys
from storage.link import RedisLink

#: Seconds after which the turn of a process that died is another's.
TURN_S = 10.0


@asynccontextmanager
async def turn(link: RedisLink, keys: Keys, work: str) -> AsyncIterator[bool]:
    """Take the turn for *work*, and keep it while the body runs; tell whether it was free."""
    token = secrets.token_hex(8)
    held_ms = int(TURN_S * 1000)
    if not await link.run("turn_take", keys.prefix, work, token, held_ms, may_repeat=True):
        yield False
        return

    async def keep() -> None:
        while True:
            await asyncio.sleep(TURN_S / 3)
            with contextlib.suppress(ClusterError):
                await link.run("turn_take", keys.prefix, work, token, held_ms, may_repeat=True)

    keeping = asyncio.create_task(keep())
    try:
        yield True
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        with contextlib.suppress(ClusterError):  # at worst it lapses
            await asyncio.shield(link.run("turn_release", keys.prefix, work, token, may_repeat=True))
