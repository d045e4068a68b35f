"""Running a command's coroutine, and ending it at Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from lazyfarm.cli.boundary import EXIT_INTERRUPTED

T = TypeVar("T")

#: How long a cancelled call may take to let go of what it holds.
GRACE_S = 10.0


def run_to_end(
    work: Callable[[], Coroutine[Any, Any, T]], *, grace_s: float = GRACE_S, leave: Callable[[int], object] = os._exit
) -> T:
    """Run *work* and return its result.

    Ctrl-C and SIGTERM cancel it and wait for it to end; a second one, or *grace_s* seconds, ends the process at
    once, through *leave*: what the call held then lapses with its leases.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    with asyncio.Runner() as runner:
        return runner.run(_supervised(work, grace_s, leave))


async def _supervised(work: Callable[[], Coroutine[Any, Any, T]], grace_s: float, leave: Callable[[int], object]) -> T:
    loop = asyncio.get_running_loop()
    task = loop.create_task(work())
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            _leave_now("interrupted twice", leave)
        interrupted = True
        task.cancel()
        loop.call_later(grace_s, _leave_now, f"interrupted; did not end within {grace_s:.0f} s", leave)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        await asyncio.wait({task})
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if interrupted:
        # Also where it happened to succeed, or failed while it ended: the user asked for neither.
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain of it
        raise KeyboardInterrupt
    return task.result()


def _leave_now(why: str, leave: Callable[[int], object]) -> None:
    sys.stderr.write(f"{why}; what was held lapses with its leases\n")
    sys.stderr.flush()
    leave(EXIT_INTERRUPTED)
