"""Work that an actor does again and again, as long as it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from cluster.errors import ClusterError

log = structlog.get_logger()


async def again_and_again(
    work: str,
    do: Callable[[], Awaitable[None]],
    *,
    every_s: float,
    passing: tuple[type[Exception], ...] = (ClusterError,),  # Redis or S3 is away
) -> None:
    """*do*, every *every_s* seconds, until cancelled; a failure that may pass is told, and the next time goes on."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await do()
        except passing as exc:
            event = f"{work}.failed"
            log.warning(event, error=str(exc), error_type=type(exc).__name__)
