"""Work in a thread that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

from cluster import tracing
from cluster.errors import ClusterError

T = TypeVar("T")


class StoppedError(Exception):
    """Nobody waits any more."""


async def in_thread(threads: Executor, call: Callable[[threading.Event], T]) -> T:
    """Run *call* in a thread; where this is cancelled, tell it so by its event, and return when it has ended.

    Args:
        threads: Where it runs.
        call: Looks at the event often enough, and raises StoppedError once it is set.
    """
    stop = threading.Event()
    running = asyncio.get_running_loop().run_in_executor(threads, tracing.carried(call), stop)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        with suppress(ClusterError, StoppedError):
            await running
        raise
